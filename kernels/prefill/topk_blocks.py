"""HISA (arXiv 2603.28458): the tokens of a row's best blocks, and of those the exact top k by all heads (CUDA)."""

from __future__ import annotations

from typing import Any

import torch

from sglang_misa.kernels.build import Target, build
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.layout import HEAD_DIM, INDEX_HEADS, PAGE
from sglang_misa.kernels.structs import BlockChoice, Inputs, ResidualColumn

MAX_KEPT = 49152  # tokens of (blocks + 1) · block_size, and k / 2: what one thread block's shared memory lists


def module(index_heads: int) -> Any:
    """The compiled kernels for a model's H."""
    return build("topk_blocks", index_heads=index_heads)


def topk_blocks(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    block_scores: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    blocks: int,
    block_size: int,
    k: int,
    *,
    out: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    row_batch: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact top k by all heads among the tokens of each row's `blocks` best complete blocks and of its tail.

    index_q fp8 e4m3 [T, H, 128], H ∈ `INDEX_HEADS`; head_gates fp32 [T, H]; index_k fp8 [S, 128]; k_scale fp32 [S];
    ks and ke int32 [T], the row's window [ks[t], ke[t]); block_scores fp32 [T, M], of at least the
    (ke[t] - ks[t]) // block_size blocks that are complete in it; block_size a multiple of 64. The first and the newest
    complete block stay in any case. Returns int32 [T, k] as `topk_routed.topk_routed`: positions relative to ks[t],
    slots or shifted positions, in no order, -1 behind the last. Ties: the older block and the smaller position win;
    NaN comes last. Never synchronises. Raises ValueError on shapes, dtypes, layout or limits.
    Mirrors SGLang's fp8_mqa_logits + topk_transform.
    """
    rows, heads = head_gates.shape
    kept = (blocks + 1) * block_size
    if heads not in INDEX_HEADS:
        raise ValueError(f"head_gates: expected {' or '.join(map(str, INDEX_HEADS))} index heads, got {heads}")
    if block_size < PAGE or block_size % PAGE or k > blocks * block_size or kept + k // 2 > MAX_KEPT:
        raise ValueError(
            f"blocks: expected blocks of a multiple of {PAGE} tokens, k={k} tokens or more in all and at most "
            f"{MAX_KEPT} with one more block, got {blocks} of {block_size}; choose other blocks"
        )
    fp8 = (torch.float8_e4m3fn, torch.uint8)
    expect("index_q", index_q, (rows, heads, HEAD_DIM), *fp8, cuda=True)
    expect("head_gates", head_gates, (rows, heads), torch.float32, cuda=True)
    expect("index_k", index_k, (None, HEAD_DIM), *fp8, cuda=True)
    expect("k_scale", k_scale, (index_k.shape[0],), torch.float32, cuda=True)
    expect("block_scores", block_scores, (rows, None), torch.float32, cuda=True)
    expect("ks", ks, (rows,), torch.int32, cuda=True)
    expect("ke", ke, (rows,), torch.int32, cuda=True)
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=index_q.device)
    target = Target(out, page_table, row_batch, offsets)
    target.check(rows, k)
    if rows > 0:
        inputs = Inputs(
            index_q=index_q,
            head_gates=head_gates,
            head_ids=None,
            index_k=index_k,
            k_scale=k_scale,
            ks=ks,
            ke=ke,
            residual=ResidualColumn(query=None, scale=None),
            rows=rows,
            index_heads=heads,
            keys=index_k.shape[0],
        )
        choice = BlockChoice(scores=block_scores, pitch=block_scores.shape[1], size=block_size, kept=blocks, room=kept)
        stream = torch.cuda.current_stream(index_q.device).cuda_stream
        module(heads).topk(bytes(inputs), bytes(target.struct()), bytes(choice), stream)
    return out
