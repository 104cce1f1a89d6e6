"""MISA's top k in prefill at full size: the kernel's own scores bit for bit, and fp32 within what tensor cores lose."""

from __future__ import annotations

import re

import pytest
import torch
from oracles import (
    HOSTILE_INTEGERS,
    IS_NAN,
    LOWEST,
    OUTSIDE,
    PRECISION,
    Extend,
    assert_filled,
    extend,
    hostile_integers,
    ints,
    requests,
)
from torch import Tensor

from sglang_misa.bench import inputs
from sglang_misa.kernels.prefill import plan as plans
from sglang_misa.kernels.prefill import topk_routed as kernel
from sglang_misa.kernels.prefill import workspace
from sglang_misa.kernels.prefill.operands import Output

DEVICE, K = "cuda", 2048
CHUNK = 512  # rows that are compared at once
SIZES = [(r, s) for r in (1, 15, 16, 17, 130, 512) for s in (1, 63, 64, 65, 2047, 2048, 2049, 5000)]
LARGE = [(1, 131072), (17, 131072), (512, 131072)]
REQUESTS = {
    "of every length": [(1, 1), (5, 40), (100, 3000), (40, 20000), (3, 3), (64, 2048), (61, 2049)],
    "1 beside 128K": [(1, 1), (30, 131072), (1, 1)],
    "the end of a long prompt beside short ones": [(32, 131072), (300, 2500), (300, 1500), (5, 3)],
}


def make(
    rows: int, keys: int, columns: int = 8, index_heads: int = 64, *, residual=False, seed=0, windows=None
) -> Extend:
    x = inputs.make("topics", rows, keys, index_heads, seed=seed)
    return extend(x, columns - residual, residual=residual, windows=windows, seed=seed)


def logits_of(x: Extend, rows: slice) -> Tensor:
    lo, hi, _ = rows.indices(x.rows)
    return kernel.routed_logits(*x.operands, lo, hi - lo)


def assert_logits(x: Extend) -> None:
    rows = slice(0, x.rows)
    got, inside = logits_of(x, rows), x.inside(rows)
    want = x.scores(rows, routed=True, precision=4 * PRECISION)  # the products of many heads, added up
    assert (got[~inside] == -torch.inf).all(), "a score outside its window"
    assert ((got >= want.low) & (got <= want.high))[inside].all(), "a score that fp32 does not explain"


def select(x: Extend, k: int = K, longest: int | None = None, **place: Tensor) -> Tensor:
    out = torch.full((x.rows, k), -7, dtype=torch.int32, device=DEVICE)
    kernel.topk_routed(*x.operands, Output(out, **place), longest=longest)
    return out


def assert_top_k(x: Extend, out: Tensor, k: int = K) -> None:
    """`out` are positions: the top k of the kernel's own scores as a multiset, and none clearly below the fp32 cut."""
    assert_filled(out, x.lens.clamp(max=k))
    assert (out < x.lens[:, None]).all(), "a position out of the window"
    for lo in range(0, x.rows, CHUNK):
        rows = slice(lo, min(lo + CHUNK, x.rows))
        chosen, inside = out[rows].long(), x.inside(rows)
        valid = chosen >= 0
        width = min(k, x.keys)
        absolute = (chosen + x.ks[rows, None]).clamp(0, x.keys - 1)
        ranks = logits_of(x, rows).double().clamp(LOWEST, -LOWEST).nan_to_num(nan=IS_NAN)
        ranks = ranks.masked_fill(~inside, OUTSIDE)
        want = ranks.topk(width, 1).values
        got = ranks.gather(1, absolute).masked_fill(~valid, OUTSIDE).sort(1, descending=True).values[:, :width]
        bad = (got != want).any(1).nonzero()[:4, 0] + lo
        assert torch.equal(got, want), f"rows {bad.tolist()}…: not the top {k} of the kernel's own scores"
        scores = x.scores(rows, routed=True)
        cut = scores.low.topk(width, 1).values[:, -1:]
        below = (scores.high.gather(1, absolute) < cut) & valid & (x.lens[rows, None] > k)
        assert not below.any(), f"rows {lo}…: {int(below.sum())} chosen keys are clearly below the fp32 cut"


