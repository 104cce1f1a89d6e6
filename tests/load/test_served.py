"""From runs of `ab` against mock servers to rows of one_rank.csv, and from rows to the table of the results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from load.helpers import PATIENT, MockProcess, units

from sglang_misa.bench import served
from sglang_misa.bench.load import cli, environment
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.shell import OK

PAGE = 64
MODEL = {"version": "0.5.23", "model_path": "/somewhere/deepseek-v3.2-1-of-8-ranks-8"}  # as bench.one_rank names it
Ab = Callable[..., Path]


@pytest.fixture
def ab(mocks: tuple[MockProcess, MockProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ab:
    """A run of two blocks on a machine with a GPU and a commit: stock, and `misa` in half its time."""
    monkeypatch.setattr(environment, "_gpus", lambda: {"GPUs": "2 × NVIDIA H200"})
    monkeypatch.setattr(environment, "commit", lambda: "abc1234")

    def measured(*words: str, name: str = "ab", **script: Any) -> Path:
        mocks[0].script(ttft=0.06, misa="dsa", told=MODEL)
        mocks[1].script(**({"ttft": 0.03, "misa": "misa", "told": MODEL} | script))
        line = ["ab", "--a", mocks[0].url, "--b", mocks[1].url, "--a-expect", "dsa", "--b-expect", "misa", *PATIENT]
        line += ["--text", "ids", "--warmup", "1", "--blocks", "2", "--requests", "2", "--output-len", "8"]
        assert cli.main([*line, *words, "--out", str(tmp_path / name)]) == OK
        return tmp_path / name

    return measured


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        served.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_finished_ab_becomes_rows_and_a_table(ab: Ab, tmp_path: Path) -> None:
    cold = ab("--contexts", "1k", "2k")
    agent = ["--workload", "agent", "--turns", "2", "--turn-len", "128", "--pause-s", "0", "--input-len", "4k"]
    cached = ab(*agent, name="agent")
    table = tmp_path / "one_rank.csv"
    assert served.main([str(cold), str(cached), "--csv", str(table)]) == 0
    rows = rows_in(table)
    assert tuple(rows[0]) == served.COLUMNS
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        stand = [row[name] for name in ("gpu", "sglang", "ranks", "layers", "clients", "output_tokens", "commit")]
        assert stand == ["NVIDIA H200", "0.5.23", "1", "8", "1", "8", "abc1234"]
        assert float(row["ttft_s"]) == pytest.approx(0.06 if row["arm"] == "stock" else 0.03, abs=0.025)
        assert 0.001 < float(row["tpot_s"]) < 0.02
    assert {(row["workload"], row["prompt_tokens"], row["cached_tokens"]) for row in rows} == {
        ("cold", "1024", "0"),
        ("cold", "2048", "0"),
        # turns of 4224 and, after 8 tokens of answer, 4360: the context, and all but the last token of it
        ("cached", str((4224 + 4360) // 2), str((4096 + 4231 // PAGE * PAGE) // 2)),
    }
    assert {row["run"] for row in rows} == {
        json.loads((f / "environment.json").read_text())["started"] for f in (cold, cached)
    }

    (page,) = map(str, served.tables(served.read(table)))
    assert "### Through the server, 8 of 61 layers" in page
    assert "NVIDIA H200; SGLang 0.5.23; commit abc1234. 1 of eight ranks" in page
    lines = [line.split(" | ") for line in page.splitlines() if "| misa |" in line]
    assert [line[0] for line in lines] == ["| cold", "| cold", "| cached"]
    assert [line[1:6] for line in lines[:2]] == [["1K", "0K", "1", "misa", "2"], ["2K", "0K", "1", "misa", "2"]]
    for line in lines:
        assert 1.2 < float(line[8].split(" ")[0]) < 2.8


def row(arm: str, block: int, ttft_s: float, started: float, **changes: Any) -> served.Row:
    base = served.Row(
        **{"gpu": "NVIDIA H200", "sglang": "0.5.23", "ranks": 1, "layers": 8, "workload": "cold", "cell": "128k"},
        **{"clients": 1, "arm": arm, "run": "2026-01-01", "block": block, "started": started, "requests": 1},
        **{"prompt_tokens": 131072, "cached_tokens": 0, "output_tokens": 32, "ttft_s": ttft_s, "tpot_s": None},
        **{"e2e_s": 3.0, "commit": "abc1234"},
    )
    return replace(base, **changes)


def blocks(run: str, factor: float) -> list[served.Row]:
    """Four blocks A B B A: what comes second in a block is slower by 10 %, and ours is faster by `factor`."""
    found = []
    for block in range(4):
        second = ("stock", "misa")[block % 2 == 0]
        for arm in ("stock", "misa"):
            slower = 1.1 if arm == second else 1.0
            started = 10.0 * block + (arm == second)
            found.append(row(arm, block, 2.0 * slower / (factor if arm == "misa" else 1), started, run=run))
    return found


def test_the_order_of_the_arms_is_taken_out_and_the_last_run_of_a_case_wins() -> None:
    (page,) = map(str, served.tables([*blocks("2026-01-01", 1.5), *blocks("2026-01-02", 2.0)]))
    assert "| cold | 128K | 0K | 1 | misa | 4 | 2.1 | 1.05 | 2.00 (2.00–2.00) |  |  |  |" in page
    with pytest.raises(LoadError, match="run 2026-01-01: expected the same blocks of stock and misa"):
        served.tables(blocks("2026-01-01", 1.5)[1:])
    assert served.tables([]) == []


@pytest.mark.parametrize(
    ("arm", "clients", "tokens", "told"),
    [
        ("fast", 1, 131072, "both stock"),
        ("fast", 4, 32768, "both stock"),  # four rows, of too few tokens
        ("misa", 64, 131072, "both stock"),  # whose decode is stock's
        ("fast", 4, 131072, "1.50"),
    ],
)
def test_times_of_decode_steps_that_both_arms_left_to_stock_make_no_ratio(
    arm: str, clients: int, tokens: int, told: str
) -> None:
    changes = {"clients": clients, "prompt_tokens": tokens}
    rows = [row("stock", 0, 2.0, 0.0, tpot_s=0.003, **changes), row(arm, 0, 2.0, 1.0, tpot_s=0.002, **changes)]
    (page,) = map(str, served.tables(rows))
    assert page.splitlines()[-1].endswith(f"| 3 | 2 | {told} |")


def test_what_is_not_whole_becomes_no_row(ab: Ab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "one_rank.csv"
    assert "expected the plan of a run" in refused([tmp_path, "--csv", table], capsys)
    folder = ab()
    assert "expected each run once" in refused([folder, folder], capsys)
    failed = ab("--fail-if", "error_rate > 1", fault="500", fault_every=3, name="failed")
    told = refused([folder, failed, "--csv", table], capsys)
    assert "expected 8 requests answered as asked, 1 were not: B at 32k" in told
    assert not table.exists()
    assert served.main([str(folder), "--csv", str(table)]) == 0
    assert "expected runs that it does not hold" in refused([folder, "--csv", table], capsys)
    assert len(rows_in(table)) == 4
    next(iter(sorted((folder / "units").glob("*.json")))).unlink()
    assert "expected 4 valid blocks of the arms, got 3" in refused([folder], capsys)
    table.write_text("gpu,clients,arm\n")
    assert "expected the columns of bench.served" in refused([ab(name="other"), "--csv", table], capsys)


def test_what_the_artefacts_do_not_tell_is_asked_for(
    ab: Ab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--gpu: expected NVIDIA H200, as" in refused([ab(), "--gpu", "NVIDIA H100"], capsys)
    monkeypatch.setattr(environment, "_gpus", dict)
    monkeypatch.setattr(environment, "commit", str)
    folder = ab(name="silent")
    assert "--gpu: expected it beside" in refused([folder, "--commit", "abc"], capsys)
    assert "--commit: expected it beside" in refused([folder, "--gpu", "NVIDIA H100"], capsys)
    capsys.readouterr()
    assert served.main([str(folder), "--gpu", "NVIDIA H100", "--commit", "abc"]) == 0
    assert capsys.readouterr().out.count(",abc\n") == 4


def test_cached_tokens_must_be_told_and_as_planned(ab: Ab, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ab("--api", "completions")
    assert served.main([str(folder)]) == 0
    capsys.readouterr()
    for change, said in (
        (None, "start it with --enable-cache-report"),
        (512, "512 tokens found in the cache, 0 planned"),
    ):
        for path in (folder / "units").glob("*.json"):
            unit = json.loads(path.read_text())
            for record in unit["records"]:
                record["cached_tokens"] = change
            path.write_text(json.dumps(unit))
        told = refused([folder], capsys)
        assert "expected 8 requests answered as asked, 8 were not: A at 32k" in told
        assert said in told
    assert len(units(folder)) == 4


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        (["dsa", "dsa"], "expected an `ab` of stock and one preset, got stock and stock"),
        (["dsa", "None"], "expected arms whose selection was checked, got B without"),
    ],
)
def test_an_arm_is_what_was_expected_of_it(
    ab: Ab, capsys: pytest.CaptureFixture[str], expected: list[str], said: str
) -> None:
    words = ["--a-expect", expected[0], "--b-expect", expected[1]]
    assert said in refused([ab(*words, misa=expected[0])], capsys)
