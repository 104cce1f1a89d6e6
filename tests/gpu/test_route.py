"""Routing and block scores at full size: 8192 rows on a 128K prefix, odd shapes, hostile gates, chunks and graphs."""

from __future__ import annotations

import pytest
import torch
from oracles import ints
from torch import Tensor

from sglang_misa import reference
from sglang_misa.bench.inputs import FP8
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, ROUTERS, Router
from sglang_misa.kernels.page_means import update_page_means
from sglang_misa.kernels.prefill.block_means import block_means
from sglang_misa.kernels.prefill.route import Blocks, block_scores, route

DEVICE = "cuda"
ROWS, LENGTH, BLOCK, HEADS = 8192, 131072, 256, 8
BLOCKS = LENGTH // BLOCK
ORACLE_ROWS = 256
INF, NAN = torch.inf, torch.nan
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # index_q, head_gates, block means, row_batch, row_lens


def operands(call: Call, block_size: int) -> tuple[Tensor, Tensor, Blocks]:
    index_q, gates, pooled, batch, lens = call
    return index_q, gates, Blocks(pooled, block_size, batch, lens)


def rows_of(rows: int, heads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator(DEVICE).manual_seed(seed)
    index_q = torch.randn(rows, heads, HEAD_DIM, device=DEVICE, generator=g).to(FP8)
    return index_q, torch.randn(rows, heads, device=DEVICE, generator=g)


def one_request(heads: int) -> Call:
    """The last 8192 rows of 128K tokens."""
    g = torch.Generator(DEVICE).manual_seed(1)
    pooled = (0.2 + 0.1 * torch.randn(1, BLOCKS, HEAD_DIM, device=DEVICE, generator=g)).bfloat16()
    lens = torch.arange(LENGTH - ROWS + 1, LENGTH + 1)
    return *rows_of(ROWS, heads), pooled, ints([0] * ROWS, DEVICE), ints(lens, DEVICE)


def three_requests(heads: int) -> Call:
    """Three unequal requests that meet inside a tile, the last ones short; NaN in blocks that are not complete."""
    index_q, gates, one, _, _ = one_request(heads)
    pooled = torch.full((3, BLOCKS, HEAD_DIM), NAN, dtype=torch.bfloat16, device=DEVICE)
    pooled[0], pooled[1, :5], pooled[2, :3] = one[0], one[0, 5:10], one[0, 8:11]
    batch = [0] * (ROWS - 191) + [1] * 90 + [2] * 101
    lens = [*range(LENGTH - ROWS + 192, LENGTH + 1), *range(5 * BLOCK - 89, 5 * BLOCK + 1), *range(768, 869)]
    return index_q, gates, pooled, ints(batch, DEVICE), ints(lens, DEVICE)


CALLS = {"one request": one_request, "three requests": three_requests}
full_size = pytest.mark.parametrize(
    ("calls", "index_heads"), [(name, h) for name in CALLS for h in (64, 32)], ids=lambda x: str(x)
)


def assert_heads(call: Call, heads: int, block_size: int, router: Router) -> None:
    """The kernel first, then the reference: h ascending heads, and the best h but for near ties."""
    index_q, gates, pooled, batch, lens = call
    head_ids = route(*operands(call, block_size), heads, router, residual=router == "error").head_ids
    assert head_ids.shape == (len(lens), heads)
    assert (head_ids[:, 1:] > head_ids[:, :-1]).all(), "heads do not ascend"
    assert ((head_ids >= 0) & (head_ids < gates.shape[1])).all(), "no head"
    for request in batch.unique().tolist():
        for part in (batch == request).nonzero()[:, 0].split(ORACLE_ROWS):
            complete = (lens[part] // block_size).clamp(max=pooled.shape[1])
            statistic = reference.block_statistics(
                index_q[part][None],
                gates[part][None],
                pooled[request][None].float(),
                complete[None],
                reference.RouterView(router),
            ).heads
            wanted = reference.top_heads(statistic, heads)[0]
            ranked = torch.nan_to_num(statistic[0], nan=-INF, posinf=INF, neginf=reference.LOWEST)
            best, chosen = (ranked.gather(1, ids.long()).sort().values for ids in (wanted, head_ids[part]))
            torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-5)
            same = (wanted == head_ids[part]).all(1).float().mean()
            assert same > 0.99 or len(part) < 100, f"{1 - same:.1%} of rows route to other heads than the reference"


@pytest.mark.parametrize("index_heads", [32, 64])
@pytest.mark.parametrize("max_blocks", [0, 1, 2, 127, 128, 129, 511, 640, 641, 1281, 4096])
def test_any_number_of_blocks_rows_and_heads(max_blocks: int, index_heads: int) -> None:
    """Few and many blocks, odd rows, rows without a block, requests of any length in any order, every h."""
    random = torch.Generator().manual_seed(max_blocks)
    lengths = [max_blocks * PAGE + 5, 0, max_blocks // 2 * PAGE, min(3, max_blocks) * PAGE + PAGE - 1]
    pooled = torch.randn(len(lengths), max_blocks, HEAD_DIM, generator=random).bfloat16().to(DEVICE)
    for request, length in enumerate(lengths):
        pooled[request, length // PAGE :] = NAN
    for rows in (1, 2, 63, 301):
        index_q, gates = rows_of(rows, index_heads, seed=rows)
        mixed = torch.randint(len(lengths), (rows,), generator=random)
        for batch in (torch.zeros(rows, dtype=torch.int64), mixed.sort().values, mixed):
            lens = (torch.rand(rows, generator=random) * (torch.tensor(lengths)[batch] + 1)).long()
            lens[0] = lengths[batch[0]]
            call = index_q, gates, pooled, ints(batch, DEVICE), ints(lens, DEVICE)
            cases: list[tuple[int, Router]] = [(8, "mean"), (7, "peak"), (1, "signed"), (31, "mean"), (7, "weight")]
            cases += [(3, "error")]
            for heads, router in [*cases, (index_heads, "mean")]:
                assert_heads(call, heads, PAGE, router)


def hostile_gates() -> tuple[Tensor, Tensor]:
    """Gates [6, 64] and the four heads of each row by |w| or w alike."""
    gates = torch.ones(6, 64, device=DEVICE)
    gates[1] = 0.0
    gates[1, ::2] = -0.0
    gates[2] = NAN
    gates[2, 50:56] = -1.0
    gates[3, :60] = NAN
    gates[3, 60:] = torch.tensor([-INF, INF, -3e38, 0.0])
    gates[4] = -INF
    gates[4, :62] = NAN
    gates[5] = torch.arange(64)
    tied, last = [0, 1, 2, 3], [60, 61, 62, 63]
    return gates, ints([tied, tied, [50, 51, 52, 53], last, [0, 1, 62, 63], last], DEVICE)


def ones(rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of ones, two blocks of ones, and every row's request."""
    pooled = torch.ones(1, 2, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    return torch.ones(rows, 64, HEAD_DIM, device=DEVICE).to(FP8), pooled, ints([0] * rows, DEVICE)


@pytest.mark.parametrize("router", ["mean", "peak", "signed"])
def test_nan_loses_to_every_number_and_ties_go_to_the_lower_head(router: Router) -> None:
    (index_q, pooled, batch), (gates, expected) = ones(), hostile_gates()
    call = index_q, gates, pooled, batch, ints([128] * 6, DEVICE)
    assert torch.equal(route(*operands(call, PAGE), 4, router).head_ids, expected)


@pytest.mark.parametrize("length", [64, 63, 0])
def test_the_same_by_weight_where_there_is_no_block(length: int) -> None:
    (index_q, pooled, batch), (gates, expected) = ones(), hostile_gates()
    call = index_q, gates.abs(), pooled, batch, ints([length] * 6, DEVICE)
    assert torch.equal(route(*operands(call, PAGE), 4).head_ids, expected)


def test_a_nan_query_loses() -> None:
    """ReLU of a NaN is 0, whose statistic loses to the others."""
    queries, pooled, batch = ones()
    queries = queries.float()
    queries[:, 40] = NAN
    gates = torch.ones(6, 64, device=DEVICE)
    call = queries.to(FP8), gates, pooled, batch, ints([128] * 6, DEVICE)
    got = route(*operands(call, PAGE), 63).head_ids
    assert torch.equal(got, ints([[j for j in range(64) if j != 40]] * 6, DEVICE))


@full_size
def test_full_size(calls: str, index_heads: int) -> None:
    call = CALLS[calls](index_heads)
    for router in ROUTERS:
        assert_heads(call, HEADS, BLOCK, router)
    index_q, gates, pooled, batch, lens = call
    scores = block_scores(*operands(call, BLOCK))
    for start in range(0, ROWS, ORACLE_ROWS):
        part = slice(start, start + ORACLE_ROWS)
        q, w, blocks = index_q[part].float(), gates[part, :, None], lens[part, None] // BLOCK
        x = torch.einsum("thd,tmd->thm", q, pooled[batch[part]].float()).relu()
        live = torch.arange(pooled.shape[1], device=DEVICE) < blocks
        x = x.where(live[:, None], 0.0)  # blocks that are not complete hold NaN
        torch.testing.assert_close(scores[part], (w * x).sum(1).where(live, -INF), rtol=1e-3, atol=2e-2)


@full_size
def test_one_call_is_its_chunks_its_rows_and_its_repeats_to_the_bit(calls: str, index_heads: int) -> None:
    """Across the launches for few rows and for many."""
    index_q, gates, pooled, batch, lens = CALLS[calls](index_heads)

    def results(rows: slice) -> dict[str, Tensor]:
        part = operands((index_q[rows], gates[rows], pooled, batch[rows], lens[rows]), BLOCK)
        heads = {f"{h} heads": route(*part, h).head_ids for h in (HEADS, 1, 31)}
        return {**heads, "block scores": block_scores(*part)}

    whole = results(slice(0, ROWS))
    for size in (4097, 1023, 777):
        for start in range(0, ROWS, size):
            for name, part in results(slice(start, start + size)).items():
                assert torch.equal(part, whole[name][start : start + size]), f"{name}: {size} rows from {start}"
    for row in range(0, ROWS, 67):
        for name, part in results(slice(row, row + 1)).items():
            assert torch.equal(part, whole[name][row : row + 1]), f"{name} of row {row} depend on the rows beside"
    for _ in range(20):
        for name, again in results(slice(0, ROWS)).items():
            assert torch.equal(again, whole[name]), f"{name}: repeat differs"


@pytest.mark.parametrize("index_heads", [64, 32])
def test_a_graph_follows_lengths_that_change_between_replays(index_heads: int, prefix: tuple[Tensor, Tensor]) -> None:
    """Captured means, routing and block scores of 64 requests."""
    pool, table = prefix
    rows = 64
    tables, lens, batch = table.expand(rows, -1).contiguous(), ints([1] * rows, DEVICE), ints(range(rows), DEVICE)
    means = torch.zeros(len(pool), HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    index_q, gates = rows_of(rows, index_heads)

    def step() -> tuple[Tensor, Tensor]:
        update_page_means(pool, means, tables, lens)
        call = operands((index_q, gates, block_means(means, tables, lens, BLOCK), batch, lens), BLOCK)
        return route(*call, HEADS).head_ids, block_scores(*call)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in (torch.randint(1, LENGTH + 1, (rows,)), torch.full((rows,), LENGTH), torch.ones(rows)):
        lens.copy_(lengths)
        graph.replay()
        for one, other in zip(captured, step(), strict=True):
            assert torch.equal(one, other), "replay differs from an eager call"


@full_size
@pytest.mark.parametrize("router", ["mean", "peak", "error"])
def test_the_residual_is_the_references_but_for_a_rounding(calls: str, index_heads: int, router: Router) -> None:
    call = CALLS[calls](index_heads)
    index_q, gates, pooled, batch, lens = call
    routed = route(*operands(call, BLOCK), 7, router, residual=True)
    head_ids, residual = routed.head_ids, routed.residual
    assert residual is not None
    if router != "error":
        assert torch.equal(head_ids, route(*operands(call, BLOCK), 7, router).head_ids)
    for rows in torch.arange(ROWS, device=DEVICE)[::61].split(64):
        complete = (lens[rows] // BLOCK).clamp(max=pooled.shape[1])
        of_row = pooled[batch[rows].long()].float()
        one_row_each = index_q[rows][:, None], gates[rows][:, None]  # N = rows, T = 1
        statistics = reference.block_statistics(*one_row_each, of_row, complete[:, None], reference.RouterView(router))
        query, scale = reference.residual_query(*one_row_each, head_ids[rows][:, None].long(), statistics.positive)
        torch.testing.assert_close(residual.scale[rows], scale[:, 0], rtol=2**-7, atol=0)
        got = residual.query[rows].float() * residual.scale[rows, None]
        want = query[:, 0] * scale
        step = want.abs() / 8 + scale * 2**-6  # from one fp8 number to the next
        assert ((got - want).abs() <= step).all(), "further than one fp8 number from the reference"
        assert (residual.query[rows].float() == query[:, 0]).float().mean() > 0.95


def test_a_broken_head_leaves_the_residual_of_the_others() -> None:
    """NaN and infinite gates and queries add nothing; where nothing is left, the query is 0 and its scale 1."""
    queries, pooled, batch = ones(3)
    gates = torch.ones(3, 64, device=DEVICE)
    gates[0, 10], gates[0, 11] = NAN, INF
    gates[2] = NAN
    values = queries.float()
    values[1, 20] = NAN
    call = values.to(FP8), gates, pooled, batch, ints([128] * 3, DEVICE)
    residual = route(*operands(call, PAGE), 7, residual=True).residual
    assert residual is not None
    left = residual.query.float() * residual.scale[:, None]
    assert torch.isfinite(left).all()
    assert (left[:2] > 0).all()
    assert (left[2] == 0).all()
    assert residual.scale[2] == 1
