"""The search for the highest load: by itself against every capacity, and over a server that slows with its load."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from load.helpers import PATIENT, results, units

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.search import Capacity, Step, capacity_ratio, find
from sglang_misa.bench.load.shell import OK, USAGE

SLO = "ttft = 0.3"
SHORT = [
    *PATIENT,
    "--input-len",
    "200",
    "--output-len",
    "2",
    "--warmup",
    "1",
    "--text",
    "ids",
    "--id-range",
    "100",
    "350",
]


def step(level: float, capacity: float) -> Step:
    return Step(level=level, kept=0, asked=0, carried=level <= capacity, decided=True)


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 256))
def test_the_highest_concurrency_is_found(capacity, start, highest):
    good, bad, steps = find(lambda level: step(level, capacity), "concurrency", start, highest)
    assert good == min(capacity, highest)
    assert bad == (None if capacity >= highest else capacity + 1)
    assert len(steps) == len({s.level for s in steps}) <= 18


@given(st.floats(0.2, 90.0), st.floats(0.5, 40.0))
def test_the_highest_rate_is_found_within_a_step(capacity, start):
    assume(capacity > start / 60)  # below a 64th of the start nothing is tried
    good, bad, _ = find(lambda level: step(level, capacity), "rate", start, 100.0)
    assert good <= capacity < bad
    assert bad / good <= 1.06


def test_an_interval_holds_the_gap_between_loads():
    def arm(name: str, level: float) -> list[Capacity]:
        return [Capacity(arm=name, context="1k", search=i, level=level, beyond=level + 1, steps=()) for i in range(6)]

    ratio = capacity_ratio(arm("A", 8), arm("B", 12), [False, True] * 3, 0.95)
    assert ratio.value == pytest.approx(1.5)
    assert ratio.low == pytest.approx(1.5 * 8 / 9)
    assert ratio.high == pytest.approx(1.5 * 9 / 8)


def test_a_server_is_brought_to_its_limit(mocks, tmp_path):
    """60 ms for each request in flight and a limit of 300 ms: four are carried, eight are not."""
    mocks[0].script(ttft=0.02, crowd=0.06, itl=0.0)
    (tmp_path / "slo.toml").write_text(SLO)
    slo = ["--slo", str(tmp_path / "slo.toml"), "--start", "2", "--requests", "24", "--target", "0.9"]
    assert main(["max", mocks[0].url, *SHORT, *slo, "--out", str(tmp_path / "out")]) == OK
    (found,) = results(tmp_path / "out")["capacities"]
    assert 3 <= found["level"] <= 5
    assert found["beyond"] == found["level"] + 1
    assert f"carries a concurrency of {found['level']:g} at 200" in results(tmp_path / "out")["verdict"]
    assert "Highest load with 90%" in (tmp_path / "out" / "report.html").read_text()
    before = len(units(tmp_path / "out"))
    assert main(["resume", str(tmp_path / "out")]) == OK
    assert len(units(tmp_path / "out")) == before


def test_two_servers_and_their_ratio(mocks, tmp_path):
    mocks[0].script(ttft=0.02, crowd=0.09, itl=0.0)
    mocks[1].script(ttft=0.02, crowd=0.04, itl=0.0)
    (tmp_path / "slo.toml").write_text(SLO)
    slo = [
        "--slo",
        str(tmp_path / "slo.toml"),
        "--start",
        "4",
        "--requests",
        "12",
        "--target",
        "0.7",
        "--step-blocks",
        "1",
    ]
    two = ["max", mocks[0].url, "--against", mocks[1].url, "--blocks", "2"]
    assert main([*two, *SHORT, *slo, "--out", str(tmp_path / "out")]) == OK
    (ratio,) = results(tmp_path / "out")["capacity_ratios"]
    assert 1.4 < ratio["value"] < 3.5
    assert "give no verdict" in results(tmp_path / "out")["verdict"]


@pytest.mark.parametrize(
    "words", [[], ["--over", "rate"], ["--arrival", "poisson"], ["--target", "2"], ["--step-blocks", "0"]]
)
def test_searches_that_make_no_sense_are_refused(tmp_path, capsys, words):
    (tmp_path / "slo.toml").write_text(SLO)
    slo = ["--slo", str(tmp_path / "slo.toml")] if words else []
    assert main(["max", "http://127.0.0.1:1", *slo, *words, "--out", str(tmp_path)]) == USAGE
    assert "expected" in capsys.readouterr().err
