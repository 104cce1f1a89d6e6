"""Every index head against the pooled keys of each query's prefix: which heads to route to, and block scores.

For query t, head j and pooled key k̃_b (the mean of the keys of block b), with x = q[t,j]·k̃_b:

    statistic  E[t,j] = |w[t,j]| · Σ_b ReLU(x)  (mean: the MISA paper, arXiv 2605.07363, Eq. 7–8, whose 1/M ranks alike)
               E[t,j] = |w[t,j]| · max_b ReLU(x)  (peak)
               E[t,j] =  w[t,j]  · Σ_b ReLU(x)  (signed)        E[t,j] = |w[t,j]|  (weight)
               E[t,j] = |w[t,j]| · σ·√(φ(1 − φ))  (error): what a residual would get wrong of the head, where φ is
               that of the keys that score high (tilt.py)
    heads      the h largest of E[t,·]; ties go to the lower head, and a NaN loses to every number
    residual   q̄[t] = Σ_{j not among them} w[t,j] · φ[t,j] · q[t,j], φ = Φ(μ/σ) with mean and deviation of x:
               ReLU(x) is x times "is it positive", and φ is the share of keys on which it is, so that the
               deviation of what is lost is about σ·√(φ(1 − φ))
    scores     S[t,b] = Σ_j w[t,j] · ReLU(x)  over all heads (HISA, arXiv 2603.28458)

Only blocks complete at the row's own length count, b < row_len // block_size. A row that has none routes by |w|, with
φ = ½; for an error it needs two. As in DeepGEMM, ReLU of a NaN is 0; a head whose products are not finite has φ = 0,
and no error. A row's heads, residual and scores do not depend on the rows and requests beside it.

`route` is CUDA (route.cu) and sums over blocks inside a thread; `block_scores` is Triton and sums over heads: a program
holds up to 128 (query, head) columns against tiles of 64 pooled keys, and only the last tiles of a row pay for masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_misa.kernels.build import build, stream_of
from sglang_misa.kernels.checks import expect, expect_block_size, expect_heads, expect_index_heads, expect_router
from sglang_misa.kernels.layout import HEAD_DIM, ROUTERS, Router
from sglang_misa.kernels.prefill.operands import Residual, RoutedHeads
from sglang_misa.kernels.prefill.seen_blocks import OPERAND, seen_blocks
from sglang_misa.kernels.prefill.tilt import tilt
from sglang_misa.kernels.structs import ChooseHeads, Route

_TILE = 64  # pooled keys a step: the tensor-core rows of one warpgroup
_WIDE_FROM = 1024  # rows from which several queries share a program; below it each has its own, to fill the GPU
_WIDE_COLUMNS = 128  # (query, head) columns of such a program
_WARPS, _REGISTERS, _STAGES = 4, 168, 2  # the register cap lets programs of one SM hide each other's waits


@triton.jit
def _score_tile(
    p_pooled,
    p_row_scores,
    b_q,
    b_gate,
    b_row_blocks,
    m_row,
    start,
    stop,
    max_blocks,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of pooled keys against all columns: stores the block scores of rows `m_row`."""
    o_block, o_dim = start + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    p_key = p_pooled + o_block[:, None] * HEAD_DIM + o_dim[None, :]
    # [TILE, HEAD_DIM]
    b_key = tl.load(p_key, mask=o_block[:, None] < stop, other=0.0) if MASKED else tl.load(p_key)
    # [TILE, ROWS * H]
    b_x = tl.maximum(tl.dot(b_key.to(OPERAND), b_q), 0.0)
    # [TILE, ROWS]
    b_score = tl.sum(tl.reshape(b_x * b_gate[None, :], [TILE, ROWS, H]), axis=2)
    m_score = m_row[None, :]
    if MASKED:
        b_score = tl.where(o_block[:, None] < b_row_blocks[None, :], b_score, float("-inf"))
        m_score = m_score & (o_block[:, None] < max_blocks)
    tl.store(p_row_scores[None, :] + o_block[:, None], b_score, mask=m_score)


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(do_not_specialize=["rows", "max_blocks", "span"], do_not_specialize_on_alignment=["p_batch", "p_len"])
def block_scores_fwd_kernel(
    p_q,
    p_gate,
    p_pooled,
    p_batch,
    p_len,
    p_scores,
    rows,
    max_blocks,
    span,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    i_row, m_row, b_row_batch, b_row_blocks = seen_blocks(p_batch, p_len, rows, max_blocks, BLOCK_SIZE, ROWS)
    o_col, o_dim = tl.arange(0, ROWS * H), tl.arange(0, HEAD_DIM)
    i_col_row = tl.minimum(tl.program_id(0) * ROWS + o_col // H, rows - 1).to(tl.int64)
    i_col = i_col_row * H + o_col % H
    # [ROWS * H]
    b_gate = tl.load(p_gate + i_col)
    # [HEAD_DIM, ROWS * H]
    b_q = tl.trans(tl.load(p_q + i_col[:, None] * HEAD_DIM + o_dim[None, :]).to(OPERAND))
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, max_blocks)
    # Nearly always one request; where requests meet, one pass for each with the other rows masked.
    for i_batch in range(tl.min(b_row_batch), tl.max(b_row_batch) + 1):
        m_own = m_row & (b_row_batch == i_batch)
        b_own = tl.where(m_own, b_row_blocks, 0)
        p_own = p_pooled + i_batch * (max_blocks.to(tl.int64) * HEAD_DIM)
        p_row_scores = p_scores + i_row * max_blocks
        stop = tl.minimum(tl.max(b_own), last)
        whole = first + tl.maximum(tl.minimum(tl.min(b_own), last) - first, 0) // TILE * TILE
        for start in range(first, whole, TILE):
            _score_tile(
                p_own, p_row_scores, b_q, b_gate, b_own, m_own, start, stop, max_blocks, H, ROWS, TILE, HEAD_DIM, False
            )
        for start in range(whole, stop, TILE):
            _score_tile(
                p_own, p_row_scores, b_q, b_gate, b_own, m_own, start, stop, max_blocks, H, ROWS, TILE, HEAD_DIM, True
            )
        for start in range(whole + tl.cdiv(tl.maximum(stop - whole, 0), TILE) * TILE, last, TILE):
            o_block = start + tl.arange(0, TILE)
            m_score = m_own[None, :] & (o_block[:, None] < max_blocks)
            b_none = tl.full([TILE, ROWS], float("-inf"), tl.float32)
            tl.store(p_row_scores[None, :] + o_block[:, None], b_none, mask=m_score)


@dataclass(frozen=True)
class Blocks:
    """Pooled keys of all requests, and what each row has of them: the blocks complete at its own length.

    block_means [B, M, 128] bf16 from `block_means`, with anything beyond a request's complete blocks;
    block_size: tokens of a block; row_batch [T] int32: the request of each row, best in order; row_len [T] int32: the
    tokens that it sees.
    """

    block_means: torch.Tensor
    block_size: int
    row_batch: torch.Tensor
    row_len: torch.Tensor

    def check(self, index_q: torch.Tensor, head_gates: torch.Tensor, *, cuda: bool) -> None:
        """Raise ValueError unless the rows of index_q and head_gates have all this, on a GPU if `cuda`."""
        rows, index_heads = index_q.shape[:2]
        expect_index_heads(index_heads)
        expect("index_q", index_q, (rows, index_heads, HEAD_DIM), torch.float8_e4m3fn, cuda=cuda)
        expect("head_gates", head_gates, (rows, index_heads), torch.float32, cuda=cuda)
        expect("block_means", self.block_means, (None, None, HEAD_DIM), torch.bfloat16, cuda=cuda)
        expect("row_batch", self.row_batch, (rows,), torch.int32, cuda=cuda)
        expect("row_len", self.row_len, (rows,), torch.int32, cuda=cuda)
        expect_block_size(self.block_size)


def route(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    blocks: Blocks,
    heads: int,
    router: Router = "mean",
    residual: bool = False,
) -> RoutedHeads:
    """The h index heads each query is scored with; with `residual` also that of the others.

    index_q [T, H, 128] fp8 e4m3; head_gates [T, H] fp32; heads h ≤ H ∈ {32, 64}, below H where a residual is wanted.
    One launch, two with a residual, four by error; a CUDA graph can hold them.
    A residual's scale is the largest |q̄| / 448; where that is 0 or not finite, it is 1 and the query 0.
    Raises ValueError for another layout.
    """
    rows, index_heads = index_q.shape[:2]
    expect_heads(heads, index_heads, residual=residual)
    expect_router(router, routed=heads < index_heads, residual=residual)
    blocks.check(index_q, head_gates, cuda=True)
    device = index_q.device
    head_ids = torch.empty(rows, heads, dtype=torch.int32, device=device)
    others = Residual.empty(rows, device) if residual else None
    if rows == 0:
        return RoutedHeads(head_ids, others)
    requests, max_blocks, _ = blocks.block_means.shape
    tilted = router == "error" and residual and max_blocks > 0
    gates = torch.empty_like(head_gates) if residual else None
    products = torch.empty(*head_gates.shape, 2, dtype=torch.float32, device=device) if tilted else None
    call = Route(
        index_q=index_q,
        head_gates=head_gates,
        block_means=blocks.block_means,
        row_batch=blocks.row_batch,
        row_len=blocks.row_len,
        head_ids=head_ids,
        residual_gates=gates,
        residual_query=others and others.query,
        residual_scale=others and others.scale,
        products=products,
        rows=rows,
        requests=requests,
        max_blocks=max_blocks,
        block_size=blocks.block_size,
        heads=heads,
        # all heads are chosen whatever their statistic, and by error elsewhere
        router=ROUTERS.index("weight" if heads == index_heads or router == "error" else router),
    )
    build("route", index_heads=index_heads).route(bytes(call), stream_of(device))
    if products is not None and others is not None:
        _choose_by_error(index_q, head_gates, blocks, products, head_ids, others)
    return RoutedHeads(head_ids, others)


def _choose_by_error(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    blocks: Blocks,
    products: torch.Tensor,
    head_ids: torch.Tensor,
    others: Residual,
) -> None:
    """Write the heads that a residual would get most wrong, and in the place of all heads' residual the others'."""
    direction = tilt(others.query, blocks.block_means, blocks.row_batch, blocks.row_len, blocks.block_size)
    call = ChooseHeads(
        index_q=index_q,
        head_gates=head_gates,
        row_len=blocks.row_len,
        products=products,
        direction=direction,
        head_ids=head_ids,
        residual_query=others.query,
        residual_scale=others.scale,
        rows=len(index_q),
        max_blocks=blocks.block_means.shape[1],
        block_size=blocks.block_size,
        heads=head_ids.shape[1],
    )
    kernels = build("choose_heads", index_heads=index_q.shape[1])
    kernels.choose_heads(bytes(call), stream_of(index_q.device))


def block_scores(index_q: torch.Tensor, head_gates: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Block scores S fp32 [T, M], -inf where a block is not complete, for policies that prune tokens.

    Rows as in `route`. Few of them are split over blocks, to fill the GPU. Raises ValueError for another layout.
    """
    blocks.check(index_q, head_gates, cuda=False)
    rows, index_heads = index_q.shape[:2]
    max_blocks = blocks.block_means.shape[1]
    scores = torch.empty(rows, max_blocks, dtype=torch.float32, device=index_q.device)
    wide = rows >= _WIDE_FROM
    rows_each, span = (_WIDE_COLUMNS // index_heads, max_blocks) if wide else (1, _TILE)
    if rows and max_blocks:
        block_scores_fwd_kernel[(-(-rows // rows_each), -(-max_blocks // span))](
            index_q,
            head_gates,
            blocks.block_means,
            blocks.row_batch,
            blocks.row_len,
            scores,
            rows,
            max_blocks,
            span,
            BLOCK_SIZE=blocks.block_size,
            H=index_heads,
            ROWS=rows_each,
            TILE=_TILE,
            HEAD_DIM=HEAD_DIM,
            num_warps=_WARPS,
            num_stages=_STAGES,
            maxnreg=_REGISTERS,
        )
    return scores
