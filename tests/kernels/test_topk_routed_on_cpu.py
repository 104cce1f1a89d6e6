"""`topk_routed` on the CPU (simt/), whole and by stages: shares of a scan, thresholds, selection; against numpy."""

import ctypes
import math

import numpy as np
import pytest
from exact_rows import THRESHOLD, TOPK, ExtendCase, scratch_of_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from on_cpu import COMPILER, aligned, call, ints
from sweeps import sweeps_of

from sglang_misa.kernels.prefill import plan as plans

SETTINGS = settings(deadline=None, max_examples=60)

pytestmark = COMPILER


WITH_RESIDUAL = (4, 8, 16)  # columns
LIBRARIES = [
    ("topk_routed", {"columns": 8, "residual": False}),
    *(("topk_routed", {"columns": columns, "residual": True}) for columns in WITH_RESIDUAL),
]


@pytest.fixture(scope="module")
def kernels(library) -> ctypes.CDLL:
    return library("topk_routed", columns=8, residual=False)


@pytest.fixture(scope="module", params=WITH_RESIDUAL, ids="{} columns".format)
def with_residual(request, library) -> tuple[ctypes.CDLL, int]:
    return library("topk_routed", columns=request.param, residual=True), request.param


def sampled_keys(kernels, keys: int, stride: int) -> np.ndarray:
    """The key that stands for each `stride` keys, of which it is one."""
    found = ints(np.full(-(-keys // stride), -1))
    kernels.sampled_keys(keys, stride, found.ctypes)
    assert (found // stride == np.arange(len(found))).all()
    assert (found < keys).all()
    return found


@st.composite
def windows(draw):
    """Windows [start, end) of the rows of several requests, keys one behind the other, and rows that see nothing."""
    starts, ends, first = [], [], 0
    for _ in range(draw(st.integers(1, 5))):
        rows, seen = draw(st.integers(1, 150)), draw(st.integers(0, 6000))
        starts += [first if seen else 0] * rows
        ends += [first + max(0, seen - t) for t in reversed(range(rows))] if seen else [0] * rows
        first += seen
    return ints(starts), ints(ends), max(first, 1)


@SETTINGS
@given(windows(), st.integers(1, 20), st.integers(2, 9), st.sampled_from([1, 8, 32]), st.booleans())
def test_workers_visit_every_tile_once(kernels, case, workers, runs, stride, divided):
    check_visits(kernels, case, workers, runs, stride, divided)


@pytest.mark.parametrize(("tiles", "whole"), [(9, True), (16, True), (24, False)])
def test_no_worker_begins_twice_where_that_is_as_fast(kernels, tiles, whole):
    """Eight workers for three row blocks: shares of one block are longer by 1, 2 and 3 tiles; 2 take as long."""
    rows, keys = 3 * kernels.block_rows(), tiles * plans.TILE
    case = ints(np.zeros(rows)), ints(np.arange(keys - rows + 1, keys + 1)), keys
    visits, counts = check_visits(kernels, case, 8, 2, 1, False)
    begun = [len(set(visits[worker, :count, 0].tolist())) for worker, count in enumerate(counts)]
    assert max(begun) == (1 if whole else 2)


def check_visits(kernels, case, workers, runs, stride, divided):
    """Each row block's tiles are visited once; returns (block, tile) by worker [workers, most, 2], and how many."""
    starts, ends, keys = case
    stride = 1 if divided else stride
    block_rows = kernels.block_rows()
    blocks = -(-len(starts) // block_rows)
    table = ints(np.full(2 * workers + blocks + 3, -7))
    hits, sigmas, rank, spare, room = 35.0, 6.5, 100.0, 4, 1 << 20
    if divided:
        rows = (starts, ends, len(starts), keys)
        call(kernels.divide_rows, *rows, TOPK, table, workers, runs, hits, sigmas, rank, spare, room)
    tiles = -(-keys // plans.TILE) * blocks + 1
    visits, counts = ints(np.full((workers, tiles, 2), -1)), ints(np.zeros(workers))
    division = table if divided else None
    call(kernels.walk, starts, ends, len(starts), keys, stride, division, workers, tiles, visits, counts)
    visitor = np.repeat(np.arange(workers), counts)
    visited = np.concatenate([visits[w, : counts[w]] for w in range(workers)])

    places = sampled_keys(kernels, keys, stride)

    def sampled(key):
        return int(np.searchsorted(places, key))

    for block in range(blocks):
        rows = slice(block * block_rows, (block + 1) * block_rows)
        seen = [(sampled(low), sampled(high)) for low, high in zip(starts[rows], ends[rows], strict=True) if high > low]
        seen = [window for window in seen if window[1] > window[0]]
        low, high = min((w[0] for w in seen), default=0), max((w[1] for w in seen), default=0)
        taken = divided and high - low <= TOPK  # whole: nothing is to be found there
        wanted = [] if taken else [*range(low // plans.TILE, -(-high // plans.TILE))]
        mine = visited[:, 0] == block
        assert sorted(visited[mine, 1].tolist()) == wanted
        if divided:
            found = ints([-1, -1])
            kernels.workers_of(ctypes.c_void_p(table.ctypes.data), block * block_rows, found.ctypes)
            assert sorted(set(visitor[mine].tolist())) == list(range(found[0], found[0] + found[1]))
            assert found[1] <= runs
    if divided:
        share, total = int(table[0]), len(visited)
        assert counts.tolist() == [min(share, max(0, total - w * share)) for w in range(workers)]
        held = table[2 + blocks + workers :]
        assert held[0] == 0
        of_block = np.bincount(visited[:, 0], minlength=blocks)
        for worker in range(workers):  # a buffer's entries follow from how much of which rows' keys the worker has
            expected = hits * sum(1 / of_block[block] for block, _ in visits[worker, : counts[worker]])
            wanted = expected + sigmas * math.sqrt(expected + expected**2 / rank) + spare
            assert wanted - 1 <= held[worker + 1] - held[worker] <= wanted + plans.SECTOR
    return visits, counts


def test_the_plans_tests_visit_tiles_as_the_kernels_do(kernels):
    assert [kernels.sweeps_of(tiles) for tiles in range(5000)] == [sweeps_of(tiles) for tiles in range(5000)]


@SETTINGS
@given(windows(), st.integers(1, 20), st.integers(2, 9))
def test_runs_count_their_hits_in_places_of_their_own(kernels, case, workers, runs):
    starts, ends, keys = case
    block_rows = kernels.block_rows()
    blocks = -(-len(starts) // block_rows)
    table = ints(np.full(2 * workers + blocks + 3, -7))
    rows = (starts, ends, len(starts), keys)
    call(kernels.divide_rows, *rows, TOPK, table, workers, runs, 35.0, 6.5, 100.0, 4, 1 << 20)
    taken = set()
    for row in range(len(starts)):
        found = ints([-1, -1])
        kernels.workers_of(ctypes.c_void_p(table.ctypes.data), row, found.ctypes)
        places = {row + worker * block_rows for worker in range(found[0], found[0] + found[1])}
        assert not places & taken
        assert max(places, default=0) < blocks * block_rows + workers * block_rows
        taken |= places


@SETTINGS
@given(
    st.integers(0, 500),
    st.integers(1, 60),
    st.sampled_from(["normal", "few values", "all equal", "zeros", "with NaN", "huge"]),
    st.integers(0, 1 << 30),
)
def test_thresholds_leave_a_little_more_than_the_rank_above(kernels, sampled, rank, kind, seed):
    random, stride, rows = np.random.default_rng(seed), 8, 3
    keys = max(sampled * stride, 1)
    scores = {
        "normal": lambda shape: random.normal(size=shape),
        "few values": lambda shape: random.integers(-3, 4, shape),
        "all equal": lambda shape: np.full(shape, 1.5),
        "zeros": lambda shape: np.maximum(random.normal(size=shape) - 1, 0),
        "with NaN": lambda shape: np.where(random.random(shape) < 0.3, np.nan, random.normal(size=shape)),
        "huge": lambda shape: random.normal(size=shape) * 10.0 ** random.integers(-30, 30, shape),
    }[kind]((rows, sampled))
    width = -(-sampled // 4) * 4 + 4
    sample = aligned(np.full((rows, width), 1e30), np.float32)
    sample[:, :sampled] = scores
    kept = sample[:, :sampled].copy()
    starts, ends = ints([0] * rows), ints([keys, keys, min(TOPK, keys)])  # the last row sees no more than k
    found, failed = np.full(rows, 7, THRESHOLD), ints([9])
    spans, table = np.zeros((rows, 2), np.uint32), ints(np.zeros(16 + rows))
    wide = (starts, ends, rows, keys, stride, sample, width, rank, TOPK, found, spans, table, failed)
    call(kernels.thresholds, *wide)

    assert failed[0] == 0
    assert found["above"][2] == math.inf
    places = sampled_keys(kernels, keys, stride)[:sampled]
    for row in range(2) if keys > TOPK else ():
        threshold, cut = found[row], -np.sort(-np.where(np.isnan(kept[row]), -np.inf, kept[row]))[rank - 1 : rank]
        if sampled <= rank or math.isinf(cut[0]):  # NaN stands there: nothing is below what is a number
            assert threshold["above"] == -math.inf
            continue
        passed = kept[row] > threshold["above"]
        if not np.isnan(threshold["tied"]):  # many share the cut: those before the key of this rank pass
            assert threshold["tied"] == cut[0]
            passed &= ~((kept[row] == threshold["tied"]) & (places >= threshold["end"]))
        assert rank <= passed.sum() <= rank + max(1, rank // 8)


def place(random, entries, buffers, capacity):
    """Entries (score bits, key) dealt out to buffers; [buffers] of (first, count), count -1 where one does not fit."""
    memory, counts, first = [], [], 0
    owner = random.integers(0, buffers, len(entries))
    for buffer in range(buffers):
        mine = [entry for entry, at in zip(entries, owner, strict=True) if at == buffer]
        counts.append((first, len(mine) if len(mine) <= capacity else -1))
        memory += (mine + [(0x7FFFFFFF, 0xDEAD)] * capacity)[:capacity]
        first += capacity
    return memory, counts


@SETTINGS
@given(
    st.integers(0, 700),
    st.sampled_from(["normal", "few values", "all equal", "infinite", "one huge", "negative"]),
    st.sampled_from([4, 16, 37]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([64, 24]),
    st.integers(0, 1 << 30),
)
def test_selection_is_the_exact_top_k_or_refused(kernels, length, kind, buffers, runs, paged, capacity, seed):
    random, start = np.random.default_rng(seed), int(seed % 3) * 5
    scores = {
        "normal": lambda: random.normal(size=length),
        "few values": lambda: random.integers(0, 4, length),
        "all equal": lambda: np.full(length, 2.0),
        "infinite": lambda: np.where(random.random(length) < 0.2, np.inf, random.normal(size=length)),
        "one huge": lambda: np.where(np.arange(length) == length // 2, 3e38, random.random(length)),
        "negative": lambda: -np.exp(random.normal(size=length)),
    }[kind]().astype(np.float32)
    wanted = random.integers(TOPK // 2, 260)
    threshold = np.float32(np.sort(scores)[-min(length, wanted)] - random.choice([0.0, 0.5]) if length else 0)
    hits = [(int(s.view(np.uint32)), start + i) for i, s in enumerate(scores) if s > threshold]
    memory, counts = place(random, hits, runs * buffers, capacity)
    block_rows = kernels.block_rows()
    laid = np.full((1 + 2 * block_rows * runs, buffers, 2), -1)  # of the row's runs, by workers 2 …
    laid = np.concatenate([laid, laid])
    laid[[(2 + run) * block_rows for run in range(runs)]] = np.reshape(counts, (runs, buffers, 2))
    room = 320
    out, failed = ints(np.full(TOPK, -7)), ints([0, -1])
    pages, offsets = ints(random.permutation(40)[:20]), ints([1000])
    division = ints([9, 18, 18 + 9 * runs])  # shares of 9 tiles; the row block has those of workers 2 …
    one = np.array([(threshold, np.nan, 0)], THRESHOLD)
    run = (ints([start]), ints([start + length]), 1, start + length, division, one)
    held = (aligned(memory, np.uint32), ints(laid), buffers)
    target = (out, TOPK, pages if paged else None, ints([0]), 20, None if paged else offsets)
    call(kernels.select_rows, *run, *held, *target, room, failed)

    fits = all(count >= 0 for _, count in counts)
    if failed[0]:
        assert failed[1] == 0
        assert not fits or len(hits) < TOPK or len(hits) + 1 > room
        return
    if length > TOPK:
        assert fits
        assert TOPK <= len(hits) <= room
    best = np.argsort(-scores, kind="stable")[:TOPK]
    slots = pages[best // 64] * 64 + best % 64 if paged else best + 1000
    assert sorted(out.tolist()) == sorted([*slots.tolist(), *[-1] * (TOPK - len(best))])


@pytest.mark.parametrize("many", [False, True], ids=["few hits", "many hits"])
@pytest.mark.parametrize("workers", [1, 3, 7])
def test_scored_collected_and_selected_rows_have_the_exact_top_k(kernels, many, workers, monkeypatch):
    monkeypatch.setattr(plans, "MANY", 0.0 if many else 1.0)
    case = ExtendCase(workers, all_heads=16)
    assert check_collected(kernels, case, 8, workers, many) <= case.rows // 10


@pytest.mark.parametrize("many", [False, True], ids=["few hits", "many hits"])
def test_the_residual_is_one_more_column_without_relu(with_residual, many, monkeypatch):
    loaded, columns = with_residual
    monkeypatch.setattr(plans, "MANY", 0.0 if many else 1.0)
    case = ExtendCase(columns, all_heads=32, columns=columns, residual=True)
    assert check_collected(loaded, case, columns, 3, many) <= case.rows // 10


def test_a_nan_key_wins_no_place_by_the_residual(with_residual, monkeypatch):
    monkeypatch.setattr(plans, "MANY", 1.0)
    loaded, columns = with_residual
    case = ExtendCase(columns + 1, all_heads=32, columns=columns, residual=True)
    case.spoil(every=50)
    assert check_collected(loaded, case, columns, 2, many=False) <= case.rows // 10


@pytest.mark.parametrize("at_once", [1, 7, 200])
def test_rows_that_cannot_be_selected_are_redone(kernels, at_once, monkeypatch):
    """`select` has room for hardly more than k: rows of each request fail. Some keys are NaN, and some scores tie."""
    monkeypatch.setattr(plans, "MANY", 1.0)
    requests = ((30, 700), (3, 100), (1, 97), (5, 96), (2, 2), (4, 333))
    case = ExtendCase(at_once, all_heads=16, requests=requests)
    case.spoiled[::37] = True
    case.keys_held[1][::37] = np.nan
    assert check_collected(kernels, case, 8, 3, many=False, room=128, at_once=at_once) > case.rows // 2


def check_collected(
    kernels: ctypes.CDLL,
    case: ExtendCase,
    columns: int,
    workers: int,
    many: bool,
    room: int | None = None,
    at_once: int = 5,
) -> int:
    """Check a call's rows, those that fail and are redone among them; returns how many do."""
    plans.plan.cache_clear()
    plan = plans.plan(case.rows, case.keys, TOPK, columns, workers)
    plans.plan.cache_clear()
    assert plan.buffers == (16 if many else 32)
    block_rows = kernels.block_rows()
    failed, out = ints(np.full(case.rows + 1, -1)), ints(np.full((case.rows, TOPK), -7))
    hits = (plan.buffers, plan.spare, plan.entries, room or plan.room)
    numbers = (plan.stride, plan.rank, TOPK, plan.workers, plan.runs, *hits)
    ld, ever = plans.aligned(case.longest, 4), np.zeros(1, np.int64)
    scratch = (
        aligned(np.full((case.rows, plan.sampled), np.nan), np.float32),
        plan.sampled,
        aligned(np.full((block_rows * plan.buffers * plan.entries, 2), 0x7FFFFFFF), np.uint32),
        ints(np.full((plan.rows + plan.workers * block_rows, plan.buffers, 2), -1)),
        ints(np.full(plan.rows // block_rows + 2 * plan.workers + 3, -7)),
        *scratch_of_sample(plan.rows, case.keys, plan.stride),
        aligned(np.full((at_once, ld), np.nan), np.float32),
        ld,
        at_once,
        ever,
    )
    call(kernels.topk_rows, *case.inputs, *case.windows, *numbers, *scratch, out, failed)

    case.check_rows(out, range(case.rows), lambda row: np.argsort(-case.routed(row), kind="stable")[:TOPK])
    assert ever[0] == failed[0]
    return int(failed[0])
