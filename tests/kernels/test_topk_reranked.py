"""The work division of MISA†'s re-ranking: budget, coverage and the statistics of what a block lists (no GPU)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_misa.kernels import layout
from sglang_misa.kernels.prefill import plan as plans
from sglang_misa.kernels.prefill import topk_reranked as rerank
from sglang_misa.kernels.prefill.operands import Keys, Output, RoutedHeads, Rows

H100 = 132


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20000),
    keys=st.integers(1, rerank.KEYS),
    others=st.sampled_from([0, 1, 1000, 1 << 20, 1 << 23, 1 << 26]),
    candidates=st.sampled_from([512, 2048, 8192, 12000, layout.MAX_CANDIDATES]),
    heads=st.sampled_from(layout.ROUTED_HEADS),
)
def test_plan_fits_its_budget_and_what_a_block_lists(
    rows: int, keys: int, others: int, candidates: int, heads: int
) -> None:
    block_rows = plans.block_rows(heads)
    p = rerank.plan(rows, keys, candidates, block_rows, H100, total=keys + others)
    assert p.scores_offset <= plans.SCRATCH_BYTES
    assert p.rows % block_rows == 0
    # thresholds, spans, and then marks or sampled scores lie side by side
    assert p.spans_offset >= plans.THRESHOLD_BYTES * p.rows
    assert p.division_offset - p.spans_offset >= 8 * p.rows
    bulk = p.scores_offset - p.marks_offset
    every = -(-(keys + others) // plans.TILE) * plans.TILE // rerank.MARKED_KEYS
    assert bulk >= ((p.rows // rerank.MARKED_ROWS - 1) * p.pitch + every) * rerank.MARK_BYTES
    assert bulk >= 4 * p.rows * p.sampled
    assert p.scale_offset - p.sample_offset >= layout.HEAD_DIM * (keys + others) / p.stride
    assert (p.sampled - 1) * p.stride >= keys
    assert p.sampled <= plans.SAMPLED_AT_MOST + 4
    assert candidates <= p.rank * p.stride <= p.room <= rerank.listable(1)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 700)), min_size=1, max_size=40))
def test_marks_of_four_rows_overlap_with_those_of_no_others(requests: list[tuple[int, int]]) -> None:
    """Of rows (count, keys that they see) whose keys lie one behind another; all rows of a block may mark a tile's."""
    windows, first = [], 0
    for count, seen in requests:
        windows += [(first, first + seen)] * count
        first += seen
    longest, (rows, keys) = max(seen for _, seen in requests), (len(windows), rerank.MARKED_KEYS)
    p = rerank.plan(rows, longest, 512, 64, H100, total=first)
    used: dict[int, int] = {}
    for group in range(0, rows, rerank.MARKED_ROWS):
        for start, end in windows[group : group + rerank.MARKED_ROWS]:
            for product in range(start // plans.TILE * 2, -(-end // plans.TILE) * 2):
                whole = start // keys <= product < -(-end // keys)
                at = group // rerank.MARKED_ROWS * p.pitch + product
                assert used.setdefault(at, group) == group or not whole, "marks of others"
                assert (at + 1) * rerank.MARK_BYTES <= p.scores_offset - p.marks_offset


@pytest.mark.parametrize("keys", [1 << 15, 1 << 17])
@pytest.mark.parametrize("candidates", [2048, 8192, layout.MAX_CANDIDATES])
def test_marks_of_keys_in_random_order_are_enough_and_can_be_listed(candidates: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(candidates)
    p = rerank.plan(8192, keys, candidates, plans.block_rows(8), H100)
    for _ in range(50):
        scores = torch.rand(keys, generator=generator)
        threshold = scores[p.stride // 2 :: p.stride].topk(p.rank).values[-1]
        assert candidates <= (scores >= threshold).sum() <= p.room


def test_two_blocks_share_a_multiprocessor_at_the_released_size() -> None:
    assert rerank.plan(8192, 131072, 8192, plans.block_rows(8), H100).room == rerank.listable(2)


def test_the_longest_window_is_bounded_and_not_the_keys_of_a_call() -> None:
    many = rerank.KEYS + 1
    rows = Rows(
        torch.zeros(1, 64, 128, dtype=torch.uint8), torch.zeros(1, 64), torch.zeros(1).int(), torch.zeros(1).int()
    )
    keys = Keys(torch.empty(many, 0), torch.empty(many, 0))
    output, heads = Output(torch.zeros(1, 512).int()), RoutedHeads(torch.zeros(1, 8).int())
    with pytest.raises(ValueError, match=f"at most {rerank.KEYS} keys, got {many}"):
        rerank.topk_reranked(rows, keys, heads, 512, output)
    with pytest.raises(ValueError, match="index_q: expected"):  # further on: it is on no GPU
        rerank.topk_reranked(rows, keys, heads, 512, output, longest=rerank.KEYS)


def test_refusals_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="raise it"):
        rerank.plan(8192, 131072, 8192, 64, H100, budget=1 << 20)
    with pytest.raises(ValueError, match="got h=8, H=48"):
        rerank.module(8, 48)
    with pytest.raises(ValueError, match="got h=64, H=32"):
        rerank.module(64, 32)
