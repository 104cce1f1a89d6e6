"""Reference twins of the operations in `ops`: the same arguments and results, in plain PyTorch on any device.

They write whole matrices of scores and read lengths on the host: for checks, and for sizes that a check has. What they
are given is checked as the kernels check it; they take any number of heads and candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_misa import reference, reference_pages
from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels.checks import expect, expect_block_size, expect_blocks, expect_heads, expect_router
from sglang_misa.kernels.decode.operands import PagedRows
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES, sketch_bits
from sglang_misa.kernels.prefill.operands import Keys, Output, Residual, RoutedHeads, Rows, inputs
from sglang_misa.kernels.prefill.route import Blocks


def page_statistics(
    index_k_pages: Tensor, page_table: Tensor, seq_lens: Tensor, block_size: int, means: Tensor, sketches: Tensor | None
) -> Tensor:
    """See `ops.page_statistics`; reads the lengths on the host."""
    count, device = len(index_k_pages), index_k_pages.device
    expect("index_k_pages", index_k_pages, (count, PAGE_BYTES), torch.uint8)
    expect("page_means", means, (count, HEAD_DIM), torch.bfloat16, device=device)
    expect("page_table", page_table, (None, None), torch.int32, row_stride=True, device=device)
    expect("seq_lens", seq_lens, (len(page_table),), torch.int32, device=device)
    expect_block_size(block_size)
    blocks = means.new_zeros(len(seq_lens), page_table.shape[1] * PAGE // block_size, HEAD_DIM)
    for request, length in enumerate(seq_lens.tolist()):
        ids = page_table[request, : length // PAGE].long()
        pages = index_k_pages[ids]
        means[ids] = reference_pages.page_means(pages).bfloat16()
        pooled = reference.block_means(means[ids].unsqueeze(0), block_size // PAGE)[0]
        blocks[request, : len(pooled)] = pooled.bfloat16()
        if sketches is not None:
            bits = sketch_bits(int(sketches.shape[1]))
            codes, scales = reference_pages.quantize_pages(pages, means[ids], bits)
            sketches[ids] = reference_pages.pack_sketches(codes, scales, bits)
    return blocks


def route(index_q: Tensor, head_gates: Tensor, blocks: Blocks, heads: int, router: Router) -> RoutedHeads:
    """See `ops.route`."""
    expect_heads(heads, head_gates.shape[1], residual=True)
    expect_router(router, routed=True, residual=True)
    found = _statistics(index_q, head_gates, blocks, router)
    head_ids = reference.top_heads(found.heads, heads)
    query, scale = reference.residual_query(index_q[None], head_gates[None], head_ids, found.positive)
    return RoutedHeads(head_ids[0].int(), Residual(query[0].to(torch.float8_e4m3fn), scale[0]))


def block_scores(index_q: Tensor, head_gates: Tensor, blocks: Blocks) -> Tensor:
    """See `ops.block_scores`."""
    return _statistics(index_q, head_gates, blocks, "mean").blocks[0]


def _statistics(index_q: Tensor, head_gates: Tensor, blocks: Blocks, router: Router) -> reference.BlockStatistics:
    """`reference.block_statistics` [1, T, …] of rows of several requests."""
    blocks.check(index_q, head_gates, cuda=False)
    gates, most = head_gates[None], blocks.block_means.shape[1]
    total = reference.BlockStatistics(
        torch.empty_like(gates), torch.empty_like(gates), gates.new_empty(1, len(index_q), most)
    )
    complete = (blocks.row_len // blocks.block_size).clamp_max(most)
    for request in blocks.row_batch.unique().tolist():
        rows = (blocks.row_batch == request).nonzero()[:, 0]
        pooled = blocks.block_means[request][None].float()
        own = index_q.view(torch.uint8)[rows].view(index_q.dtype)  # fp8 has no index kernel on every device
        found = reference.block_statistics(
            own[None], gates[:, rows], pooled, complete[rows][None], reference.RouterView(router)
        )
        for whole, part in zip(total, found, strict=True):
            whole[:, rows] = part
    return total


def topk_routed(rows: Rows, keys: Keys, heads: RoutedHeads, output: Output) -> None:
    """See `ops.topk_routed`."""
    _check(rows, keys, heads, output)
    _choose(_routed_scores(rows, keys, heads), _inside(rows, keys), rows.ks, output)


def topk_reranked(rows: Rows, keys: Keys, heads: RoutedHeads, candidates: int, output: Output) -> None:
    """See `ops.topk_reranked`."""
    _check(rows, keys, heads, output)
    if candidates < output.topk:
        raise ValueError(f"candidates: expected k = {output.topk} or more, got {candidates}; choose another C")
    inside = _inside(rows, keys)
    cheap = reference.finite(_routed_scores(rows, keys, heads), inside)
    best = torch.sort(cheap, dim=-1, descending=True, stable=True).indices[:, :candidates]
    kept = inside & torch.zeros_like(inside).scatter_(-1, best, True)
    _choose(_all_scores(rows, keys), kept, rows.ks, output)


def topk_blocks(rows: Rows, keys: Keys, scores: Tensor, blocks: int, block_size: int, output: Output) -> None:
    """See `ops.topk_blocks`."""
    _check(rows, keys, None, output)
    expect("block_scores", scores, (len(rows), None), torch.float32)
    expect_blocks(blocks, block_size, output.topk)
    inside = _inside(rows, keys)
    complete = inside.sum(-1) // block_size
    best = reference.keep_blocks(scores[None], complete[None], blocks)[0]
    block = (torch.arange(len(keys), device=rows.device) - rows.ks[:, None]).clamp_min(0) // block_size
    tail = block >= complete[:, None]
    kept = tail if best.shape[1] == 0 else tail | best.gather(1, block.clamp_max(best.shape[1] - 1))
    _choose(_all_scores(rows, keys), inside & kept, rows.ks, output)


def decode_topk(policy: SelectionPolicy, rows: PagedRows, page_means: Tensor, out: Tensor) -> None:
    """Slots of each row's top k by a decode policy, in the order of the row."""
    rows.check(page_means)
    if policy.heads is not None:
        expect_heads(policy.heads, rows.index_heads, residual=policy.residual)
    if policy.candidates is not None and policy.candidates < out.shape[1]:
        raise ValueError(f"candidates: expected at least k = {out.shape[1]}, got {policy.candidates}; raise them")
    scores = reference.decode_scores(
        policy, rows.index_q, rows.head_gates, rows.index_k_pages, page_means, rows.page_table, rows.seq_lens
    )
    request = torch.arange(len(rows), dtype=torch.int32, device=out.device)
    found = reference.top_tokens(scores, out.shape[1])
    last = scores.shape[1]
    found = found.masked_fill(found < 0, last).sort(-1).values
    out.copy_(Output(out, rows.page_table, request).of(found.masked_fill(found == last, -1)))


