"""Ranks that compare what they selected: digests know sets apart, and two gloo processes find the one that parted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import told_by_ranks
from pools import reference_engine
from torch import Tensor, distributed

from sglang_misa.agreement import ROWS, Agreement, RanksDisagree, digest
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES
from sglang_misa.metrics import recorder

LAYERS, PAGES, K = 3, 8, 16
SETS = torch.stack([torch.randperm(500, generator=torch.Generator().manual_seed(row))[:K] for row in range(6)])


def test_the_order_within_a_set_is_none_of_it() -> None:
    shuffled = torch.stack([row[torch.randperm(K)] for row in SETS])
    assert digest(shuffled) == digest(SETS)


def changed(row: int, column: int, value: int) -> Tensor:
    result = SETS.clone()
    result[row, column] = value
    return result


@pytest.mark.parametrize(
    "other",
    [
        changed(0, 0, 501),
        changed(5, K - 1, -1),
        changed(2, 3, int(SETS[2, 4])),  # one token twice
        SETS[[1, 0, 2, 3, 4, 5]],
        SETS[:5],
        SETS + 1,
        torch.cat((SETS, SETS[:1])),
        SETS[:, :-1],
    ],
    ids=["token", "missing", "twice", "rows", "fewer", "shifted", "more", "smaller"],
)
def test_other_sets_have_another_digest(other: Tensor) -> None:
    assert digest(other) != digest(SETS)


@pytest.mark.parametrize("row", range(8))
def test_no_row_of_a_large_call_is_passed_over_for_good(row: int) -> None:
    engine = reference_engine([torch.zeros(PAGES, PAGE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)])
    mine, theirs = Agreement(engine, 1000, None), Agreement(engine, 1000, None)
    ids = torch.arange(8 * ROWS * K).view(8 * ROWS, K)
    other = ids.clone()
    other[800 + row, 3] = 0
    for _ in range(100):  # steps without a meeting
        mine.selected(1, ids)
        theirs.selected(1, other)
        mine.step(ids, ids[:0, 0], ids[:0, 0], 0)
        theirs.step(ids, ids[:0, 0], ids[:0, 0], 0)
    assert [bool(differ) for differ in mine._selected != theirs._selected] == [False, True, False]


def one_rank(rank: int, peers: distributed.ProcessGroup) -> tuple[dict[str, Any], int]:
    """Meets after every second step; says after which step it stopped, and with which words. Rank 1 parts there."""
    bytes_ = torch.Generator().manual_seed(0)
    pool = [torch.randint(0, 120, (PAGES + 1, PAGE_BYTES), dtype=torch.uint8, generator=bytes_) for _ in range(LAYERS)]
    engine = reference_engine(pool)
    slots = torch.arange(PAGES * PAGE) + PAGE
    for layer in range(LAYERS):
        engine.pages_written(layer, slots)
    # Request 1 has two complete pages; what is not in one of them may differ, and so may rows of padding.
    step = (slots.expand(4, -1), torch.tensor([1, 3, 0]), torch.tensor([2 * PAGE + 5, 7, PAGES * PAGE]), 2)
    told = {}
    for what in ("nothing", "tokens", "means"):
        agreement = Agreement(engine, 2, peers)
        agreement.selected(0, SETS + rank)
        agreement.forget()
        engine.stats.means[2][4:] = float(rank)
        for number in range(4):
            parts = rank == 1 and number == 2
            agreement.selected(1, changed(0, 0, 501) if parts and what == "tokens" else SETS)
            if parts and what == "means":
                engine.stats.means[2][2].view(torch.uint8)[7] ^= 1
            try:
                agreement.step(*step)
            except RanksDisagree as error:
                told[what] = (number, str(error))
                break
    return told, recorder.ranks_compared


def test_all_ranks_say_which_layers_parted(tmp_path: Path) -> None:
    for told, compared in told_by_ranks(one_rank, tmp_path):
        assert {what: step for what, (step, _) in told.items()} == {"tokens": 3, "means": 3}
        assert "got other tokens in layers [1];" in told["tokens"][1]
        assert "got other page statistics in layers [2];" in told["means"][1]
        assert compared == 2 + 1 + 1
