"""The pages written from the CSVs: today's policies, the newest row of a case, nothing outside the markers."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sglang_misa.bench import report, selection_table
from sglang_misa.bench.kernels import COLUMNS
from sglang_misa.bench.watching import Look

GPU = "NVIDIA H200"


def row(**changes: object) -> dict[str, object]:
    base = dict.fromkeys(COLUMNS, "") | {
        **{"gpu": GPU, "sglang": "0.5.23", "phase": "prefill", "preset": "fast", "policy": "misa", "index_heads": 64},
        **{"routed_heads": 7, "residual": 1, "rows": 8192, "length": 131072, "inputs": "random", "stock_us": 18000.0},
        **{"ours_us": 2000.0, "ratio": 9.0, "recall": 0.9, "correct": True, "commit": "new"},
    }
    return base | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        row(commit="old", length=32768, ratio=4.0),
        row(commit="old", length=65536, routed_heads=8),
        row(ratio=8.0),
        row(),
        row(preset="exact", routed_heads="", residual=0, ratio=1.2, correct=False),
        row(inputs="trained:layer0", ratio=7.5, recall=0.93),
        row(inputs="trained:layer2", ratio=7.0, recall=0.97),
        row(inputs="hostile:period-24", ratio=6.0),
        row(inputs="hostile:one-key", ratio=5.0),
        row(rows=1024, length=262144, ratio=6.5),
        row(phase="decode", rows=64, stock_us=300.0, ours_us=100.0, ratio=3.0),
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    with (tmp_path / "results/kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def written(folder: Path) -> str:
    words = ["--results", folder / "results", "--docs", folder / "docs", "--readme", folder / "README.md"]
    assert report.main([str(word) for word in words]) == 0
    return (folder / "results/README.md").read_text()


def test_a_page_holds_the_newest_right_rows_of_the_last_policies(folder: Path) -> None:
    page = written(folder)
    assert "| fast (h = 7, residual) | 64 | 8192 | random | 18 | 2 | 4.00 | 18 | 2 | 9.00 |  |" in page
    assert "64K" not in page  # of another policy
    assert "exact" not in page  # wrong
    assert "8.00" not in page  # measured again
    assert (
        "| fast (h = 7, residual) | 64 | 8192 | trained |  |  |  | 18 | 2 | 7.00 | 0.950 |" in page
    )  # slowest, mean recall
    assert "Trained inputs: layer0, layer2 of a small model" in page
    assert page.index("one-key | 5.00") < page.index("period-24 | 6.00")
    assert "| fast (h = 7, residual) | 64 | 1024 | random | 18 | 2 | 6.50 |  |" in page
    assert "| fast (h = 7, residual) | 64 | 64 | random | 300 | 100 | 3.00 |  |" in page
    for figure in ("prefill", "decode"):
        assert (folder / f"results/kernels-{figure}-NVIDIA-H200.png").exists()


def test_tables_stand_between_their_markers_and_nowhere_else(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text("before\n<!-- measured -->\nstale\n<!-- /measured -->\nafter\n")
    written(folder)
    page = readme.read_text()
    assert page.startswith("before\n<!-- measured -->\n\n### H200, SGLang 0.5.23, 128K tokens")
    assert page.endswith("\n\n<!-- /measured -->\nafter\n")
    assert "stale" not in page
    written(folder)
    assert readme.read_text() == page


def test_quality_shows_the_front_and_the_presets(folder: Path) -> None:
    base = dict.fromkeys(selection_table.FIELDS, "") | {
        "length": 131072,
        "phase": "prefill",
        "residual": 0,
        "columns": 8,
    }
    paper = base | {"heads": 8, "router": "mean", "block_size": 256, "recall": 0.873, "flop": 0.2, "front": 0}
    other = base | {"heads": 8, "router": "signed", "block_size": 64, "recall": 0.8, "flop": 0.2, "front": 0}
    best = base | {
        "heads": 7,
        "router": "peak",
        "residual": 1,
        "block_size": 64,
        "recall": 0.96,
        "flop": 0.2,
        "front": 1,
    }
    with (folder / "results/selection.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, selection_table.FIELDS)
        writer.writeheader()
        writer.writerows([paper, other, best])
    (folder / "docs").mkdir()
    page = folder / "docs/quality.md"
    page.write_text("<!-- quality -->\n<!-- /quality -->\n")
    written(folder)
    assert "|  | 7 heads by peak over 64, residual | 8 | 0.2 | 0.96 |" in page.read_text()
    assert "| misa, misa-hisa | 8 heads by mean over 256 | 8 | 0.2 | 0.873 |" in page.read_text()
    assert "signed" not in page.read_text()


def test_needles_are_told_by_length_and_arm_with_the_depths_that_were_missed(folder: Path) -> None:
    row = {"arm": "dsa", "length": 4096, "depth": 0.5, "asked": 2, "found": 2, "model": "small", "commit": "new"}
    rows = [row, row | {"depth": 1.0}, row | {"arm": "fast", "found": 1}, row | {"arm": "fast", "depth": 1.0}]
    (folder / "results/needles.json").write_text(json.dumps(rows))
    (folder / "docs").mkdir()
    page = folder / "docs/quality.md"
    page.write_text("<!-- needles -->\n<!-- /needles -->\n")
    written(folder)
    assert "| tokens | dsa | fast |" in page.read_text()
    assert "| 4K | 4 of 4 | 3 of 4 (not at 50 %) |" in page.read_text()


def test_no_right_row_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path)])
    assert "run bench.kernels --csv" in capsys.readouterr().err


def test_what_watching_costs_is_told_once_it_was_measured(folder: Path) -> None:
    page = folder / "docs/operations.md"
    page.parent.mkdir()
    page.write_text("<!-- watching -->\nbefore\n<!-- /watching -->\n")
    written(folder)
    assert "before" in page.read_text()
    look = asdict(Look.of("canary, 16 pages", 55.2, 420.4, 1.0, 23.0))
    sizes = {"preset": "faithful", "rows": 16, "length": 131072, "layers": 61, "audited": 4, "every": 64}
    (folder / "results/watching.json").write_text(json.dumps([{"gpu": GPU, "commit": "abc1234"} | sizes | look]))
    written(folder)
    assert "| canary, 16 pages | 1 | 55 | 420 | 0.24% of 23 ms | 0.5% |" in page.read_text()
    assert "NVIDIA H200; commit abc1234. preset faithful, rows 16, length 131072" in page.read_text()
    assert "before" not in page.read_text()


def test_a_case_whose_newest_row_is_wrong_is_not_shown() -> None:
    """The older, right one is of other code."""
    case = row(commit="old", ratio=9.0), row(commit="new", ratio=9.5, correct=False)
    other = row(commit="new", length=32768, ratio=4.0)
    rows = [{name: str(value) for name, value in each.items()} for each in (*case, other)]
    assert [each["length"] for each in report.newest(rows)] == ["32768"]


def test_of_several_rows_in_one_place_the_slowest_is_told(tmp_path: Path) -> None:
    several = (row(inputs="hostile:one-key", index_heads=heads, ratio=ratio) for heads, ratio in ((32, 2.0), (64, 5.0)))
    rows = [{name: str(value) for name, value in each.items()} for each in several]
    told = report.by_input("hostile", rows)
    assert told.rows == [["one-key", "2.00"]]
    assert "Of several numbers of index heads the slowest" in told.note
    assert report.environment([row(), row(gpu="NVIDIA B200")]).startswith("NVIDIA H200, NVIDIA B200; SGLang 0.5.23")


@pytest.mark.parametrize(("held", "shown"), [(0, []), (1, [0]), (7, [*range(7)]), (8, [0, 1, 2, 4, 5, 6, 7])])
def test_a_front_is_shown_from_end_to_end(held: int, shown: list[int]) -> None:
    assert report._spread([*range(held)], 7) == shown
    assert report._spread([*range(18)], 7)[-1] == 17
