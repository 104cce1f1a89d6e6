"""One call of every operation in `ops`, on inputs where kernels and reference twins must agree to the last token.

Keys, queries and gates are small integers and short fractions, so that no order of summation rounds a score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import Extend, extend, integers, ints, requests
from torch import Tensor

from sglang_misa import ops
from sglang_misa.bench.inputs import pack_pages
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, ROUTERS, sketch_bytes

TOPK, SIZE = 96, 64
Found = tuple[Tensor, ...]


def rows(device: str, *, residual: bool = False) -> Extend:
    """New rows of three requests of 1500, 300 and 2 keys."""
    windows, count, keys = requests([(70, 1500), (40, 300), (2, 2)])
    return extend(integers(count, keys, 64, device=device), 8 - residual, residual=residual, windows=windows)


def pages(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(index_k_pages, page_table, seq_lens) of the same keys' lengths, on shuffled pages."""
    lens = [1500, 300, 2, 0, 640]
    used = [-(-length // PAGE) for length in lens]
    inputs = integers(1, sum(used) * PAGE, scales=1, device="cpu")
    order = torch.randperm(sum(used) + 1, generator=torch.Generator().manual_seed(2))
    pool = torch.full((sum(used) + 1, PAGE * (HEAD_DIM + 4)), 0x7F, dtype=torch.uint8)
    pool[order[: sum(used)]] = pack_pages(inputs.index_k, inputs.k_scale)
    table = torch.full((len(lens), max(used) + 1), 2**31 - 1, dtype=torch.int32)
    for row, own in enumerate(order[: sum(used)].split(used)):
        table[row, : len(own)] = own.int()
    return pool.to(device), table.to(device), ints(lens, device)


def page_statistics(backend: ops.Backend, device: str) -> Found:
    pool, table, lens = pages(device)
    found: list[Tensor] = []
    for bits in (1, 2):
        means = torch.zeros(len(pool), HEAD_DIM, dtype=torch.bfloat16, device=device)
        sketches = torch.zeros(len(pool), sketch_bytes(bits), dtype=torch.uint8, device=device)
        blocks = ops.page_statistics(pool, table, lens, 2 * PAGE, page_means=means, sketches=sketches, backend=backend)
        complete = torch.arange(blocks.shape[1], device=device) < (lens // (2 * PAGE))[:, None]
        found += [means, sketches, blocks[complete]]
    return tuple(found)


def _routing(device: str) -> tuple[Tensor, Tensor, ops.Blocks]:
    x = rows(device)
    means = integers(1, 3 * 24, scales=1, seed=3, device=device).index_k.view(3, 24, HEAD_DIM).to(torch.bfloat16)
    batch = ints([0] * 70 + [1] * 40 + [2] * 2, device)
    return x.index_q, x.head_gates, ops.Blocks(means, SIZE, batch, x.lens.int())


def route(backend: ops.Backend, device: str) -> Found:
    found: list[Tensor] = []
    for router in ROUTERS:
        routed = ops.route(*_routing(device), 7, router=router, backend=backend)
        assert routed.residual is not None
        found += [routed.head_ids, routed.residual.scale]
    return tuple(found)


def block_scores(backend: ops.Backend, device: str) -> Found:
    return (ops.block_scores(*_routing(device), backend=backend),)


def output(x: Extend) -> ops.Output:
    """Positions."""
    return ops.Output.empty(x.operands[0], TOPK)


def _slots(x: Extend) -> ops.Output:
    device = str(x.ks.device)
    table = torch.randperm(3 * 30, generator=torch.Generator().manual_seed(4)).int().view(3, 30)
    return ops.Output.empty(x.operands[0], TOPK, table.to(device), ints([0] * 70 + [1] * 40 + [2] * 2, device))


def topk_routed(backend: ops.Backend, device: str) -> Found:
    plain, mixed = rows(device), rows(device, residual=True)
    return (
        ops.topk_routed(*plain.operands, output(plain), backend=backend),
        ops.topk_routed(*mixed.operands, _slots(mixed), backend=backend),
    )


def topk_reranked(backend: ops.Backend, device: str) -> Found:
    plain, mixed = rows(device), rows(device, residual=True)
    return (
        ops.topk_reranked(*plain.operands, 256, output(plain), backend=backend),
        ops.topk_reranked(*mixed.operands, 256, _slots(mixed), backend=backend),
    )


def topk_blocks(backend: ops.Backend, device: str) -> Found:
    x = rows(device)
    scores = integers(len(x.ks), 24, device="cpu").k_scale.expand(len(x.ks), 24).contiguous().to(device)
    queries, keys, _ = x.operands
    places = output(x), _slots(x)
    return tuple(ops.topk_blocks(queries, keys, scores, 4, SIZE, place, backend=backend) for place in places)


def _decoding(device: str) -> tuple[ops.PagedRows, ops.PageSketch]:
    pool, table, lens = pages(device)
    x = integers(len(lens), 1, seed=7, device=device)
    means = torch.zeros(len(pool), HEAD_DIM, dtype=torch.bfloat16, device=device)
    sketches = torch.zeros(len(pool), sketch_bytes(2), dtype=torch.uint8, device=device)
    ops.page_statistics(pool, table, lens, PAGE, page_means=means, sketches=sketches, backend="reference")
    return ops.PagedRows(x.index_q, x.head_gates, pool, table, lens), ops.PageSketch(means, sketches)


def decode_topk_blocks(backend: ops.Backend, device: str) -> Found:
    queries, stats = _decoding(device)
    return (ops.decode_topk_blocks(queries, stats.means, 4, SIZE, TOPK, backend=backend),)


def decode_topk_sketched(backend: ops.Backend, device: str) -> Found:
    """Candidates for all: those of fewer are chosen by 16 bits of a score."""
    policy = ops.SketchPolicy(heads=8, router="peak", residual=False, candidates=1536)
    return (ops.decode_topk_sketched(*_decoding(device), policy, TOPK, backend=backend),)


ON_TRITON: tuple[Callable[[ops.Backend, str], Found], ...] = (
    page_statistics,
    block_scores,
    decode_topk_blocks,
    decode_topk_sketched,
)
CASES = (*ON_TRITON, route, topk_routed, topk_reranked, topk_blocks)


def assert_agree(case: Callable[[ops.Backend, str], Found], device: str) -> None:
    """Kernels first. Selections are compared as sets, for those of prefill come in no order."""
    got, wanted = case("kernels", device), case("reference", device)
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.dtype == other.dtype
        if case.__name__.startswith("topk"):
            one, other = one.sort(-1).values, other.sort(-1).values
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda m, n=number: f"result {n}: {m}")
        else:
            assert torch.equal(one, other), f"result {number}"
