"""The bench of a load-back, small and on the CPU: it runs, and times nothing on statistics gone wrong."""

import csv
from pathlib import Path
from typing import Any

import pytest

from sglang_misa.bench import load_back
from sglang_misa.engines.reference import ReferenceEngine

SIZE = ("--tokens", "256", "--layers", "2", "--repeats", "1", "--device", "cpu")
WORDS = (*SIZE, "--io-backend", "direct", "--layout", "page_first_direct", "--presets", "hisa")


def test_every_preset_has_a_row_beside_stocks(tmp_path: Path) -> None:
    table = tmp_path / "load_back.csv"
    assert load_back.main([*WORDS, "--csv", str(table)]) == 0
    stock, hisa = csv.DictReader(table.open())
    assert (stock["preset"], hisa["preset"]) == ("dsa", "hisa")
    assert float(stock["statistics_ms"]) == 0
    assert float(hisa["statistics_ms"]) > 0
    assert hisa["tokens"] == "256"


def test_stale_statistics_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, layer: int, slots: Any) -> None:
        pass

    monkeypatch.setattr(ReferenceEngine, "pages_written", nothing)
    with pytest.raises(RuntimeError, match="layer 0: expected the statistics of its pages"):
        load_back.main(WORDS)
