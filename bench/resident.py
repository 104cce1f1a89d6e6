"""Resident memory of a server's processes by kind, as Linux tells it in /proc/*/status, and how fast it grows."""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

PERIOD_S = 5.0  # between two samples
HOUR_S = 3600.0

Kind = Literal["anon", "file", "shmem"]  # RssAnon, RssFile, RssShmem
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Process:
    """One process: its name of at most 15 letters, the letter of its state that ps shows, bytes by kind."""

    name: str
    parent: int
    state: str
    resident: dict[Kind, int]


@dataclass(frozen=True)
class Growth:
    """One process's memory of one kind: its bytes in the median of the samples, and what is added to them an hour."""

    process: str
    kind: Kind
    resident: int
    per_hour: int


Sample = tuple[float, dict[int, Process]]  # seconds on the monotonic clock, processes by id


def family(root: int) -> dict[int, Process]:
    """The process `root` and all below it, by id; they may be of several sessions."""
    everyone: dict[int, Process] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended since
            everyone[int(path.parent.name)] = parse(path.read_text(errors="replace"))
    known = {root}
    while found := {pid for pid, process in everyone.items() if process.parent in known} - known:
        known |= found
    return {pid: everyone[pid] for pid in sorted(known) if pid in everyone}


def parse(status: str) -> Process:
    """The process that the text of a /proc/*/status tells of; a zombie has no memory."""
    fields = dict(re.findall(r"^(\w+):\s+(\S+)", status, re.M))
    resident: dict[Kind, int] = {kind: 1024 * int(fields.get(f"Rss{kind.title()}", 0)) for kind in KINDS}
    return Process(fields["Name"], int(fields["PPid"]), fields["State"], resident)


def total(processes: dict[int, Process]) -> int:
    """Resident bytes of all kinds."""
    return sum(sum(process.resident.values()) for process in processes.values())


@contextlib.contextmanager
def watch(root: int, period_s: float = PERIOD_S) -> Iterator[list[Sample]]:
    """Samples of `root` and all below it, one each period until the end; read them then."""
    samples: list[Sample] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(period_s):
            samples.append((time.monotonic(), family(root)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """What each process that is in all samples grew by, of each kind that it has; nothing from fewer than two."""
    if len(samples) < 2:
        return []
    found = []
    lasting = set.intersection(*(set(processes) for _, processes in samples))
    for pid, process in names({pid: samples[-1][1][pid] for pid in lasting}).items():
        for kind in KINDS:
            points = [(second, processes[pid].resident[kind]) for second, processes in samples]
            resident = round(statistics.median(size for _, size in points))
            if resident:
                found.append(Growth(process, kind, resident, round(slope(points) * HOUR_S)))
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope between any two of `points` (Theil and Sen's estimator): no spike of a step moves it."""
    return statistics.median((y - b) / (x - a) for (a, b), (x, y) in itertools.combinations(points, 2))


def names(processes: dict[int, Process]) -> dict[int, str]:
    """A name for each; those that share one are numbered in the order of their ids, the later ones from 2 on."""
    seen: Counter[str] = Counter()
    found = {}
    for pid, process in sorted(processes.items()):
        seen[process.name] += 1
        found[pid] = process.name if seen[process.name] == 1 else f"{process.name} {seen[process.name]}"
    return found
