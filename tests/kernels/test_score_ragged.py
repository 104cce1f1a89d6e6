"""The work division of the ragged scorer: budget, coverage and the statistics of its buffers (no GPU)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_misa.kernels import score_ragged as sr

H100 = 132


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9000),
    keys=st.integers(1, 1 << 20),
    k=st.sampled_from([64, 512, 2048, 8192]),
    heads=st.sampled_from(sr.ROUTED_HEADS),
    budget=st.sampled_from([64 << 20, sr.SCRATCH_BYTES]),
)
def test_plan_fits_its_budget_and_holds_a_pass(rows, keys, k, heads, budget):
    block_rows = sr.block_rows(heads)
    p = sr.plan(rows, keys, k, heads, H100, budget)
    assert p.bytes <= budget
    assert p.rows % block_rows == 0
    # thresholds, counts, and then entries or sampled scores lie side by side
    entries = p.rows * p.splits * p.buffers * p.capacity * 8
    assert p.bulk_offset + max(entries, 4 * p.rows * p.sampled) == p.bytes
    assert p.sampled * p.stride >= keys - p.stride // 2
    assert p.sampled <= sr.SAMPLED_AT_MOST + 4
    assert p.splits * p.buffers <= 512  # `select` reads one count a thread
    assert p.rows * p.splits * p.buffers * p.capacity < 2**32  # the scorer's offsets


def test_plan_fills_the_chip_at_full_size():
    block_rows = sr.block_rows(8)
    p = sr.plan(8192, 131072, 2048, 8, H100)
    blocks, pass_blocks = 8192 // block_rows, p.rows // block_rows
    full, rest = divmod(blocks, pass_blocks)
    waves = full * math.ceil(pass_blocks * p.splits / H100) + math.ceil(rest * p.splits / H100)
    assert blocks / H100 / (waves / p.splits) > 0.95


def test_plan_refuses_a_budget_that_holds_no_block():
    with pytest.raises(ValueError, match="raise it"):
        sr.plan(8192, 131072, 2048, 8, H100, budget=1 << 20)


@pytest.mark.parametrize("k", [512, 2048, 8192])
def test_thresholds_neither_starve_nor_overflow(k):
    """On scores in random order, hits above the sample's rank stay between k and the room, in every buffer too."""
    generator = torch.Generator().manual_seed(k)
    keys = 1 << 17
    p = sr.plan(8192, keys, k, 8, H100)
    for _ in range(50):
        scores = torch.rand(keys, generator=generator)
        threshold = scores[p.stride // 2 :: p.stride].topk(p.rank).values[-1]
        hits = (scores >= threshold).nonzero()[:, 0]
        assert k <= len(hits) <= p.room
        # warp and lane rows of the key in its product; tiles go round the splits
        sharing = 32 // p.buffers
        buffer = hits // sr.TILE % p.splits * p.buffers + hits % 64 // 16 * (8 // sharing) + hits % 8 // sharing
        assert torch.bincount(buffer).max() <= p.capacity


def test_inputs_are_refused_with_what_was_expected():
    rows, heads, keys = 3, 64, 100
    tensors = [
        torch.zeros(rows, heads, 128, dtype=torch.uint8),
        torch.zeros(rows, heads),
        torch.zeros(rows, 8, dtype=torch.int32),
        torch.zeros(keys, 128, dtype=torch.uint8),
        torch.zeros(keys),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
    ]
    with pytest.raises(ValueError, match=r"index_q: expected .* on a GPU, got .* on cpu"):
        sr.Problem(*tensors)
