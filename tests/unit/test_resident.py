"""What a soak says of its server's memory: whose grows, of which kind, and how fast."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_misa.bench import resident, soak

MIB = 1 << 20
GROWS = f"import time; kept = []; print(flush=True)\nwhile True: kept.append(bytearray(b'x' * {MIB})); time.sleep(0.01)"
STAYS = f"import time; kept = bytearray(b'x' * {64 * MIB}); print(flush=True); time.sleep(60)"


@contextmanager
def child(program: str) -> Iterator[int]:
    """A process that runs `program`, from its first line of output on."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def grown(program: str) -> resident.Growth:
    """What a child's own memory grew by within some samples."""
    with child(program) as pid, resident.watch(pid, period_s=0.05) as samples:
        while len(samples) < 10:
            time.sleep(0.05)
        (found,) = [growth for growth in resident.growths(samples[:10]) if growth.kind == "anon"]
    return found


def test_a_process_that_keeps_what_it_asks_for_is_told_from_one_that_does_not() -> None:
    grows, stays = grown(GROWS), grown(STAYS)
    assert grows.per_hour > 1024 * MIB
    assert stays.resident > 64 * MIB
    assert abs(stays.per_hour) < 1024 * MIB


def test_a_parent_s_family_has_its_children() -> None:
    starts = f"import subprocess, sys\nwith subprocess.Popen([sys.executable, '-c', {STAYS!r}]): pass"
    with child(starts) as pid, child(STAYS) as stranger:
        family = resident.family(pid)
        (own,) = [process for process in family.values() if process.parent == pid]
        assert own.resident["anon"] > 64 * MIB
        assert stranger not in family
        assert resident.total(family) >= sum(process.resident["anon"] for process in family.values())


def test_a_spike_is_no_trend() -> None:
    flat = [(float(second), 100.0) for second in range(20)]
    spiked = [*flat[:7], (7.0, 10_000.0), (8.0, 10_000.0), *flat[9:]]
    assert resident.slope(spiked) == 0
    assert resident.slope([(second, 3 * second) for second, _ in flat]) == 3


def sample(second: float, sizes: list[int]) -> resident.Sample:
    kinds = [{"anon": size, "file": 7 * MIB, "shmem": 0} for size in sizes]
    return second, {pid: resident.Process("python", 1, "S", kind) for pid, kind in enumerate(kinds, 2)}


def test_a_report_names_the_process_that_grows() -> None:
    samples = [sample(60.0 * minute, [100 * MIB, (200 + minute) * MIB]) for minute in range(15)]
    report = soak.Report(minutes=30.0, memory=resident.growths(samples))
    (told,) = [problem for problem in report.problems() if "grow" in problem]
    assert "python 2 to grow" in told
    assert {growth.kind for growth in report.memory} == {"anon", "file"}
    seconds = soak.Report(minutes=0.5, memory=report.memory)
    assert not [problem for problem in seconds.problems() if "grow" in problem]
