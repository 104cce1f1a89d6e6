"""Checks page means, routing, block scores and re-scoring at full size on a GPU, then times them.

    python tests/gpu/check_route.py

Prefill of 8192 rows on a 128K prefix, blocks of 256, H = 64 and 32; every check comes before the first timing, and a
wrong result ends the run. Times are medians of CUDA events with a cold L2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_misa.bench.timing import event_us
from sglang_misa.kernels.page_means import update_last_page_means, update_page_means, update_slots
from sglang_misa.kernels.rerank import rerank, rerank_paged
from sglang_misa.kernels.route import block_scores, pool_blocks, route

DEVICE = "cuda"
PAGE, HEAD_DIM, PAGE_BYTES = 64, 128, 8448
ROWS, LENGTH, BLOCK, HEADS = 8192, 131072, 256, 8
PAGES = LENGTH // PAGE
CANDIDATES, CHECKED_ROWS, ORACLE_ROWS = 8192, 512, 256
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


def check_page_means(pool: torch.Tensor, table: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    means = torch.full((len(pool), HEAD_DIM), 7.0, dtype=torch.bfloat16, device=DEVICE)
    update_page_means(pool, means, table, ints([LENGTH]))
    expected = dense.view(PAGES, PAGE, HEAD_DIM).mean(1)
    torch.testing.assert_close(means[table[0]].float(), expected, rtol=2**-8, atol=1e-6)
    free = torch.ones(len(pool), dtype=torch.bool, device=DEVICE)
    free[table[0]] = False
    assert (means[free] == 7.0).all(), "a free page was written"

    decoded, stored = torch.zeros_like(means), torch.zeros_like(means)
    rows = torch.arange(1, PAGES + 1, device=DEVICE)
    update_last_page_means(pool, decoded, table.expand(PAGES, -1).contiguous(), ints(rows * PAGE))
    update_slots(pool, stored, (table[0].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten())
    for name, other in (("decode", decoded), ("slots", stored)):
        assert torch.equal(other[table[0]], means[table[0]]), f"{name}: other bits than the full pass"
    return means


def check_pooling(means: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pooled = pool_blocks(means, table, ints([LENGTH]), BLOCK)
    expected = means[table[0]].float().view(1, -1, BLOCK // PAGE, HEAD_DIM).mean(2)
    torch.testing.assert_close(pooled.float(), expected, rtol=2**-8, atol=1e-6)
    return pooled


def check_route(
    index_q: torch.Tensor, gates: torch.Tensor, pooled: torch.Tensor, batch: torch.Tensor, lens: torch.Tensor
) -> None:
    for router in ("abs", "signed", "weight"):
        head_ids, _ = route(index_q, gates, pooled, batch, lens, HEADS, BLOCK, router)
        head_ids_too, scores = route(index_q, gates, pooled, batch, lens, HEADS, BLOCK, router, True)
        assert torch.equal(head_ids, head_ids_too), "asking for block scores changed the heads"
        assert scores is not None
        assert torch.equal(scores, block_scores(index_q, gates, pooled, batch, lens, BLOCK)), "block scores differ"
        assert (head_ids[:, 1:] > head_ids[:, :-1]).all(), "heads do not ascend"
        for start in range(0, ROWS, ORACLE_ROWS):
            part = slice(start, start + ORACLE_ROWS)
            q, w, blocks = index_q[part].float(), gates[part, :, None], lens[part, None] // BLOCK
            x = torch.einsum("thd,tmd->thm", q, pooled[batch[part]].float()).relu()
            live = torch.arange(pooled.shape[1], device=DEVICE) < blocks
            x = x.where(live[:, None], 0.0)  # blocks that are not complete hold NaN
            torch.testing.assert_close(scores[part], (w * x).sum(1).where(live, -torch.inf), rtol=1e-3, atol=2e-2)
            if router == "weight":
                statistic = w[..., 0].abs()
            else:
                statistic = ((w * x).abs() if router == "abs" else w * x).sum(2) / blocks.clamp_min(1)
                statistic = statistic.where(blocks > 0, w[..., 0].abs())
            best = statistic.topk(HEADS).values
            chosen = statistic.gather(1, head_ids[part].long()).sort(descending=True).values
            torch.testing.assert_close(chosen, best, rtol=1e-4, atol=1e-5)


def check_order(
    index_q: torch.Tensor, gates: torch.Tensor, pooled: torch.Tensor, batch: torch.Tensor, lens: torch.Tensor
) -> None:
    """One call ≡ chunks of odd sizes ≡ its repeats, to the bit, across the launches for few and for many rows."""
    whole = route(index_q, gates, pooled, batch, lens, HEADS, BLOCK, "abs", True)
    for size in (4097, 1023, 777):
        for start in range(0, ROWS, size):
            c = slice(start, start + size)
            part = route(index_q[c], gates[c], pooled, batch[c], lens[c], HEADS, BLOCK, "abs", True)
            for name, one, all_rows in zip(("heads", "block scores"), part, whole, strict=True):
                assert torch.equal(one, all_rows[c]), f"{name} depend on the chunk ({size} rows from {start})"
    for _ in range(REPEATS):
        assert torch.equal(route(index_q, gates, pooled, batch, lens, HEADS, BLOCK)[0], whole[0]), "repeat differs"


def check_rerank(
    index_q: torch.Tensor, gates: torch.Tensor, pool: torch.Tensor, table: torch.Tensor
) -> Callable[[bool], object]:
    """Checks 512 rows; returns a call on all rows, contiguous or paged, to time."""
    rows = pool[table[0]]
    keys = rows[:, : PAGE * HEAD_DIM].contiguous().view(torch.float8_e4m3fn).view(-1, HEAD_DIM)
    scale = rows[:, PAGE * HEAD_DIM :].contiguous().view(torch.float32).flatten()
    ids = torch.empty(ROWS, CANDIDATES, dtype=torch.int32, device=DEVICE)
    for row in range(ROWS):
        ids[row] = torch.randperm(LENGTH, device=DEVICE)[:CANDIDATES].sort().values
    slots = table[0][ids // PAGE] * PAGE + ids % PAGE
    counts = torch.full((ROWS,), CANDIDATES, dtype=torch.int32, device=DEVICE)
    some = counts[:CHECKED_ROWS].clone()
    some[:9] = ints([0, 1, 63, 64, 65, 127, 128, 8191, 8192])
    n = CHECKED_ROWS
    ids[n - 1, :3] = ints([-1, -(2**31), 2**31 - 1])
    slots[n - 1, :3] = ids[n - 1, :3]
    got = rerank(index_q[:n], gates[:n], keys, scale, ids[:n], some)
    assert torch.equal(got, rerank_paged(index_q[:n], gates[:n], pool, slots[:n], some)), "paged differs"
    few = torch.cat([rerank(index_q[r : r + 1], gates[r : r + 1], keys, scale, ids[r : r + 1], some[r : r + 1])
                     for r in range(16)])  # fmt: skip
    assert torch.equal(got[:16], few), "scores depend on the rows beside"
    valid = (torch.arange(CANDIDATES, device=DEVICE) < some[:, None]) & (ids[:n] >= 0) & (ids[:n] < LENGTH)
    wanted = torch.full_like(got, -torch.inf)
    for row in range(n):
        safe = ids[row].where(valid[row], 0).long()
        x = (keys[safe].float() @ index_q[row].float().T).relu()
        wanted[row] = (x @ gates[row] * scale[safe]).where(valid[row], -torch.inf)
    # fp8 tensor cores keep about 14 bits while they accumulate; scores are around 100.
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0.5)
    x, y = got.where(valid, 0.0).double(), wanted.where(valid, 0.0).double()
    difference = 1 - 2 * (x * y).sum() / (x * x + y * y).sum()
    assert difference < 1e-5, f"scores differ from fp32 by {difference:.1e} of their energy"
    out = torch.empty(ROWS, CANDIDATES, device=DEVICE)
    return lambda paged: (
        rerank_paged(index_q, gates, pool, slots, counts, out)
        if paged
        else rerank(index_q, gates, keys, scale, ids, counts, out)
    )


def check_graph(pool: torch.Tensor, table: torch.Tensor, index_q: torch.Tensor, gates: torch.Tensor) -> None:
    """One captured decode step of 64 requests follows lengths that change between replays."""
    rows = 64
    tables, lens, batch = table.expand(rows, -1).contiguous(), ints([1] * rows), ints(range(rows))
    means = torch.zeros(len(pool), HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    update_page_means(pool, means, table, ints([LENGTH]))

    def step() -> tuple[torch.Tensor, torch.Tensor | None]:
        update_last_page_means(pool, means, tables, lens)
        pooled = pool_blocks(means, tables, lens, BLOCK)
        return route(index_q[:rows], gates[:rows], pooled, batch, lens, HEADS, BLOCK, "abs", True)

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
    means = check_page_means(pool, table, dense)
    pooled = check_pooling(means, table)
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
        ("update_page_means, 2048 pages", lambda: update_page_means(pool, means, table, ints_length), 0, LENGTH * 132),
        ("update_last_page_means, 64 rows", lambda: update_last_page_means(pool, means, table64, lens64), 0, 64 * 8448),
        ("update_slots, 8192 slots", lambda: update_slots(pool, means, slots), 0, 128 * 8448),
        ("pool_blocks, 512 blocks", lambda: pool_blocks(means, table, ints_length, BLOCK, pooled), 0, PAGES * 256),
    ]
    ints_length, lens64 = ints([LENGTH]), ints([LENGTH] * 64)
    table64 = table.expand(64, -1).contiguous()
    slots = (table[0, -128:].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()
    for heads in (64, 32):
        q, w = make_rows(heads)
        check_route(q, w, pooled, one_request, lens)
        check_route(q, w, ragged, ragged_batch, ragged_lens)
        check_order(q, w, pooled, one_request, lens)
        check_order(q, w, ragged, ragged_batch, ragged_lens)
        check_graph(pool, table, q, w)
        flops, key_flops = 2.0 * ROWS * heads * HEAD_DIM * LENGTH / BLOCK, 2.0 * ROWS * heads * HEAD_DIM * CANDIDATES
        again = check_rerank(q, w, pool, table)
        args = (q, w, pooled, one_request, lens)
        few = (q[:64], w[:64], pooled, one_request[:64], lens64)
        timed += [
            (f"route, H={heads}", lambda a=args: route(*a, HEADS, BLOCK), flops, 0),
            (f"route + block scores, H={heads}", lambda a=args: route(*a, HEADS, BLOCK, "abs", True), flops, 0),
            (f"block_scores, H={heads}", lambda a=args: block_scores(*a, BLOCK), flops, 0),
            (f"block_scores, 64 rows, H={heads}", lambda a=few: block_scores(*a, BLOCK), flops / ROWS * 64, 0),
            (f"route, 64 rows, H={heads}", lambda a=few: route(*a, HEADS, BLOCK), flops / ROWS * 64, 0),
            (f"rerank, C=8192, H={heads}", lambda f=again: f(False), key_flops, ROWS * CANDIDATES * 132),
            (f"rerank_paged, C=8192, H={heads}", lambda f=again: f(True), key_flops, ROWS * CANDIDATES * 132),
        ]
        print(f"H={heads}: correct", flush=True)
    print(f"{torch.cuda.get_device_name()}, T={ROWS}, L={LENGTH}, block {BLOCK}; GB/s of the rerank are through L2")
    for name, call, flops, nbytes in timed:
        us = event_us(call, TIMED, FLUSH_BYTES)
        print(f"{name:36} {us:9.1f} us {flops / us * 1e-6:8.1f} TFLOPS {nbytes / us * 1e-3:8.1f} GB/s")


if __name__ == "__main__":
    main()
