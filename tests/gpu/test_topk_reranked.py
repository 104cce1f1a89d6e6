"""MISA†'s top k in prefill at full size: whole sets on exact scores, and fp32 within what tensor cores lose."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    HOSTILE_INTEGERS,
    OUTSIDE,
    Extend,
    assert_filled,
    extend,
    hostile_integers,
    integers,
    ints,
    requests,
    stable_best,
)
from torch import Tensor

from sglang_misa.bench import inputs
from sglang_misa.bench.check import Scores, flaw
from sglang_misa.kernels.prefill import topk_reranked as kernel
from sglang_misa.kernels.prefill.operands import Output
from sglang_misa.kernels.prefill.plan import SCRATCH_BYTES

DEVICE, K, C = "cuda", 2048, 8192
SIZES = [  # rows, keys, candidates, k, index heads, scored columns
    (1, 1, 512, 128, 64, 8),
    (3, 700, 512, 128, 64, 8),
    (64, 3000, 1024, 256, 64, 8),
    (65, 9000, 4096, 2048, 64, 8),
    (130, 20000, 8192, 2048, 64, 8),
    (30, 8300, 8192, 2048, 64, 8),
    (9, 65540, 8192, 2048, 64, 8),
    (17, 70000, 8192, 2048, 64, 8),
    (17, 70000, 16384, 2048, 64, 8),
    (9, 140000, 8192, 2048, 64, 8),
    (40, 20000, 2048, 2048, 64, 8),
    (40, 20000, 8192, 2048, 64, 4),
    (40, 20000, 8192, 2048, 64, 16),
    (40, 20000, 8192, 2048, 64, 32),
    (40, 20000, 8192, 2048, 32, 8),
]
REQUESTS = [(1, 1), (5, 40), (20, 3000), (40, 20000), (3, 3), (30, 8192), (31, 8193), (4, 20000), (20, 8000)]


def select(
    x: Extend,
    candidates: int = C,
    k: int = K,
    longest: int | None = None,
    budget: int = SCRATCH_BYTES,
    **place: Tensor,
) -> Tensor:
    out = torch.full((x.rows, k), -7, dtype=torch.int32, device=DEVICE)
    kernel.topk_reranked(*x.operands, candidates, Output(out, **place), longest=longest, budget=budget)
    return out


def assert_exact(x: Extend, out: Tensor, candidates: int, k: int) -> None:
    """Positions of all rows: the stable top k by all heads of the stable top C by the routed ones."""
    assert_filled(out, x.lens.clamp(max=k))
    for row in range(x.rows):
        kept = stable_best(x.exact_scores(row, routed=True), candidates)
        full = torch.full((x.keys,), OUTSIDE, dtype=torch.float64, device=DEVICE)
        full[kept] = x.exact_scores(row, routed=False)[kept]
        want, got = stable_best(full, k) - x.ks[row], out[row][out[row] >= 0].long().sort().values
        missing = want[~torch.isin(want, got)]
        assert torch.equal(got, want), (
            f"row {row} of {x.rows}: {len(missing)} missing, the first {missing[:4].tolist()}"
        )


def assert_near(x: Extend, out: Tensor, rows: range) -> None:
    """Sampled rows against fp32, where a score may round either way: at the cut to C and at the k-th best."""
    for row in rows:
        only = slice(row, row + 1)
        inside = x.inside(only)[0]
        routed, full = (x.scores(only, routed=kind) for kind in (True, False))
        routed, full = Scores(routed.low[0], routed.high[0]), Scores(full.low[0], full.high[0])
        chosen = out[row][out[row] >= 0].long() + x.ks[row]
        problem = flaw(chosen, *routed.best(inside, C), full, K)
        assert problem is None, f"row {row}: {problem}"


@pytest.mark.parametrize("residual", [False, True], ids=["heads", "residual"])
@pytest.mark.parametrize(("rows", "keys", "candidates", "k", "index_heads", "columns"), SIZES)
def test_any_size(
    rows: int, keys: int, candidates: int, k: int, index_heads: int, columns: int, residual: bool
) -> None:
    seed = rows + keys
    x = extend(integers(rows, keys, index_heads, seed=seed), columns - residual, residual=residual, seed=seed)
    assert_exact(x, select(x, candidates, k), candidates, k)


@pytest.mark.parametrize("residual", [False, True], ids=["heads", "residual"])
@pytest.mark.parametrize("name", HOSTILE_INTEGERS)
def test_hostile_rows(name: str, residual: bool) -> None:
    x = hostile_integers(name, residual=residual)
    assert_exact(x, select(x, 2048, 512), 2048, 512)


@pytest.mark.parametrize("name", inputs.names())
def test_inputs_that_are_hostile_to_the_sample(name: str) -> None:
    for residual in (False, True):
        x = extend(inputs.make(f"hostile:{name}", 70, 20000, 64, seed=1), 8 - residual, residual=residual, seed=1)
        assert_near(x, select(x), range(0, 70, 7))


def test_requests_and_padding_rows_share_a_call() -> None:
    windows, rows, keys = requests(REQUESTS, padding=3)
    x = extend(integers(rows, keys, seed=8), 8, windows=windows, seed=8)
    plain = select(x, longest=int(x.lens.max()))
    assert_exact(x, plain, C, K)
    offsets = ints(torch.arange(rows) * 10, DEVICE)
    want = torch.where(plain >= 0, plain + offsets[:, None], -1)
    assert torch.equal(select(x, offsets=offsets).sort(1).values, want.sort(1).values)
    table = torch.randperm(2 * 320, device=DEVICE).int().view(2, 320)[:, :313]  # rows lie apart
    batch = ints([t % 2 for t in range(rows)], DEVICE)
    position = plain.clamp(min=0).long()
    want = torch.where(plain >= 0, table[batch.long()].gather(1, position // 64) * 64 + position % 64, -1)
    assert torch.equal(select(x, page_table=table, row_batch=batch).sort(1).values, want.sort(1).values)
    in_passes = select(x, longest=int(x.lens.max()), budget=2 << 20)
    assert torch.equal(in_passes.sort(1).values, plain.sort(1).values), "passes of few rows differ"


def test_twenty_runs_give_one_set() -> None:
    x = extend(inputs.make("topics", 300, 50000, 64, seed=23), 8, seed=23)
    first = select(x)
    assert_near(x, first, range(0, 300, 7))
    for _ in range(19):
        assert torch.equal(select(x).sort(1).values, first.sort(1).values)


def test_full_size() -> None:
    x = extend(inputs.make("topics", 8192, 131072, 64, seed=24), 8, seed=24)
    assert_near(x, select(x), range(0, 8192, 331))