@pytest.mark.parametrize(("rows", "keys"), SIZES + LARGE)
def test_any_size(rows: int, keys: int) -> None:
    x = make(rows, keys, seed=rows * 7 + keys)
    assert_logits(x)
    assert_top_k(x, select(x))


@pytest.mark.parametrize("residual", [False, True], ids=["heads", "residual"])
@pytest.mark.parametrize("columns", [4, 8, 16, 32, 64])
def test_any_number_of_columns(columns: int, residual: bool) -> None:
    x = make(200, 9000, columns, residual=residual, seed=columns)
    assert_logits(x)
    assert_top_k(x, select(x))
    x = make(100, 131072, columns, residual=residual, seed=columns)
    assert_top_k(x, select(x))


def test_32_index_heads() -> None:
    x = make(100, 9000, index_heads=32, seed=3)
    assert_top_k(x, select(x))


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_share_a_call(name: str) -> None:
    windows, rows, keys = requests(REQUESTS[name])
    x = make(rows, keys, windows=windows, seed=11)
    assert_logits(x)
    assert_top_k(x, select(x))
    assert_top_k(x, select(x, longest=int(x.lens.max())))


@pytest.mark.parametrize("k", [64, 512, 8192, 16384])
def test_any_k(k: int) -> None:
    x = make(150, 40000, seed=21)
    assert_top_k(x, select(x, k), k)


def test_many_rows_of_uneven_requests() -> None:
    x = make(700, 70000, seed=22)
    assert_top_k(x, select(x))
    windows, rows, keys = requests([(50, 7000), (20, 30000), (100, 100)])
    x = make(rows, keys, windows=windows, seed=13)
    assert_top_k(x, select(x))


