"""Several client processes: the same requests as one process, the same times, and a loud end where one dies."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
from load.helpers import PATIENT, figures, units

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.drive import Timing
from sglang_misa.bench.load.shell import INVALID, OK, USAGE

SHORT = [*PATIENT, "--text", "ids", "--id-range", "100", "350", "--input-len", "uniform:200:900", "--output-len", "6"]
LOADS = {
    "closed": ["--concurrency", "5", "--requests", "23", "--cooldown", "keep"],
    "open": ["--arrival", "poisson", "--rate", "40", "--requests", "23"],
    "turns": ["--concurrency", "4", "--requests", "9", "--turns", "3", "--turn-len", "50"],
}
ASKED = ("pair", "turn", "prompt_wanted", "prompt_tokens", "output_wanted", "output_tokens", "cached_wanted", "error")


@pytest.mark.parametrize("load", LOADS)
def test_three_processes_send_what_one_sends(mocks, tmp_path, load):
    mocks[0].script(ttft=0.03, itl=0.002)
    found = {}
    for workers in ("1", "3"):
        out = tmp_path / workers
        words = [*SHORT, *LOADS[load], "--workers", workers, "--warmup", "1", "--out", str(out)]
        assert main(["run", mocks[0].url, *words]) == OK
        (found[workers],) = units(out)
    one, three = ([tuple(r[name] for name in ASKED) for r in found[n]["records"]] for n in ("1", "3"))
    assert one == three
    if load == "open":
        assert [r["due"] for r in found["1"]["records"]] == [r["due"] for r in found["3"]["records"]]
    unit = found["3"]
    assert max(n for _, n in unit["timeline"]["in_flight"]) > 1
    assert unit["timeline"]["in_flight"][-1][1] == 0
    waits = sorted(r["first"] - r["dispatched"] for r in unit["records"])
    assert unit["figures"]["ttft_p50"] == pytest.approx(waits[len(waits) // 2])  # an odd number of them
    assert min(waits) > 0.03


def test_a_loop_of_several_processes_is_one_loop(mocks, tmp_path):
    """Never more in flight than clients; they share the conversations as they come free, for as long as is asked."""
    mocks[0].script(ttft=0.02, itl=0.0)
    words = [*SHORT, "--concurrency", "4", "--duration-s", "2", "--workers", "2", "--warmup", "1"]
    assert main(["run", mocks[0].url, *words, "--out", str(tmp_path)]) == OK
    (unit,) = units(tmp_path)
    pairs = [r["pair"] for r in unit["records"]]
    assert sorted(pairs) == list(range(len(pairs)))
    assert len(pairs) > 40
    moments = sorted((t, change) for r in unit["records"] for t, change in ((r["dispatched"], 1), (r["done"], -1)))
    flying = most = 0
    for _, change in moments:
        flying += change
        most = max(most, flying)
    assert most <= 4


def test_each_worker_is_checked(mocks, tmp_path):
    mocks[0].script(ttft=0.01)
    words = [*SHORT, "--max-lag-s", "1e-9", "--concurrency", "2", "--requests", "4", "--workers", "2"]
    assert main(["run", mocks[0].url, *words, "--out", str(tmp_path)]) == INVALID
    (unit,) = units(tmp_path)
    assert any("4 requests for 2 clients: under 5 for each" in note for note in unit["notes"])
    for number in (1, 2):
        assert any(p.startswith(f"worker {number} of 2 was saturated") for p in unit["problems"])


def test_a_worker_that_dies_fails_its_block(mocks, tmp_path, capsys):
    mocks[0].script(ttft=0.3)
    words = [*SHORT, "--concurrency", "2", "--requests", "12", "--workers", "2", "--blocks", "2", "--warmup", "0"]
    killed = []

    def kill() -> None:
        while len(list((tmp_path / "units").glob("*.json"))) < 1 or len(multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        time.sleep(0.7)
        killed.append(multiprocessing.active_children()[0])
        killed[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["run", mocks[0].url, *words, "--out", str(tmp_path)]) == USAGE
    killer.join()
    told = " ".join(capsys.readouterr().err.split())
    assert "of 2 ended with exit code -9 in block 2" in told
    assert len(units(tmp_path)) == 1
    assert not multiprocessing.active_children()
    assert main(["resume", str(tmp_path)]) == OK
    assert figures(tmp_path)["requests"] == 24


def test_shares_add_up():
    timing = Timing(tuple(float(i) for i in range(7)), (), 9.0, None)
    shares = [timing.share(i, 3) for i in range(3)]
    assert sorted(s for share in shares for s in share.starts) == list(timing.starts)
    assert max(share.steady for share in shares) == timing.steady
