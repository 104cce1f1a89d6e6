"""Reference twins of the operations in `ops`: the same arguments and results, in plain PyTorch on any device.

They write whole matrices of scores and read lengths on the host: for checks, and for sizes that a check has.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.call import Output
from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, sketch_bytes
from sglang_misa.kernels.prefill.operands import Residual


def page_statistics(
    index_k_pages: Tensor, page_table: Tensor, seq_lens: Tensor, block_size: int, means: Tensor, sketches: Tensor | None
) -> Tensor:
    blocks = means.new_zeros(len(seq_lens), page_table.shape[1] * PAGE // block_size, HEAD_DIM)
    for request, length in enumerate(seq_lens.tolist()):
        ids = page_table[request, : length // PAGE].long()
        pages = index_k_pages[ids]
        means[ids] = reference.page_means(pages).bfloat16()
        pooled = reference.block_means(means[ids].unsqueeze(0), block_size // PAGE)[0]
        blocks[request, : len(pooled)] = pooled.bfloat16()
        if sketches is not None:
            bits = sketch_bits(sketches)
            sketches[ids] = reference.pack_sketches(*reference.quantize_pages(pages, means[ids], bits), bits)
    return blocks


def sketch_bits(sketches: Tensor) -> Literal[1, 2]:
    """Bits a coordinate of sketches uint8 [P, sketch_bytes(bits)]."""
    return 1 if sketches.shape[1] == sketch_bytes(1) else 2


def route(
    index_q: Tensor,
    head_gates: Tensor,
    block_means: Tensor,
    row_batch: Tensor,
    row_len: Tensor,
    heads: int,
    block_size: int,
    router: Router,
) -> tuple[Tensor, Residual]:
    """The heads, and what is left for the others, which a call without a residual drops."""
    found = _statistics(index_q, head_gates, block_means, row_batch, row_len, block_size, router)
    head_ids = reference.top_heads(found.heads, heads)
    query, scale = reference.residual_query(index_q[None], head_gates[None], head_ids, found.positive)
    return head_ids[0].int(), Residual(query[0].to(torch.float8_e4m3fn), scale[0])


def block_scores(
    index_q: Tensor, head_gates: Tensor, block_means: Tensor, row_batch: Tensor, row_len: Tensor, block_size: int
) -> Tensor:
    return _statistics(index_q, head_gates, block_means, row_batch, row_len, block_size, "mean").blocks[0]


def _statistics(
    index_q: Tensor,
    head_gates: Tensor,
    block_means: Tensor,
    row_batch: Tensor,
    row_len: Tensor,
    block_size: int,
    router: Router,
) -> reference.BlockStatistics:
    """`reference.block_statistics` [1, T, …] of rows of several requests."""
    gates = head_gates[None]
    total = reference.BlockStatistics(
        torch.empty_like(gates), torch.empty_like(gates), gates.new_empty(1, len(row_len), block_means.shape[1])
    )
    complete = (row_len // block_size).clamp_max(block_means.shape[1])
    for request in row_batch.unique().tolist():
        rows = (row_batch == request).nonzero()[:, 0]
        pooled = block_means[request][None].float()
        own = index_q.view(torch.uint8)[rows].view(index_q.dtype)  # fp8 has no index kernel on every device
        found = reference.block_statistics(own[None], gates[:, rows], pooled, complete[rows][None], router)
        for whole, part in zip(total, found, strict=True):
            whole[:, rows] = part
    return total


def topk_routed(
    index_q: Tensor,
    head_gates: Tensor,
    head_ids: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    ks: Tensor,
    ke: Tensor,
    residual: Residual | None,
    output: Output,
) -> None:
    scores = _routed_scores(index_q, head_gates, head_ids, index_k, k_scale, residual)
    _choose(scores, _inside(ks, ke, len(k_scale)), ks, output)


def topk_reranked(
    index_q: Tensor,
    head_gates: Tensor,
    head_ids: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    ks: Tensor,
    ke: Tensor,
    candidates: int,
    residual: Residual | None,
    output: Output,
) -> None:
    inside = _inside(ks, ke, len(k_scale))
    cheap = reference.finite(_routed_scores(index_q, head_gates, head_ids, index_k, k_scale, residual), inside)
    best = torch.sort(cheap, dim=-1, descending=True, stable=True).indices[:, :candidates]
    kept = inside & torch.zeros_like(inside).scatter_(-1, best, True)
    _choose(_all_scores(index_q, head_gates, index_k, k_scale), kept, ks, output)


def topk_blocks(
    index_q: Tensor,
    head_gates: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    scores: Tensor,
    ks: Tensor,
    ke: Tensor,
    blocks: int,
    block_size: int,
    output: Output,
) -> None:
    inside = _inside(ks, ke, len(k_scale))
    complete = inside.sum(-1) // block_size
    best = reference.keep_blocks(scores[None], complete[None], blocks)[0]
    block = (torch.arange(len(k_scale), device=ks.device) - ks[:, None]).clamp_min(0) // block_size
    tail = block >= complete[:, None]
    kept = tail if best.shape[1] == 0 else tail | best.gather(1, block.clamp_max(best.shape[1] - 1))
    _choose(_all_scores(index_q, head_gates, index_k, k_scale), inside & kept, ks, output)


def decode_topk(
    policy: SelectionPolicy,
    index_q: Tensor,
    head_gates: Tensor,
    index_k_pages: Tensor,
    page_means: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
) -> None:
    """Slots of each row's top k by a decode policy, in the order of the row."""
    scores = reference.decode_scores(policy, index_q, head_gates, index_k_pages, page_means, page_table, seq_lens)
    rows = torch.arange(len(seq_lens), dtype=torch.int32, device=seq_lens.device)
    found = reference.top_tokens(scores, out.shape[1])
    last = scores.shape[1]
    found = found.masked_fill(found < 0, last).sort(-1).values
    out.copy_(Output(out, page_table, rows).of(found.masked_fill(found == last, -1)))


def _inside(ks: Tensor, ke: Tensor, keys: int) -> Tensor:
    """Mask [T, S] of the keys in [ks, ke)."""
    key = torch.arange(keys, device=ks.device)
    return (key >= ks[:, None]) & (key < ke[:, None])


def _all_scores(index_q: Tensor, head_gates: Tensor, index_k: Tensor, k_scale: Tensor) -> Tensor:
    return reference.index_scores(index_q[None], head_gates[None], index_k[None])[0] * k_scale


def _routed_scores(
    index_q: Tensor, head_gates: Tensor, head_ids: Tensor, index_k: Tensor, k_scale: Tensor, residual: Residual | None
) -> Tensor:
    ids = head_ids.long()
    routed = index_q.float().gather(1, ids.unsqueeze(-1).expand(-1, -1, HEAD_DIM))
    scores = reference.index_scores(routed[None], head_gates.gather(1, ids)[None], index_k[None])[0]
    if residual is not None:
        scores += residual.scale[:, None] * (residual.query.float() @ index_k.float().T)
    return scores * k_scale


def _choose(scores: Tensor, kept: Tensor, ks: Tensor, output: Output) -> None:
    """The top k of `scores` [T, S] where `kept`, as positions from ks on."""
    found = reference.top_tokens(reference.finite(scores, kept), output.topk)
    output.ids.copy_(output.of(torch.where(found < 0, -1, found - ks[:, None])))
