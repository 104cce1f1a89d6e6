"""The work division of the ragged scorer: budget, coverage and the statistics of its buffers (no GPU)."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import TURN, in_sweeps

from sglang_misa.kernels import layout
from sglang_misa.kernels.prefill import plan as plans
from sglang_misa.kernels.prefill.operands import Keys, RoutedHeads, Rows, inputs

H100 = 132


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9000),
    keys=st.integers(1, 1 << 20),
    k=st.sampled_from([64, 512, 2048, 8192]),
    heads=st.sampled_from(layout.ROUTED_HEADS),
    budget=st.sampled_from([64 << 20, plans.SCRATCH_BYTES]),
)
def test_plan_fits_its_budget_and_holds_a_pass(rows, keys, k, heads, budget):
    block_rows = plans.block_rows(heads)
    p = plans.plan(rows, keys, k, heads, H100, budget)
    assert p.rows % block_rows == 0
    # thresholds, the division, counts, and then entries or sampled scores lie side by side
    row_blocks = p.rows // block_rows
    assert p.division_offset >= plans.THRESHOLD_BYTES * p.rows
    assert p.counts_offset - p.division_offset >= 4 * (row_blocks + 2 * p.workers + 3)
    assert p.sample_offset - p.counts_offset >= 8 * (p.rows + p.workers * block_rows) * p.buffers
    sample_keys = -(-keys // p.stride)
    assert p.scale_offset - p.sample_offset >= 128 * sample_keys
    assert p.bulk_offset - p.scale_offset >= 4 * sample_keys
    entries = block_rows * p.buffers * p.entries
    assert p.bulk_offset + max(8 * entries, 4 * p.rows * p.sampled) <= budget
    assert (p.sampled - 1) * p.stride >= keys
    assert p.sampled <= plans.SAMPLED_AT_MOST + 4
    assert 2 * p.buffers <= p.runs * p.buffers <= plans.COUNTS
    assert p.entries % plans.SECTOR == 0
    assert entries < 2**32  # the scorer's offsets


def divide(tiles, plan):
    """What scheduler.cuh makes of row blocks: runs (row block, first, count) and a buffer's room of each worker."""
    before = np.concatenate([[0], np.cumsum(tiles)])
    share = max(-(-before[-1] // plan.workers), (max(tiles) - 1) // (plan.runs - 1) + 1)
    hits = plan.rank * plan.stride / plan.buffers
    for worker in range(plan.workers):
        at, last = worker * share, min((worker + 1) * share, before[-1])
        cuts = [(b, max(at, before[b]), min(last, before[b + 1])) for b in range(len(tiles))]
        runs = [(b, low - before[b], high - low) for b, low, high in cuts if high > low]
        expected = hits * sum(count / tiles[b] for b, _, count in runs)
        spread = math.sqrt(expected + expected**2 / plan.rank)
        room = int(expected + plans.BUFFER_SIGMAS[plan.buffers] * spread) + plan.spare + plans.SECTOR
        yield runs, room // plans.SECTOR * plans.SECTOR


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 1 << 17), min_size=1, max_size=128).filter(any),
    k=st.sampled_from([512, 2048]),
    heads=st.sampled_from([4, 8, 64]),
)
def test_division_of_any_lengths_covers_them_within_the_room(lengths, k, heads):
    block_rows = plans.block_rows(heads)
    p = plans.plan(len(lengths) * block_rows, max(lengths), k, heads, H100, budget=1 << 40)
    tiles = [-(-length // plans.TILE) for length in lengths]
    done, runs_of, held = [0] * len(tiles), [0] * len(tiles), 0
    for runs, room in divide(tiles, p):
        held += room
        for block, _, count in runs:
            done[block] += count
            runs_of[block] += 1
    assert done == tiles
    assert max(runs_of) <= p.runs
    assert held <= p.entries


def test_no_thread_block_waits_for_a_last_wave_at_full_size():
    p = plans.plan(8192, 32768, 2048, 8, H100)
    rows = plans.block_rows(8)
    tiles = [-(-(32768 - 8192 + (block + 1) * rows) // plans.TILE) for block in range(p.rows // rows)]
    shares = [sum(count for _, _, count in runs) for runs, _ in divide(tiles, p)]
    assert sum(tiles) / H100 / max(shares) > 0.98


def test_plan_refuses_a_budget_that_holds_no_block():
    with pytest.raises(ValueError, match="raise it"):
        plans.plan(8192, 131072, 2048, 8, H100, budget=1 << 20)


@pytest.mark.parametrize("k", [512, 2048, 8192])
def test_thresholds_neither_starve_nor_overflow(k):
    """On scores in random order, hits above the sample's rank stay between k and the room, in every buffer too."""
    generator = torch.Generator().manual_seed(k)
    keys, blocks = 1 << 17, 24  # of the row blocks of a pass, each with one row that counts here
    p = plans.plan(8192, keys, k, 8, H100)
    tiles = keys // plans.TILE
    visited = torch.from_numpy(in_sweeps(tiles))
    sharing = 32 // p.buffers
    filled = [[] for _ in range(blocks)]
    for row in filled:
        scores = torch.rand(keys, generator=generator)
        threshold = scores[p.stride // 2 :: p.stride].topk(p.rank).values[-1]
        hits = (scores >= threshold).nonzero()[:, 0]
        assert k <= len(hits) <= p.room
        # warp and lane rows of the key in its product
        buffer = hits % 64 // 16 * (8 // sharing) + hits % 8 // sharing
        of_tile = torch.zeros(tiles, p.buffers).index_put_((hits // plans.TILE, buffer), torch.ones(1), accumulate=True)
        row += of_tile[visited]
    for runs, room in divide([tiles] * (p.rows // plans.block_rows(8)), p):
        held = sum(
            torch.stack(filled[block][first : first + count]).sum(0) for block, first, count in runs if block < blocks
        )
        assert torch.as_tensor(held).max() <= room


def test_inputs_are_refused_with_what_was_expected():
    rows, heads, keys = 3, 64, 100
    windows = torch.zeros(2, rows, dtype=torch.int32)
    queries = Rows(torch.zeros(rows, heads, 128, dtype=torch.uint8), torch.zeros(rows, heads), *windows)
    pool = Keys(torch.zeros(keys, 128, dtype=torch.uint8), torch.zeros(keys))
    with pytest.raises(ValueError, match=r"index_q: expected .* on a GPU, got .* on cpu"):
        inputs(queries, pool, RoutedHeads(torch.zeros(rows, 8, dtype=torch.int32)))


def sampled_keys(keys: int, stride: int) -> np.ndarray:
    """As in Task::key, which the kernels' own tests hold to this property: one key in every `stride`, hashed."""
    first = np.arange(0, keys, stride)
    return first + np.random.default_rng(stride).integers(0, np.minimum(stride, keys - first))


def is_slow(scores: np.ndarray, plan: plans.Plan, shares, k: int) -> bool:
    """Whether a row of these scores, of many such rows, fails: by its threshold, or by a private buffer of a worker."""
    keys = np.arange(len(scores))
    sample = sampled_keys(len(scores), plan.stride)
    last = sample[np.argsort(-scores[sample], kind="stable")[plan.rank - 1]]
    passed = np.flatnonzero((scores > scores[last]) | ((scores == scores[last]) & (keys <= last)))
    if not k <= len(passed) <= plan.room:
        return True
    tiles = -(-len(scores) // plans.TILE)
    return any(most_held(passed, runs, lambda _: tiles, plan) > room for runs, room in shares)


def most_held(passed: np.ndarray, runs, tiles: Callable[[int], int], plan: plans.Plan) -> int:
    """Hits at the keys `passed` in the fullest private buffer of a worker; tiles: of a row block, by its number."""
    held, lane = np.zeros(plan.buffers, int), (passed % 64 // 16 * 8 + passed % 8) // (32 // plan.buffers)
    for block, first, count in runs:
        visit = np.argsort(in_sweeps(tiles(block)))[passed // plans.TILE]
        mine = (visit >= first) & (visit < first + count)
        left = count - (visit[mine] - first)
        np.add.at(held, (lane[mine] + (count - 1) // TURN - (left - 1) // TURN) % plan.buffers, 1)
    return held.max()


@pytest.mark.parametrize("length", [1 << 15, 1 << 16, 1 << 17])
@pytest.mark.parametrize("noise", [0.2, 0.7], ids=["clear period", "faint period"])
def test_no_period_of_the_keys_makes_rows_slow(length: int, noise: float) -> None:
    plan = plans.plan(8192, length, 2048, 8, H100)
    shares = list(divide([length // plans.TILE] * (plan.rows // plans.block_rows(8)), plan))[3:-1:11]
    random = np.random.default_rng(7)
    periods = [*range(2, 66, 3), 24, 32, 48, 64, 96, 100, 127, 128, 192, 256, 384, 511, 512]
    slow = 0
    for period in periods:
        line = random.normal(size=period)[np.arange(length) % period]
        slow += is_slow((1 - noise) ** 0.5 * line + noise**0.5 * random.normal(size=length), plan, shares, 2048)
    assert slow <= len(periods) // 100


@pytest.mark.parametrize("length", [1 << 15, 1 << 17])
@pytest.mark.parametrize("values", [1, 2, 64, 1000])
def test_ties_make_no_rows_slow(length: int, values: int) -> None:
    plan = plans.plan(8192, length, 2048, 8, H100)
    shares = list(divide([length // plans.TILE] * (plan.rows // plans.block_rows(8)), plan))[3:-1:11]
    random = np.random.default_rng(values)
    rows = {
        "in any order": random.integers(0, values, length),
        "in a period": np.arange(length) % values,
        "in runs": np.arange(length) * values // length,
        "zero but for a few": np.where(random.random(length) < 0.01, random.integers(0, values, length), 0),
    }
    assert [name for name, scores in rows.items() if is_slow(scores.astype(float), plan, shares, 2048)] == []


def overflowing(length: int, period: int, heads: int) -> set[int]:
    """Row blocks of a prompt's last 8192 rows with a full buffer, where each period-th key ties for the best."""
    plan, block_rows = plans.plan(8192, length, 2048, heads, H100), plans.block_rows(heads)
    tiles = [
        -(-min(length - 8192 + end, length) // plans.TILE) for end in range(block_rows, 8192 + block_rows, block_rows)
    ]
    best, sample = np.arange(period // 2, length, period), sampled_keys(length, plan.stride)
    passed = best[best <= sample[sample % period == period // 2][plan.rank - 1]]  # the first ones
    full = (runs for runs, room in divide(tiles, plan) if most_held(passed, runs, tiles.__getitem__, plan) > room)
    return {block for runs in full for block, _, _ in runs}


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("length", [88, 96, 104, 112, 120, 128, 136, 144, 160, 192, 256])
def test_keys_that_repeat_make_few_rows_slow(heads: int, length: int) -> None:
    """All hits are of one key, the first ones in order: in the first tiles of each sweep, and of few threads each.

    With 17 sweeps, and turns of eight tiles, a sixth of the row blocks were full at 128K, and nearly all at 144K.
    """
    full = {period: len(overflowing(length << 10, period, heads)) for period in (1, 2, 3, 4, 6, 8, 12, 16, 24)}
    assert sum(full.values()) <= 1, full
