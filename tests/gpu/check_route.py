"""Checks page means, routing and block scores on a GPU, then times them.

    python tests/gpu/check_route.py

Hostile shapes and gates for the router; then prefill of 8192 rows on a 128K prefix, blocks of 256, H = 64 and 32. Every
check comes before the first timing, and a wrong result ends the run. Times are medians of CUDA events with a cold L2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_misa import reference
from sglang_misa.bench.timing import event_us
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_page_means, update_slots
from sglang_misa.kernels.prefill.route import ROUTERS, Router, block_scores, route

DEVICE = "cuda"
ROWS, LENGTH, BLOCK, HEADS = 8192, 131072, 256, 8
PAGES = LENGTH // PAGE
ORACLE_ROWS = 256
REPEATS, TIMED = 20, 20
FLUSH_BYTES = 1 << 30  # also keeps the GPU busy while the host launches the timed call


def make_pool() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool of twice the prefix with NaN in free pages; the prefix's shuffled table [1, PAGES]; its keys in fp32."""
    keys = torch.randn(PAGES, PAGE * HEAD_DIM, device=DEVICE).add_(0.2).to(torch.float8_e4m3fn)
    scales = torch.rand(PAGES, PAGE, device=DEVICE).add_(0.5)
    table = torch.randperm(2 * PAGES, device=DEVICE)[:PAGES]
    pool = torch.full((2 * PAGES, PAGE_BYTES), 0xFF, dtype=torch.uint8, device=DEVICE)
    pool[table] = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], 1)
    dense = keys.float().view(PAGES, PAGE, HEAD_DIM) * scales[:, :, None]
    return pool, table.to(torch.int32)[None], dense.view(-1, HEAD_DIM)


