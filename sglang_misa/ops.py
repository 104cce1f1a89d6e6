"""The operations of token selection, for use without SGLang: statistics of pages, routing, and the top k.

Every function runs our kernels on tensors of a Hopper GPU, or with `backend="reference"` its twin in plain PyTorch on
any device. Tensors that belong together come as one object: `Rows` with their `Keys`, `RoutedHeads` and `Output` in
prefill, `PagedRows` and `PageSketch` in decode. The same names stand for the same tensors throughout:

    index_q        [T, H, 128] fp8 e4m3   index queries; H = 32 or 64 heads
    head_gates     [T, H] fp32            their gates w, the scales of query and softmax folded in
    index_k        [S, 128] fp8 e4m3      prefill: the keys of all requests, one request behind another
    k_scale        [S] fp32               their scales
    ks, ke         [T] int32              prefill: row t sees the keys [ks[t], ke[t])
    row_batch      [T] int32              the request of a row
    row_len        [T] int32              the tokens that a row sees
    index_k_pages  [P, 8448] uint8        SGLang's index-K pool: a page is 64 keys, then their 64 fp32 scales
    page_table     [B, W] int32           physical pages of each request; what lies past its end is never followed
    seq_lens       [B] int32              tokens of each request, at most 64 · W
    page_means     [P, 128] bf16          means of complete pages, by physical page
    block_means    [B, M, 128] bf16       means of complete blocks of `block_size` tokens, a multiple of 64
    head_ids       [T, h] int32           routed heads, ascending

A key's score is k_scale · Σ_j w_j · ReLU(q_j · k) over the heads that score it, and a residual's column beside them.
Selections are int32 [T, k] with -1 behind the last: prefill's positions from ks[t] on, in no order, or what its
`Output` says; decode's slots 64 · page + offset, in the order of the row. A row of
at most k tokens gets them all. Among equal scores the earlier token wins; NaN loses to every number. Nothing waits for
the GPU. All raise ValueError where a shape, dtype, device or limit is another: what was expected, what came.

An engine that calls them for every layer holds scratch and outputs instead: see `engines/kernels.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from sglang_misa import reference_ops
from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels import page_means as statistics
from sglang_misa.kernels.checks import expect_blocks
from sglang_misa.kernels.decode import topk_blocks as decode_blocks
from sglang_misa.kernels.decode import topk_sketched as decode_sketched
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.layout import PAGE, sketch_bytes
from sglang_misa.kernels.prefill import route as routing
from sglang_misa.kernels.prefill import topk_blocks as prefill_blocks
from sglang_misa.kernels.prefill import topk_reranked as prefill_reranked
from sglang_misa.kernels.prefill import topk_routed as prefill_routed
from sglang_misa.kernels.prefill.block_means import block_means
from sglang_misa.kernels.prefill.operands import Keys, Output, Residual, RoutedHeads, Rows
from sglang_misa.kernels.prefill.route import Blocks

__all__ = [
    "Backend",
    "Blocks",
    "Keys",
    "Output",
    "PageSketch",
    "PagedRows",
    "Residual",
    "RoutedHeads",
    "Rows",
    "SketchPolicy",
    "block_scores",
    "decode_topk_blocks",
    "decode_topk_sketched",
    "page_statistics",
    "route",
    "sketch_bytes",
    "topk_blocks",
    "topk_reranked",
    "topk_routed",
]

Backend = Literal["kernels", "reference"]


def page_statistics(
    index_k_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    block_size: int,
    *,
    page_means: Tensor,
    sketches: Tensor | None = None,
    backend: Backend = "kernels",
) -> Tensor:
    """Write the statistics of every complete page of each request; returns block_means, undefined past complete blocks.

    page_means is written in place at the physical pages, and so is sketches [P, sketch_bytes(bits)] uint8 where given:
    each key as 1 or 2 bits a coordinate around its page's mean.
    """
    if _on_kernels(backend, index_k_pages):
        statistics.update_page_means(index_k_pages, page_means, page_table, seq_lens, sketches)
        return block_means(page_means, page_table, seq_lens, block_size)
    return reference_ops.page_statistics(index_k_pages, page_table, seq_lens, block_size, page_means, sketches)


def route(
    index_q: Tensor,
    head_gates: Tensor,
    blocks: Blocks,
    heads: int,
    *,
    router: Router = "mean",
    backend: Backend = "kernels",
) -> RoutedHeads:
    """The `heads` heads that score each row, and the others as one linear column.

    router ranks the heads by |w|·mean ReLU(q·k̃) over the row's complete blocks ("mean", arXiv 2605.07363), its maximum
    ("peak"), w·mean ("signed"), |w| ("weight") or what the linear column gets wrong of keys that score high ("error").
    heads < H, so that a residual has a head to stand for.
    """
    if _on_kernels(backend, index_q):
        return routing.route(index_q, head_gates, blocks, heads, router, residual=True)
    return reference_ops.route(index_q, head_gates, blocks, heads, router)


def block_scores(index_q: Tensor, head_gates: Tensor, blocks: Blocks, *, backend: Backend = "kernels") -> Tensor:
    """Scores fp32 [T, M] of the blocks by all heads, -inf where a block is not complete (arXiv 2603.28458)."""
    if _on_kernels(backend, index_q):
        return routing.block_scores(index_q, head_gates, blocks)
    return reference_ops.block_scores(index_q, head_gates, blocks)


def topk_routed(rows: Rows, keys: Keys, heads: RoutedHeads, output: Output, *, backend: Backend = "kernels") -> Tensor:
    """Exact top k by the routed heads and, where given, the residual: MISA (arXiv 2605.07363), without a score matrix.

    h and the residual's column are one of `layout.ROUTED_HEADS` together. head_ids of all heads are DSA itself.
    Returns output.ids.
    """
    run = prefill_routed.topk_routed if _on_kernels(backend, rows.index_q) else reference_ops.topk_routed
    run(rows, keys, heads, output)
    return output.ids


def topk_reranked(
    rows: Rows, keys: Keys, heads: RoutedHeads, candidates: int, output: Output, *, backend: Backend = "kernels"
) -> Tensor:
    """Of each row's best `candidates` keys as in `topk_routed`, the exact top k by all heads: MISA† of the same paper.

    k ≤ candidates ≤ `layout.MAX_CANDIDATES`. Returns output.ids.
    """
    run = prefill_reranked.topk_reranked if _on_kernels(backend, rows.index_q) else reference_ops.topk_reranked
    run(rows, keys, heads, candidates, output)
    return output.ids


def topk_blocks(
    rows: Rows,
    keys: Keys,
    block_scores: Tensor,
    blocks: int,
    block_size: int,
    output: Output,
    *,
    backend: Backend = "kernels",
) -> Tensor:
    """Exact top k by all heads among the tokens of each row's best `blocks` complete blocks and its tail: HISA.

    block_scores as `block_scores` finds them. The first and the newest complete block stay in any case; tokens of the
    blocks are at least k. Returns output.ids.
    """
    run = prefill_blocks.topk_blocks if _on_kernels(backend, rows.index_q) else reference_ops.topk_blocks
    run(rows, keys, block_scores, blocks, block_size, output)
    return output.ids


def decode_topk_blocks(
    rows: PagedRows, page_means: Tensor, blocks: int, block_size: int, k: int, *, backend: Backend = "kernels"
) -> Tensor:
    """Slots of the top k by all heads among the tokens of each row's best blocks, on pages: HISA in decode.

    page_means [P, 128] bf16. Tokens of the blocks are at least k.
    """
    out = _slots(rows, k)
    expect_blocks(blocks, block_size, k)
    if _on_kernels(backend, rows.index_q):
        count, width = rows.page_table.shape
        room = decode_blocks.DecodeScratch.allocate(count, width, blocks, block_size, out.device)
        decode_blocks.decode_topk(rows, page_means, scratch=room, out=Chosen(out))
    else:
        policy = SelectionPolicy(blocks=blocks, block_size=block_size, min_len=0)
        reference_ops.decode_topk(policy, rows, page_means, out)
    return out


def decode_topk_sketched(
    rows: PagedRows, stats: PageSketch, policy: SketchPolicy, k: int, *, backend: Backend = "kernels"
) -> Tensor:
    """Slots of the top k by all heads among each row's best candidates on sketches, on pages.

    stats as `page_statistics` writes them. The sketches are scored by all heads, or by routed ones (`router` as in
    `route`, over at most `layout.ROUTED_PAGES` pages, and "error" is that of all keys) and the residual of the others.
    The newest complete page and what is behind it are always candidates. The kernels rank sketched scores by 16 bits,
    so candidates whose scores differ by less than 2⁻⁹ may be others than the reference's.
    """
    out = _slots(rows, k)
    if _on_kernels(backend, rows.index_q):
        count, width = rows.page_table.shape
        room = decode_sketched.SketchScratch.allocate(count, width, rows.index_heads, policy, out.device)
        decode_sketched.sketch_topk(rows, stats, scratch=room, out=Chosen(out))
    else:
        wanted = SelectionPolicy(
            heads=policy.heads,
            router=policy.router,
            residual=policy.residual,
            sketch=stats.bits,
            candidates=policy.candidates,
            block_size=PAGE,
            min_len=0,
        )
        reference_ops.decode_topk(wanted, rows, stats.means, out)
    return out


def _slots(rows: PagedRows, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}; raise it")
    return torch.empty(len(rows), k, dtype=torch.int32, device=rows.seq_lens.device)


def _on_kernels(backend: Backend, tensor: Tensor) -> bool:
    """Whether the kernels run. Triton's interpreter counts as a GPU."""
    if backend == "reference":
        return False
    if backend != "kernels":
        raise ValueError(f'backend: expected "kernels" or "reference", got {backend!r}; choose one')
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f'tensors: expected on a GPU for backend="kernels", got {tensor.device}; move them, or pass '
            'backend="reference"'
        )
    return True
