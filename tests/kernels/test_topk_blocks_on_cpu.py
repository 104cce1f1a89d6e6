"""Prefill's `topk_blocks` on the CPU (simt/), against numpy."""

import ctypes

import numpy as np
import pytest
from exact_rows import TOPK, ExtendCase
from on_cpu import COMPILER, aligned, call, ints

pytestmark = COMPILER
LIBRARIES = [("topk_blocks", {"index_heads": 32})]


@pytest.fixture(scope="module")
def blocks(library) -> ctypes.CDLL:
    return library("topk_blocks", index_heads=32)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("kept", [2, 5])
def test_tokens_of_kept_blocks_have_the_exact_top_k(blocks, kept, paged):
    """The first and the newest complete block and the tail stay; a block's NaN is the lowest score."""
    case, size, random = ExtendCase(kept, all_heads=32), 64, np.random.default_rng(kept)
    pooled = random.integers(-4, 5, (case.rows, case.keys // size)).astype(np.float32)
    pooled[random.random(pooled.shape) < 0.1] = np.nan
    (q, gates), (k, scale) = case.queries, case.keys_held
    out, table = ints(np.full((case.rows, TOPK), -7)), ints(random.permutation(64)[:40])
    room = (kept + 1) * size
    place = (table, ints(np.zeros(case.rows)), 40) if paged else (None, None, 0)
    scores = (aligned(pooled, np.float32), pooled.shape[1], size, kept, room)
    call(blocks.select_rows, q, gates, k, scale, *case.windows, *scores, out, TOPK, *place)

    def best(row):
        length = case.ends[row] - case.starts[row]
        complete = max(length // size, 0)
        among = np.where(np.isnan(pooled[row, :complete]), -np.inf, pooled[row, :complete])
        among[[0, -1] if complete else []] = np.inf
        chosen = np.argsort(-among, kind="stable")[:kept]
        tokens = np.concatenate(
            [np.arange(size) + block * size for block in sorted(chosen)] + [np.arange(complete * size, length)]
        )
        if length <= TOPK:
            tokens = np.arange(length)
        tokens = tokens.astype(int)
        found = tokens[np.argsort(-case.scores(row, slice(None))[tokens], kind="stable")[:TOPK]]
        return table[found // 64] * 64 + found % 64 if paged else found

    case.check_rows(out, range(case.rows), best)