def test_slots_and_offsets_name_the_positions_also_beside_padding_rows() -> None:
    windows, rows, keys = requests([(50, 7000), (20, 3000)], padding=5)
    x = make(rows, keys, windows=windows, seed=12)
    plain = select(x)
    assert_top_k(x, plain)
    offsets = ints(torch.arange(rows) * 10, DEVICE)
    shifted = torch.where(plain >= 0, plain + offsets[:, None], -1)
    assert torch.equal(select(x, offsets=offsets).sort(1).values, shifted.sort(1).values)
    table = torch.randperm(2 * 110, device=DEVICE).int().view(2, 110)
    batch = ints([0] * 50 + [1] * 20, DEVICE)
    position = plain.clamp(min=0).long()
    slots = torch.where(plain >= 0, table[batch.long()].gather(1, position // 64) * 64 + position % 64, -1)
    assert torch.equal(select(x, page_table=table, row_batch=batch).sort(1).values, slots.sort(1).values)


@pytest.mark.parametrize("residual", [False, True], ids=["heads", "residual"])
@pytest.mark.parametrize("name", HOSTILE_INTEGERS)
def test_hostile_rows_get_their_stable_top_k(name: str, residual: bool) -> None:
    """Exact scores: the same set as a stable sort, the smaller position first among equals, NaN last."""
    x = hostile_integers(name, residual=residual)
    out = select(x, 512)
    assert_filled(out, x.lens.clamp(max=512))
    for row in range(x.rows):
        want = x.exact_scores(row, routed=True).sort(descending=True, stable=True).indices[:512].sort().values
        assert torch.equal(out[row].long().sort().values, want), f"row {row}"


@pytest.mark.parametrize("name", inputs.names())
def test_inputs_that_are_hostile_to_the_sample(name: str) -> None:
    for residual in (False, True):
        x = extend(inputs.make(f"hostile:{name}", 70, 20000, 64, seed=1), 8 - residual, residual=residual, seed=1)
        assert_top_k(x, select(x))


def test_twenty_runs_give_one_set() -> None:
    x = make(300, 50000, seed=23)
    first = select(x).sort(1).values
    for _ in range(19):
        assert torch.equal(select(x).sort(1).values, first)


def test_full_size() -> None:
    x = make(8192, 131072, seed=24)
    assert_top_k(x, select(x))


def counted(run: kernel.RoutedCall, rows: int) -> Tensor:
    """Hits [rows, runs, buffers] of the last pass, whose rows these are; -1 where a buffer overflowed."""
    plan, base, block = run.plan, run.lists, plans.block_rows(run.heads.columns)

    def words(offset: int, count: int) -> Tensor:
        return run.scratch[base + offset :][: 4 * count].view(torch.int32)

    table = words(plan.division_offset, -(-rows // block) + 2).long()
    share, before = table[0], table[1:]
    first = before[:-1] // share
    runs = torch.where(before[1:] > before[:-1], (before[1:] - 1) // share - first + 1, 0)
    assert int(runs.max()) <= plan.runs, "more runs than the plan has room for"
    first, runs = (x.repeat_interleave(block)[:rows, None] for x in (first, runs))
    run_id = torch.arange(max(int(runs.max()), 1), device=DEVICE)
    places = torch.arange(rows, device=DEVICE)[:, None] + (first + run_id) * block
    held = plan.rows + plan.workers * block
    counts = words(plan.counts_offset, 2 * held * plan.buffers).view(held, plan.buffers, 2)[..., 1]
    return counts[places.clamp(max=held - 1)].where((run_id < runs)[..., None], 0)


@pytest.mark.parametrize(("rows", "keys", "seed"), [(130, 5000, 130 * 7 + 5000), (500, 60000, 2)])
def test_each_stage_does_its_part(rows: int, keys: int, seed: int) -> None:
    """The sample, the thresholds and the collected hits of one pass, against the kernel's own scores."""
    x = make(rows, keys, seed=seed)
    run = kernel.RoutedCall(*x.operands, Output(torch.empty(rows, K, dtype=torch.int32, device=DEVICE)))
    plan = run.plan
    assert rows <= plan.rows, "one pass"

    def floats(offset: int, count: int) -> Tensor:
        return run.scratch[run.lists + offset :][: 4 * count].view(torch.float32)

    run.scratch.fill_(0xFF)
    plain = logits_of(x, slice(0, rows))
    run.run(workspace.SAMPLE_STAGE)
    count = -(-keys // plan.stride)
    scales = floats(plan.scale_offset, count)
    padded = torch.nn.functional.pad(x.k_scale, (0, count * plan.stride - keys), value=-1).view(count, -1)
    is_it = padded == scales[:, None]
    assert (is_it.sum(1) == 1).all(), "a sampled key does not stand for its own part of the keys"
    positions = is_it.int().argmax(1) + torch.arange(count, device=DEVICE) * plan.stride
    want = plain[:, positions]
    got = floats(plan.bulk_offset, rows * plan.sampled).view(rows, plan.sampled)[:, :count]
    assert ((got == want) | (want == -torch.inf)).all(), "sampled scores differ from the plain path"

    run.run(workspace.THRESHOLD_STAGE)
    words = floats(0, rows * plans.THRESHOLD_BYTES // 4).view(rows, -1)  # above, tied, end
    above, tied, end = words[:, :1], words[:, 1:2], words[:, 2:].contiguous().view(torch.int32)

    def passes(scores: Tensor, key: Tensor) -> Tensor:
        return (scores > above) & ~((scores == tied) & (key >= end))

    passed = passes(want, positions).sum(1)
    met = (passed >= plan.rank) & (passed <= plan.rank + plan.rank // 8)  # the rank is met within 1/8
    assert met.all(), f"expected {plan.rank}… of the sample to pass, got {passed.min().item()} to {passed.max().item()}"
    run.run(workspace.COLLECT_STAGE)
    hits = passes(plain, torch.arange(keys, device=DEVICE)).sum(1)
    found = counted(run, rows).flatten(1)
    assert (found >= 0).all(), "a buffer overflowed"
    assert torch.equal(found.sum(1), hits), "other hits than the scores that pass"


REPEATING = [name for name in inputs.names() if re.match("period|mixed|distinct|one-key|zero", name)]


@pytest.mark.parametrize("name", REPEATING)
def test_no_period_and_no_ties_make_rows_slow(name: str) -> None:
    x = extend(inputs.make(f"hostile:{name}", 512, 65536, 64, seed=2), 8, seed=2)
    before = workspace.slow_rows(x.ks.device).item()
    select(x)
    assert workspace.slow_rows(x.ks.device).item() - before <= x.rows // 100
