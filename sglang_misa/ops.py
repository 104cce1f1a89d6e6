"""The operations of token selection, for use without SGLang: statistics of pages, routing, and the top k.

Every function runs our kernels on tensors of a Hopper GPU, or with `backend="reference"` its twin in plain PyTorch on
any device. The same names stand for the same tensors throughout:

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
Selections come as int32 [T, k] with -1 behind the last: prefill's positions from ks[t] on, in no order, or physical
slots where `page_table` and `row_batch` are given; decode's slots 64 · page + offset, in the order of the row. A row of
at most k tokens gets them all. Among equal scores the earlier token wins; NaN loses to every number. Nothing waits for
the GPU. All raise ValueError where a shape, dtype, device or limit is another: what was expected, what came.

An engine that calls them for every layer holds scratch and outputs instead: see `engines/kernels.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from sglang_misa import twins
from sglang_misa.call import Output
from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels import page_means as statistics
from sglang_misa.kernels.decode import topk_blocks as decode_blocks
from sglang_misa.kernels.decode import topk_sketched as decode_sketched
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.layout import PAGE, sketch_bytes
from sglang_misa.kernels.prefill import route as routing
from sglang_misa.kernels.prefill import topk_blocks as prefill_blocks
from sglang_misa.kernels.prefill import topk_reranked as prefill_reranked
from sglang_misa.kernels.prefill import topk_routed as prefill_routed
from sglang_misa.kernels.prefill.operands import Keys, Residual, RoutedHeads, Rows

__all__ = [
    "Backend",
    "Residual",
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
        return statistics.update_page_means(index_k_pages, page_means, page_table, seq_lens, block_size, sketches)
    return twins.page_statistics(index_k_pages, page_table, seq_lens, block_size, page_means, sketches)


def route(
    index_q: Tensor,
    head_gates: Tensor,
    block_means: Tensor,
    row_batch: Tensor,
    row_len: Tensor,
    heads: int,
    block_size: int,
    *,
    router: Router = "mean",
    backend: Backend = "kernels",
) -> tuple[Tensor, Residual]:
    """The `heads` heads that score each row, head_ids, and the others as one linear column.

    router ranks the heads by |w|·mean ReLU(q·k̃) over the row's complete blocks ("mean", arXiv 2605.07363), its maximum
    ("peak"), w·mean ("signed") or |w| ("weight"). heads < H, so that a residual has a head to stand for.
    """
    if _on_kernels(backend, index_q):
        blocks = routing.Blocks(block_means, block_size, row_batch, row_len)
        routed = routing.route(index_q, head_gates, blocks, heads, router, residual=True)
        assert routed.residual is not None
        return routed.head_ids, routed.residual
    return twins.route(index_q, head_gates, block_means, row_batch, row_len, heads, block_size, router)


def block_scores(
    index_q: Tensor,
    head_gates: Tensor,
    block_means: Tensor,
    row_batch: Tensor,
    row_len: Tensor,
    block_size: int,
    *,
    backend: Backend = "kernels",
) -> Tensor:
    """Scores fp32 [T, M] of the blocks by all heads, -inf where a block is not complete (arXiv 2603.28458)."""
    if _on_kernels(backend, index_q):
        return routing.block_scores(index_q, head_gates, routing.Blocks(block_means, block_size, row_batch, row_len))
    return twins.block_scores(index_q, head_gates, block_means, row_batch, row_len, block_size)


def topk_routed(
    index_q: Tensor,
    head_gates: Tensor,
    head_ids: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    ks: Tensor,
    ke: Tensor,
    k: int,
    *,
    residual: Residual | None = None,
    page_table: Tensor | None = None,
    row_batch: Tensor | None = None,
    backend: Backend = "kernels",
) -> Tensor:
    """Exact top k by the routed heads and, where given, the residual: MISA (arXiv 2605.07363), without a score matrix.

    h and the residual's column are one of `layout.ROUTED_HEADS` together. head_ids of all heads are DSA itself.
    """
    tensors = (index_q, head_gates, head_ids, index_k, k_scale, ks, ke)
    output = _output(ks, k, page_table, row_batch)
    if _on_kernels(backend, index_q):
        rows, keys = Rows(index_q, head_gates, ks, ke), Keys(index_k, k_scale)
        prefill_routed.topk_routed(rows, keys, RoutedHeads(head_ids, residual), output)
        return output.ids
    twins.topk_routed(*tensors, residual, output)
    return output.ids


def topk_reranked(
    index_q: Tensor,
    head_gates: Tensor,
    head_ids: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    ks: Tensor,
    ke: Tensor,
    candidates: int,
    k: int,
    *,
    residual: Residual | None = None,
    page_table: Tensor | None = None,
    row_batch: Tensor | None = None,
    backend: Backend = "kernels",
) -> Tensor:
    """Of each row's best `candidates` keys as in `topk_routed`, the exact top k by all heads: MISA† of the same paper.

    k ≤ candidates ≤ `layout.MAX_CANDIDATES`.
    """
    tensors = (index_q, head_gates, head_ids, index_k, k_scale, ks, ke)
    output = _output(ks, k, page_table, row_batch)
    if _on_kernels(backend, index_q):
        rows, keys = Rows(index_q, head_gates, ks, ke), Keys(index_k, k_scale)
        prefill_reranked.topk_reranked(rows, keys, RoutedHeads(head_ids, residual), candidates, output)
        return output.ids
    twins.topk_reranked(*tensors, candidates, residual, output)
    return output.ids


def topk_blocks(
    index_q: Tensor,
    head_gates: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    block_scores: Tensor,
    ks: Tensor,
    ke: Tensor,
    blocks: int,
    block_size: int,
    k: int,
    *,
    page_table: Tensor | None = None,
    row_batch: Tensor | None = None,
    backend: Backend = "kernels",
) -> Tensor:
    """Exact top k by all heads among the tokens of each row's best `blocks` complete blocks and its tail: HISA.

    block_scores fp32 [T, M] as `block_scores` returns them. The first and the newest complete block stay in any case.
    """
    tensors = (index_q, head_gates, index_k, k_scale, block_scores, ks, ke)
    output = _output(ks, k, page_table, row_batch)
    if _on_kernels(backend, index_q):
        rows, keys = Rows(index_q, head_gates, ks, ke), Keys(index_k, k_scale)
        prefill_blocks.topk_blocks(rows, keys, block_scores, blocks, block_size, output)
        return output.ids
    twins.topk_blocks(*tensors, blocks, block_size, output)
    return output.ids


def decode_topk_blocks(
    index_q: Tensor,
    head_gates: Tensor,
    index_k_pages: Tensor,
    page_means: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    blocks: int,
    block_size: int,
    k: int,
    *,
    backend: Backend = "kernels",
) -> Tensor:
    """Slots of the top k by all heads among the tokens of each row's best blocks, on pages: HISA in decode.

    One row a query: T = B. Tokens of the blocks are at least k.
    """
    tensors = (index_q, head_gates, index_k_pages, page_means, page_table, seq_lens)
    out = torch.empty(len(seq_lens), k, dtype=torch.int32, device=seq_lens.device)
    if _on_kernels(backend, index_q):
        rows, width = page_table.shape
        room = decode_blocks.DecodeScratch.allocate(rows, width, blocks, block_size, out.device)
        queries = PagedRows(index_q, head_gates, index_k_pages, page_table, seq_lens)
        decode_blocks.decode_topk(queries, page_means, scratch=room, out=Chosen(out))
    else:
        twins.decode_topk(SelectionPolicy(blocks=blocks, block_size=block_size, min_len=0), *tensors, out)
    return out


def decode_topk_sketched(
    index_q: Tensor,
    head_gates: Tensor,
    index_k_pages: Tensor,
    page_means: Tensor,
    sketches: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    candidates: int,
    k: int,
    *,
    heads: int | None = None,
    router: Router = "peak",
    residual: bool = False,
    backend: Backend = "kernels",
) -> Tensor:
    """Slots of the top k by all heads among each row's best `candidates` tokens on sketches, on pages.

    One row a query: T = B. sketches as `page_statistics` writes them. The sketches are scored by all heads, or by
    `heads` routed ones (`router` as in `route`, over pages) and the `residual` of the others. The newest complete page
    and what is behind it are always candidates. The kernels rank sketched scores by 16 bits, so candidates whose scores
    differ by less than 2⁻⁹ may be others than the reference's.
    """
    tensors = (index_q, head_gates, index_k_pages)
    out = torch.empty(len(seq_lens), k, dtype=torch.int32, device=seq_lens.device)
    if _on_kernels(backend, index_q):
        rows, width = page_table.shape
        step = SketchPolicy(heads, router, residual, candidates)
        room = decode_sketched.SketchScratch.allocate(rows, width, index_q.shape[1], step, out.device)
        queries = PagedRows(index_q, head_gates, index_k_pages, page_table, seq_lens)
        decode_sketched.sketch_topk(queries, PageSketch(page_means, sketches), scratch=room, out=Chosen(out))
    else:
        policy = SelectionPolicy(
            heads=heads,
            router=router,
            residual=residual,
            sketch=twins.sketch_bits(sketches),
            candidates=candidates,
            block_size=PAGE,
            min_len=0,
        )
        twins.decode_topk(policy, *tensors, page_means, page_table, seq_lens, out)
    return out


def _output(ks: Tensor, k: int, page_table: Tensor | None, row_batch: Tensor | None) -> Output:
    return Output(torch.empty(len(ks), k, dtype=torch.int32, device=ks.device), page_table, row_batch)


def _on_kernels(backend: Backend, tensor: Tensor) -> bool:
    """Whether the kernels run. Triton's interpreter counts as a GPU."""
    if backend == "reference":
        return False
    if backend != "kernels":
        raise ValueError(f'backend: expected "kernels" or "reference", got {backend!r}')
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f'tensors: expected on a GPU for backend="kernels", got {tensor.device}; move them, or pass '
            'backend="reference"'
        )
    return True
