"""Decode on pages: the kernels against a plain fp32 oracle that works on one row of logical keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from oracles import Paged, assert_best, assert_block_filter
from paged_rows import PRECISION, make
from torch import Tensor

from sglang_misa.kernels.decode.keep_blocks import SHORT_ROW, KeepTuning
from sglang_misa.kernels.decode.operands import Chosen
from sglang_misa.kernels.decode.topk_blocks import Cut, DecodeScratch, ScoreTuning, decode_topk
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE

EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049)


@dataclass(frozen=True)
class Result:
    slots: Tensor
    positions: Tensor
    scratch: DecodeScratch

    def row(self, row: int) -> Tensor:
        """Positions taken in a row, checked for holes, order and padding."""
        taken = self.positions[row]
        count = int((taken >= 0).sum())
        assert (taken[:count] >= 0).all()
        assert (taken[count:] == -1).all()
        assert (self.slots[row, count:] == -1).all()
        assert (taken[:count].diff() > 0).all()
        return taken[:count].long()


def run(
    batch: Paged,
    *,
    blocks: int,
    block_size: int = 128,
    k: int = 256,
    scratch: DecodeScratch | None = None,
    cut: Cut | None = None,
) -> Result:
    rows, width = batch.page_table.shape
    scratch = scratch or DecodeScratch.allocate(rows, width, blocks, block_size, batch.index_k_pages.device)
    out = torch.empty(rows, k, dtype=torch.int32, device=batch.index_k_pages.device)
    positions = torch.empty_like(out)
    decode_topk(batch.operands, batch.page_means, scratch=scratch, out=Chosen(out, positions), cut=cut or Cut())
    return Result(out, positions, scratch)


def check_row(batch: Paged, result: Result, row: int, blocks: int, block_size: int, k: int) -> None:
    assert result.positions.shape[1] == k
    found = result.scratch.kept, result.slots[row], result.positions[row]
    assert_block_filter(batch, row, *found, blocks=blocks, block_size=block_size, precision=PRECISION)


@pytest.mark.parametrize(
    ("heads", "blocks", "block_size", "k"),
    [(32, 4, 128, 256), (64, 3, 256, 512), (64, 9, 64, 100), (32, 2, 128, 256), (32, 4, 192, 300)],
)
def test_rows_of_every_length_match_the_oracle(device: str, heads: int, blocks: int, block_size: int, k: int) -> None:
    batch = make(EDGES, heads=heads, width=40, device=device)
    result = run(batch, blocks=blocks, block_size=block_size, k=k)
    for row in range(len(EDGES)):
        check_row(batch, result, row, blocks, block_size, k)


@pytest.mark.parametrize(
    ("keep", "score"),
    [
        (KeepTuning(pages=16), ScoreTuning(pages=1)),
        (KeepTuning(pages=128), ScoreTuning(pages=4)),
    ],
)
def test_the_cut_of_a_launch_changes_nothing(device: str, keep: KeepTuning, score: ScoreTuning) -> None:
    batch = make((2049, 700, 64), device=device)
    expected = run(batch, blocks=5)
    result = run(batch, blocks=5, cut=Cut(keep, score))
    assert torch.equal(result.positions, expected.positions)
    assert torch.equal(result.slots, expected.slots)


def test_blocks_for_all_is_dsa_and_few_tokens_are_all_taken(device: str) -> None:
    lens = (0, 1, 255, 256, 257, 511, 639, 640, 767)
    batch = make(lens, device=device)
    result = run(batch, blocks=5)  # 5 · 128 + 127 tokens: every row is kept whole
    for row, length in enumerate(lens):
        everything = torch.arange(length, device=device)
        taken = result.row(row)
        if length <= 256:
            assert torch.equal(taken, everything)
        else:
            assert_best(taken, everything, batch.scores(row, PRECISION), 256)


def test_physical_pages_and_stale_entries_do_not_matter(device: str) -> None:
    batch = make((1500, 900, 129), device=device)
    expected = run(batch, blocks=4)
    order = torch.randperm(len(batch.index_k_pages), generator=torch.Generator().manual_seed(5)).to(device)
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order), device=device)
    used = torch.arange(batch.page_table.shape[1], device=device) < -(-batch.seq_lens[:, None] // PAGE)
    table = torch.where(used, moved[batch.page_table.clamp(0, len(order) - 1).long()].int(), -12345)
    result = run(
        replace(batch, index_k_pages=batch.index_k_pages[order], page_means=batch.page_means[order], page_table=table),
        blocks=4,
    )
    assert torch.equal(result.positions, expected.positions)


def test_equal_scores_take_the_oldest_blocks_and_tokens(device: str) -> None:
    batch = make((1409,), device=device)
    batch = replace(batch, head_gates=torch.zeros_like(batch.head_gates))
    result = run(batch, blocks=4)
    assert result.scratch.kept.blocks[0].tolist() == [0, 1, 2, 10, 11]
    assert torch.equal(result.row(0), torch.arange(256, device=device))


@pytest.mark.parametrize("gate", [float("nan"), float("inf"), -float("inf")])
def test_broken_gates_leave_no_holes(device: str, gate: float) -> None:
    batch = make((1409, 700, 256, 65), device=device)
    batch.head_gates[:, 0] = gate
    result = run(batch, blocks=4)
    again = run(batch, blocks=4)
    for row, length in enumerate(batch.seq_lens.tolist()):
        assert len(result.row(row)) == min(256, length)
    assert torch.equal(result.slots, again.slots)


def test_a_nan_score_wins_only_what_no_number_wants(device: str) -> None:
    batch = make((640,), device=device)
    scales = batch.index_k_pages[:, PAGE * DIM :].view(torch.float32)
    page = int(batch.page_table[0, 1])
    scales[page] = float("nan")
    taken = run(batch, blocks=6).row(0)
    assert not torch.isin(taken, torch.arange(64, 128, device=device)).any()
    everything = run(batch, blocks=6, k=600).row(0)
    assert_best(everything, torch.arange(640, device=device), batch.scores(0, PRECISION), 600)


def test_a_row_longer_than_the_short_path_equals_the_oracle(device: str) -> None:
    """Rows on both sides of the edge at which the choice of blocks takes other code."""
    lens = (SHORT_ROW * PAGE, SHORT_ROW * PAGE + 1, (SHORT_ROW + 1) * PAGE + 5, 700)
    batch = make(lens, device=device)
    result = run(batch, blocks=6, block_size=PAGE)
    for row in range(len(lens)):
        check_row(batch, result, row, 6, PAGE, 256)


def test_one_scratch_serves_every_step(device: str) -> None:
    """A row grows over page and block edges and shrinks again; nothing of the step before shows."""
    grown = make((1100, 1100), device=device)
    scratch = DecodeScratch.allocate(2, grown.page_table.shape[1], 4, 128, torch.device(device))
    for length in (126, 127, 128, 129, 639, 640, 641, 1023, 1024, 1025, 1, 704):
        means = grown.page_means.clone()
        batch = replace(grown, seq_lens=torch.tensor([length, max(1, length // 2)], dtype=torch.int32, device=device))
        for row in range(2):
            means[grown.page_table[row, int(batch.seq_lens[row]) // PAGE :].long()] = float("nan")
        result = run(replace(batch, page_means=means), blocks=4, scratch=scratch)
        for row in range(2):
            check_row(batch, result, row, 4, 128, 256)
        assert not scratch.kept.done.any()


def test_wrong_tensors_are_named(device: str) -> None:
    batch = make((300,), device=device)
    for name, wrong in (
        ("index_q", batch.index_q.float()),
        ("head_gates", batch.head_gates[:, ::2]),
        ("index_k_pages", batch.index_k_pages[:, :-1]),
        ("page_means", batch.page_means[1:]),
        ("page_table", batch.page_table.long()),
        ("seq_lens", batch.seq_lens[:0]),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got "):
            run(replace(batch, **{name: wrong}), blocks=4)


def test_too_few_blocks_for_k_is_refused(device: str) -> None:
    batch = make((300,), device=device)
    with pytest.raises(ValueError, match="change the number of blocks"):
        run(batch, blocks=2, k=512)