def make_rows(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    index_q = torch.randn(ROWS, heads, HEAD_DIM, device=DEVICE).to(torch.float8_e4m3fn)
    return index_q, torch.randn(ROWS, heads, device=DEVICE)


def ints(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def check_means(pool: torch.Tensor, table: torch.Tensor, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Page means and block means of the whole prefix, checked."""
    means = torch.full((len(pool), HEAD_DIM), 7.0, dtype=torch.bfloat16, device=DEVICE)
    pooled = update_page_means(pool, means, table, ints([LENGTH]), BLOCK)
    expected = dense.view(PAGES, PAGE, HEAD_DIM).mean(1)
    torch.testing.assert_close(means[table[0]].float(), expected, rtol=2**-8, atol=1e-6)
    free = torch.ones(len(pool), dtype=torch.bool, device=DEVICE)
    free[table[0]] = False
    assert (means[free] == 7.0).all(), "a free page was written"

    decoded, stored = torch.zeros_like(means), torch.zeros_like(means)
    rows = torch.arange(1, PAGES + 1, device=DEVICE)
    update_last_page_means(Layers.of([pool], [decoded]), table.expand(PAGES, -1).contiguous(), ints(rows * PAGE))
    update_slots(pool, stored, (table[0].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten())
    for name, other in (("decode", decoded), ("slots", stored)):
        assert torch.equal(other[table[0]], means[table[0]]), f"{name}: other bits than the full pass"
    blocks = means[table[0]].float().view(1, -1, BLOCK // PAGE, HEAD_DIM).mean(2)
    torch.testing.assert_close(pooled.float(), blocks, rtol=2**-8, atol=1e-6)
    return means, pooled


def check_heads(
    index_q: torch.Tensor,
    gates: torch.Tensor,
    pooled: torch.Tensor,
    batch: torch.Tensor,
    lens: torch.Tensor,
    heads: int,
    block_size: int,
    router: Router,
) -> None:
    """The kernel first, then the reference: h ascending heads, and the best h but for near ties."""
    head_ids = route(index_q, gates, pooled, batch, lens, heads, block_size, router)
    assert head_ids.shape == (len(lens), heads)
    assert (head_ids[:, 1:] > head_ids[:, :-1]).all(), "heads do not ascend"
    assert ((head_ids >= 0) & (head_ids < gates.shape[1])).all(), "no head"
    for request in batch.unique().tolist():
        for part in (batch == request).nonzero()[:, 0].split(ORACLE_ROWS):
            complete = (lens[part] // block_size).clamp(max=pooled.shape[1])
            statistics = reference.block_statistics(
                index_q[part][None], gates[part][None], pooled[request][None].float(), complete[None], router
            )
            wanted = reference.top_heads(statistics.heads, heads)[0]
            ranked = torch.nan_to_num(statistics.heads[0], nan=-torch.inf, posinf=torch.inf, neginf=reference.LOWEST)
            best, chosen = (ranked.gather(1, ids.long()).sort().values for ids in (wanted, head_ids[part]))
            torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-5)
            same = (wanted == head_ids[part]).all(1).float().mean()
            assert same > 0.99 or len(part) < 100, f"{1 - same:.1%} of rows route to other heads than the reference"


def check_shapes() -> None:
    """Few and many blocks, odd rows, rows without a block, requests of any length in any order, every h."""
    generator = torch.Generator().manual_seed(1)
    for index_heads in (32, 64):
        for max_blocks in (0, 1, 2, 127, 128, 129, 511, 640, 641, 1281, 4096):
            requests = 4
            lengths = [max_blocks * PAGE + 5, 0, max_blocks // 2 * PAGE, min(3, max_blocks) * PAGE + PAGE - 1]
            pooled = torch.randn(requests, max_blocks, HEAD_DIM, device=DEVICE).bfloat16()
            for request, length in enumerate(lengths):
                pooled[request, length // PAGE :] = torch.nan
            for rows in (1, 2, 63, 301):
                index_q = torch.randn(rows, index_heads, HEAD_DIM, device=DEVICE).to(torch.float8_e4m3fn)
                gates = torch.randn(rows, index_heads, device=DEVICE)
                one = torch.zeros(rows, dtype=torch.int64)
                mixed = torch.randint(requests, (rows,), generator=generator)
                for batch in (one, mixed.sort().values, mixed):
                    lens = (torch.rand(rows, generator=generator) * (torch.tensor(lengths)[batch] + 1)).long()
                    lens[0] = lengths[batch[0]]
                    for heads, router in ((8, "abs"), (1, "signed"), (31, "abs"), (7, "weight"), (index_heads, "abs")):
                        check_heads(index_q, gates, pooled, ints(batch), ints(lens), heads, PAGE, router)


def check_hostile() -> None:
    """A NaN statistic loses to every number, -inf included; ties and signed zeros go to the lower head."""
    inf, nan = torch.inf, torch.nan
    pooled = torch.ones(1, 2, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    gates = torch.ones(6, 64, device=DEVICE)
    gates[1] = 0.0
    gates[1, ::2] = -0.0
    gates[2] = nan
    gates[2, 50:56] = -1.0
    gates[3, :60] = nan
    gates[3, 60:] = torch.tensor([-inf, inf, -3e38, 0.0])
    gates[4] = -inf
    gates[4, :62] = nan
    gates[5] = torch.arange(64)
    expected = ints([[0, 1, 2, 3], [0, 1, 2, 3], [50, 51, 52, 53], [60, 61, 62, 63], [0, 1, 62, 63], [60, 61, 62, 63]])
    index_q = torch.ones(6, 64, HEAD_DIM, device=DEVICE).to(torch.float8_e4m3fn)
    routers: tuple[Router, ...] = ("abs", "signed")
    for router in routers:
        got = route(index_q, gates, pooled, ints([0] * 6), ints([128] * 6), 4, PAGE, router)
        assert torch.equal(got, expected), f"{router}: {got.tolist()}"
    for lens in ([64] * 6, [63] * 6, [0] * 6):  # the last two without a block
        got = route(index_q, gates.abs(), pooled, ints([0] * 6), ints(lens), 4, PAGE)
        assert torch.equal(got, expected), f"{lens[0]} tokens: {got.tolist()}"
    queries = torch.ones(6, 64, HEAD_DIM, device=DEVICE)
    queries[:, 40] = nan  # ReLU of a NaN is 0, whose statistic loses to the others
    index_q = queries.to(torch.float8_e4m3fn)
    got = route(index_q, gates[:1].expand(6, -1).contiguous(), pooled, ints([0] * 6), ints([128] * 6), 63, PAGE)
    assert torch.equal(got, ints([[j for j in range(64) if j != 40]] * 6)), "a NaN query"


def check_route(
    index_q: torch.Tensor, gates: torch.Tensor, pooled: torch.Tensor, batch: torch.Tensor, lens: torch.Tensor
) -> None:
    for router in ROUTERS:
        check_heads(index_q, gates, pooled, batch, lens, HEADS, BLOCK, router)
    scores = block_scores(index_q, gates, pooled, batch, lens, BLOCK)
    for start in range(0, ROWS, ORACLE_ROWS):
        part = slice(start, start + ORACLE_ROWS)
        q, w, blocks = index_q[part].float(), gates[part, :, None], lens[part, None] // BLOCK
        x = torch.einsum("thd,tmd->thm", q, pooled[batch[part]].float()).relu()
        live = torch.arange(pooled.shape[1], device=DEVICE) < blocks
        x = x.where(live[:, None], 0.0)  # blocks that are not complete hold NaN
        torch.testing.assert_close(scores[part], (w * x).sum(1).where(live, -torch.inf), rtol=1e-3, atol=2e-2)


def check_order(
    index_q: torch.Tensor, gates: torch.Tensor, pooled: torch.Tensor, batch: torch.Tensor, lens: torch.Tensor
) -> None:
    """One call ≡ chunks of odd sizes ≡ its repeats, to the bit, across the launches for few and for many rows."""

    def results(rows: slice) -> dict[str, torch.Tensor]:
        args = (index_q[rows], gates[rows], pooled, batch[rows], lens[rows])
        heads = {f"{h} heads": route(*args, h, BLOCK) for h in (HEADS, 1, 31)}
        return {**heads, "block scores": block_scores(*args, BLOCK)}

    whole = results(slice(0, ROWS))
    for size in (4097, 1023, 777):
        for start in range(0, ROWS, size):
            rows = slice(start, start + size)
            for name, part in results(rows).items():
                assert torch.equal(part, whole[name][rows]), f"{name} depend on the chunk ({size} rows from {start})"
    for start in range(0, ROWS, 67):
        rows = slice(start, start + 1)
        for name, part in results(rows).items():
            assert torch.equal(part, whole[name][rows]), f"{name} of row {start} depend on the rows beside"
    for _ in range(REPEATS):
        for name, again in results(slice(0, ROWS)).items():
            assert torch.equal(again, whole[name]), f"{name}: repeat differs"


def check_graph(pool: torch.Tensor, table: torch.Tensor, index_q: torch.Tensor, gates: torch.Tensor) -> None:
    """Captured means, routing and block scores of 64 requests follow lengths that change between replays."""
    rows = 64
    tables, lens, batch = table.expand(rows, -1).contiguous(), ints([1] * rows), ints(range(rows))
    means = torch.zeros(len(pool), HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        pooled = update_page_means(pool, means, tables, lens, BLOCK)
        args = (index_q[:rows], gates[:rows], pooled, batch, lens)
        return route(*args, HEADS, BLOCK), block_scores(*args, BLOCK)

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


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    pool, table, dense = make_pool()
    means, pooled = check_means(pool, table, dense)
    check_hostile()
    check_shapes()
    lens = ints(torch.arange(LENGTH - ROWS + 1, LENGTH + 1))
    one_request = ints([0] * ROWS)
    # Three unequal requests that meet inside a tile, the last ones short.
    ragged = torch.full((3, pooled.shape[1], HEAD_DIM), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    ragged[0], ragged[1, :5], ragged[2, :3] = pooled[0], pooled[0, 5:10], pooled[0, 8:11]
    ragged_batch = ints([0] * (ROWS - 191) + [1] * 90 + [2] * 101)
    ragged_lens = ints(
        [*range(LENGTH - ROWS + 192, LENGTH + 1), *range(5 * BLOCK - 89, 5 * BLOCK + 1), *range(768, 869)]
    )

    timed: list[tuple[str, Callable[[], object], float, float]] = [
        ("update_page_means, 2048 pages", lambda: update_page_means(*healed, ints_length, BLOCK), 0, LENGTH * 132),
        ("update_last_page_means, 64 rows", lambda: update_last_page_means(layers, table64, lens64), 0, 64 * 8448),
        ("update_slots, 8192 slots", lambda: update_slots(pool, means, slots), 0, 128 * 8448),
    ]
    healed = pool, means, table
    ints_length, lens64 = ints([LENGTH]), ints([LENGTH] * 64)
    table64 = table.expand(64, -1).contiguous()
    layers = Layers.of([pool], [means])
    slots = (table[0, -128:].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()
    for heads in (64, 32):
        q, w = make_rows(heads)
        check_route(q, w, pooled, one_request, lens)
        check_route(q, w, ragged, ragged_batch, ragged_lens)
        check_order(q, w, pooled, one_request, lens)
        check_order(q, w, ragged, ragged_batch, ragged_lens)
        check_graph(pool, table, q, w)
        flops = 2.0 * ROWS * heads * HEAD_DIM * LENGTH / BLOCK
        args = (q, w, pooled, one_request, lens)
        short = (q, w, pooled, one_request, lens - 3 * LENGTH // 4)
        few = (q[:64], w[:64], pooled, one_request[:64], lens64)
        timed += [
            (f"route, H={heads}", lambda a=args: route(*a, HEADS, BLOCK), flops, 0),
            (f"route, 128 blocks, H={heads}", lambda a=short: route(*a, HEADS, BLOCK), flops / 4, 0),
            (f"block_scores, H={heads}", lambda a=args: block_scores(*a, BLOCK), flops, 0),
            (f"block_scores, 64 rows, H={heads}", lambda a=few: block_scores(*a, BLOCK), flops / ROWS * 64, 0),
            (f"route, 64 rows, H={heads}", lambda a=few: route(*a, HEADS, BLOCK), flops / ROWS * 64, 0),
        ]
        print(f"H={heads}: correct", flush=True)
    print(f"{torch.cuda.get_device_name()}, T={ROWS}, L={LENGTH}, block {BLOCK}")
    for name, call, flops, nbytes in timed:
        us = event_us(call, TIMED, FLUSH_BYTES)
        print(f"{name:36} {us:9.1f} us {flops / us * 1e-6:8.1f} TFLOPS {nbytes / us * 1e-3:8.1f} GB/s")


if __name__ == "__main__":
    main()
