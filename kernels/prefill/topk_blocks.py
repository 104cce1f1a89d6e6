"""HISA (arXiv 2603.28458): the tokens of a row's best blocks, and of those the exact top k by all heads (CUDA)."""

from __future__ import annotations

import torch

from sglang_misa.kernels.build import build, stream_of
from sglang_misa.kernels.checks import expect, expect_blocks, expect_index_heads
from sglang_misa.kernels.layout import MAX_KEPT_PREFILL
from sglang_misa.kernels.prefill.operands import Keys, Output, Rows, inputs
from sglang_misa.kernels.structs import BlockChoice


def topk_blocks(
    rows: Rows, keys: Keys, block_scores: torch.Tensor, blocks: int, block_size: int, output: Output
) -> None:
    """Write the exact top k by all heads among the tokens of each row's `blocks` best complete blocks and of its tail.

    H ∈ `layout.INDEX_HEADS`; block_scores fp32 [T, M], of at least the (ke[t] - ks[t]) // block_size blocks that are
    complete in a row's window; block_size a multiple of 64. The first and the newest complete block stay in any case.
    Output as in `topk_routed.topk_routed`. Ties: the older block and the smaller position win; NaN comes last. Never
    synchronises. Raises ValueError on shapes, dtypes, layout or limits.
    Mirrors SGLang's fp8_mqa_logits + topk_transform.
    """
    k, kept = output.topk, (blocks + 1) * block_size
    expect_index_heads(rows.index_heads)
    expect_blocks(blocks, block_size, k)
    if kept + k // 2 > MAX_KEPT_PREFILL:
        raise ValueError(
            f"blocks: expected at most {MAX_KEPT_PREFILL} tokens with one more block and k / 2, got {blocks} of "
            f"{block_size} with k = {k}; change the number of blocks"
        )
    call = inputs(rows, keys), output.struct(len(rows))
    expect("block_scores", block_scores, (len(rows), None), torch.float32, cuda=True)
    if len(rows):
        choice = BlockChoice(scores=block_scores, pitch=block_scores.shape[1], size=block_size, kept=blocks, room=kept)
        kernels = build("topk_blocks", index_heads=rows.index_heads)
        kernels.topk(*map(bytes, (*call, choice)), stream_of(rows.device))
