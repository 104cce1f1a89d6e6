"""Exact all-head DSA scores of each row's candidates: the second pass of MISA† (arXiv 2605.07363).

    score[t,c] = k_scale[s] · Σ_j w[t,j] · ReLU(q[t,j]·k[s]),  s = candidates[t,c]

Keys are gathered, 128 bytes each, through L2, which holds the index keys of a 128K prefix. Candidates lie on
tensor-core rows and heads on columns, so that the sum over heads stays nearly inside a thread. As in DeepGEMM, ReLU of
a NaN is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .layout import expect

PAGE = 64
HEAD_DIM = 128
PAGE_BYTES = PAGE * (HEAD_DIM + 4)
INDEX_HEADS = (32, 64)

_TILE = 128  # candidates a step
_WARPS = 4
_STAGES = 3  # candidate ids one step ahead of their keys, keys one ahead of the tensor cores
_MAXNREG = 128  # four programs an SM
_SPAN = 1024  # candidates a program: amortises loading the row's queries
_FILLING_PROGRAMS = 528  # four on each of an H100's 132 SMs; calls with fewer are split finer


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(
    do_not_specialize=["keys", "width", "span", "row_stride", "out_stride"],
    do_not_specialize_on_alignment=["p_scales", "p_candidates", "p_counts", "p_out"],
)
def rerank_fwd_kernel(
    p_q,
    p_gate,
    p_keys,
    p_scales,
    p_candidates,
    p_counts,
    p_out,
    keys,
    width,
    span,
    row_stride,
    out_stride,
    H: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    # Neighbouring rows, whose candidates overlap, run side by side on the same stretch of keys.
    i_row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, width)
    stop = tl.minimum(tl.load(p_counts + i_row), last)
    o_head, o_dim, o_tile = tl.arange(0, H), tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    p_candidate = p_candidates + i_row * row_stride
    p_score = p_out + i_row * out_stride
    # [HEAD_DIM, H]
    b_q = tl.trans(tl.load(p_q + (i_row * H + o_head)[:, None] * HEAD_DIM + o_dim[None, :]))
    # [H]
    b_gate = tl.load(p_gate + i_row * H + o_head)

    for start in range(first, stop, TILE):
        o_candidate = start + o_tile
        i_key = tl.load(p_candidate + o_candidate, mask=o_candidate < stop, other=-1)
        m_key = (i_key >= 0) & (i_key < keys)
        i_key = tl.where(m_key, i_key, 0).to(tl.int64)
        if PAGED:
            o_key = i_key // PAGE * PAGE_BYTES + i_key % PAGE * HEAD_DIM
            o_scale = i_key // PAGE * (PAGE_BYTES // 4) + PAGE * HEAD_DIM // 4 + i_key % PAGE
        else:
            o_key, o_scale = i_key * HEAD_DIM, i_key
        # [TILE, HEAD_DIM]
        b_key = tl.load(p_keys + o_key[:, None] + o_dim[None, :], mask=m_key[:, None], other=0.0)
        b_scale = tl.load(p_scales + o_scale, mask=m_key, other=0.0)
        # [TILE, H]
        b_x = tl.maximum(tl.dot(b_key, b_q), 0.0)
        b_score = tl.sum(b_x * b_gate[None, :], axis=1) * b_scale
        tl.store(p_score + o_candidate, tl.where(m_key, b_score, float("-inf")), mask=o_candidate < last)

    for start in range(first + tl.cdiv(tl.maximum(stop - first, 0), TILE) * TILE, last, TILE):
        o_candidate = start + o_tile
        tl.store(p_score + o_candidate, tl.full([TILE], float("-inf"), tl.float32), mask=o_candidate < last)


def rerank(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    candidates: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """All-head scores fp32 [T, C] of each row's candidates among contiguous keys; -inf where there is none.

    index_q [T, H, 128] fp8 e4m3, H ∈ {32, 64}; head_gates [T, H] fp32; index_k [S, 128] fp8 e4m3; k_scale [S] fp32;
    candidates [T, C] int32, columns in [0, S), packed at the front, any other value counts as none; counts [T] int32;
    out: where to write. Candidates and out may have padded rows. Raises ValueError for another layout.
    """
    expect("index_k", index_k, (index_k.shape[0], HEAD_DIM), torch.float8_e4m3fn)
    expect("k_scale", k_scale, (index_k.shape[0],), torch.float32)
    return _launch(index_q, head_gates, index_k, k_scale, len(index_k), candidates, counts, out, paged=False)


def rerank_paged(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    pool: torch.Tensor,
    candidates: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `rerank`, with candidates [T, C] int32 that are physical slots, 64·page + offset, of SGLang's index-K pool.

    pool [P, 8448] uint8: a page is 64 keys × 128 bytes of fp8 e4m3, then 64 fp32 scales; 64·P < 2^31.
    """
    expect("pool", pool, (pool.shape[0], PAGE_BYTES), torch.uint8)
    keys, scales = pool.view(torch.float8_e4m3fn), pool.view(torch.float32)
    return _launch(index_q, head_gates, keys, scales, len(pool) * PAGE, candidates, counts, out, paged=True)


def _launch(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    keys: int,
    candidates: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor | None,
    *,
    paged: bool,
) -> torch.Tensor:
    rows, index_heads, _ = index_q.shape
    width = candidates.shape[1]
    if index_heads not in INDEX_HEADS:
        raise ValueError(f"index_q: expected {' or '.join(map(str, INDEX_HEADS))} index heads, got {index_heads}")
    if out is None:
        out = torch.empty(rows, width, dtype=torch.float32, device=index_q.device)
    expect("index_q", index_q, (rows, index_heads, HEAD_DIM), torch.float8_e4m3fn)
    expect("head_gates", head_gates, (rows, index_heads), torch.float32)
    expect("counts", counts, (rows,), torch.int32)
    expect("candidates", candidates, (rows, width), torch.int32, row_stride=True)
    expect("out", out, (rows, width), torch.float32, row_stride=True)
    span = _SPAN if rows * triton.cdiv(width, _SPAN) >= _FILLING_PROGRAMS else _TILE
    if rows and width:
        rerank_fwd_kernel[(rows, triton.cdiv(width, span))](
            index_q,
            head_gates,
            index_k,
            k_scale,
            candidates,
            counts,
            out,
            keys,
            width,
            span,
            candidates.stride(0),
            out.stride(0),
            H=index_heads,
            TILE=_TILE,
            HEAD_DIM=HEAD_DIM,
            PAGED=paged,
            PAGE=PAGE,
            PAGE_BYTES=PAGE_BYTES,
            num_warps=_WARPS,
            num_stages=_STAGES,
            maxnreg=_MAXNREG,
        )
    return out