def _check(rows: Rows, keys: Keys, heads: RoutedHeads | None, output: Output) -> None:
    """Raise ValueError unless a prefill call's tensors fit together."""
    inputs(rows, keys, heads, cuda=False)
    output.struct(len(rows), cuda=False)


def _inside(rows: Rows, keys: Keys) -> Tensor:
    """Mask [T, S] of the keys in [ks, ke)."""
    key = torch.arange(len(keys), device=rows.device)
    return (key >= rows.ks[:, None]) & (key < rows.ke[:, None])


def _all_scores(rows: Rows, keys: Keys) -> Tensor:
    return reference.index_scores(rows.index_q[None], rows.head_gates[None], keys.index_k[None])[0] * keys.k_scale


def _routed_scores(rows: Rows, keys: Keys, heads: RoutedHeads) -> Tensor:
    ids, residual = heads.head_ids.long(), heads.residual
    routed = rows.index_q.float().gather(1, ids.unsqueeze(-1).expand(-1, -1, HEAD_DIM))
    linear = None if residual is None else (residual.query[None], residual.scale[None])
    scores = reference.index_scores(routed[None], rows.head_gates.gather(1, ids)[None], keys.index_k[None], linear)
    return scores[0] * keys.k_scale


def _choose(scores: Tensor, kept: Tensor, ks: Tensor, output: Output) -> None:
    """The top k of `scores` [T, S] where `kept`, as positions from ks on."""
    found = reference.top_tokens(reference.finite(scores, kept), output.topk)
    output.ids.copy_(output.of(torch.where(found < 0, -1, found - ks[:, None])))
