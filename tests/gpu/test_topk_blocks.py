"""HISA's top k in prefill at full size, on exact scores: whole sets, ties included."""

from __future__ import annotations

import pytest
import torch
from oracles import OUTSIDE, Extend, assert_filled, extend, integers, requests, stable_best
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.prefill import topk_blocks as kernel
from sglang_misa.kernels.prefill.operands import Output

DEVICE = "cuda"
SIZES = [  # rows, keys, blocks, block size, k, index heads
    (5, 100, 4, 64, 128, 64),
    (70, 3000, 8, 128, 512, 64),
    (33, 9000, 16, 256, 2048, 64),
    (20, 20000, 64, 128, 2048, 64),
    (20, 20000, 64, 128, 2048, 32),
    (6, 140000, 128, 128, 2048, 64),
    (9, 9000, 2, 1024, 2048, 64),
    (9, 9000, 2, 2048, 2048, 64),
]


def assert_exact(x: Extend, block_scores: Tensor, blocks: int, size: int, k: int) -> None:
    """Positions of all rows: the stable top k by all heads of the best blocks' tokens and of the tail."""
    query_rows, keys, _ = x.operands
    out = torch.full((x.rows, k), -7, dtype=torch.int32, device=DEVICE)
    kernel.topk_blocks(query_rows, keys, block_scores, blocks, size, Output(out))
    assert_filled(out, x.lens.clamp(max=k))
    complete = x.lens // size
    kept = reference.keep_blocks(block_scores[None], complete[None], blocks)[0]
    for row in range(x.rows):
        position = torch.arange(int(x.lens[row]), device=DEVICE)
        tail = position >= complete[row] * size
        allowed = position[tail | kept[row, (position // size).clamp(max=kept.shape[1] - 1)]] + x.ks[row]
        full = torch.full((x.keys,), OUTSIDE, dtype=torch.float64, device=DEVICE)
        full[allowed] = x.exact_scores(row, routed=False)[allowed]
        want, got = stable_best(full, k) - x.ks[row], out[row][out[row] >= 0].long().sort().values
        assert torch.equal(got, want), f"row {row} of {x.rows}"


@pytest.mark.parametrize(("rows", "keys", "blocks", "size", "k", "index_heads"), SIZES)
def test_any_size_with_ties_and_broken_block_scores(
    rows: int, keys: int, blocks: int, size: int, k: int, index_heads: int
) -> None:
    g = torch.Generator(DEVICE).manual_seed(keys)
    block_scores = torch.randn(rows, keys // size + 1, device=DEVICE, generator=g)
    block_scores[::3] = block_scores[::3].round()
    block_scores[1::4, ::3] = torch.nan
    block_scores[2::5, ::2] = -torch.inf
    assert_exact(extend(integers(rows, keys, index_heads, seed=keys), 8), block_scores, blocks, size, k)


def test_requests_share_a_call() -> None:
    windows, rows, keys = requests([(3, 3), (20, 9000), (10, 70000), (20, 2100)])
    x = extend(integers(rows, keys, seed=4), 8, windows=windows)
    g = torch.Generator(DEVICE).manual_seed(1)
    assert_exact(x, torch.randn(rows, 600, device=DEVICE, generator=g), 20, 128, 2048)
