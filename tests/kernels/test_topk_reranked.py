"""The work division of MISA†'s re-ranking: budget, coverage and the statistics of what a block lists (no GPU)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_misa.kernels import layout
from sglang_misa.kernels.prefill import plan as plans
from sglang_misa.kernels.prefill import topk_reranked as rerank

H100 = 132


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20000),
    keys=st.integers(1, rerank.KEYS),
    candidates=st.sampled_from([512, 2048, 8192, 12000, layout.MAX_CANDIDATES]),
    heads=st.sampled_from(layout.ROUTED_HEADS),
)
def test_plan_fits_its_budget_and_what_a_block_lists(rows: int, keys: int, candidates: int, heads: int) -> None:
    block_rows = plans.block_rows(heads)
    p = rerank.plan(rows, keys, candidates, block_rows, H100)
    assert p.scores_offset <= plans.SCRATCH_BYTES
    assert p.rows % block_rows == 0
    # thresholds, spans, and then marks or sampled scores lie side by side
    assert p.spans_offset >= plans.THRESHOLD_BYTES * p.rows
    assert p.division_offset - p.spans_offset >= 8 * p.rows
    bulk = p.scores_offset - p.marks_offset
    assert bulk >= p.rows // 4 * -(-keys // rerank.MARKED_KEYS) * rerank.MARK_BYTES
    assert bulk >= 4 * p.rows * p.sampled
    assert (p.sampled - 1) * p.stride >= keys
    assert p.sampled <= plans.SAMPLED_AT_MOST + 4
    assert candidates <= p.rank * p.stride <= p.room <= rerank.listable(1)


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


def test_refusals_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="raise it"):
        rerank.plan(8192, 131072, 8192, 64, H100, budget=1 << 20)
    with pytest.raises(ValueError, match="got h=8, H=48"):
        rerank.module(8, 48)
    with pytest.raises(ValueError, match="got h=64, H=32"):
        rerank.module(64, 32)
