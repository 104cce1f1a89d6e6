"""Head router and block scores: one pass of every index head over the pooled keys of each query's prefix.

For query t, head j and pooled key k̃_b (the mean of the keys of block b), with x = ReLU(q[t,j]·k̃_b):

    statistic  E[t,j] = Σ_b |w[t,j]·x|  (abs: the MISA paper, arXiv 2605.07363, Eq. 7–8, whose 1/M ranks alike)
               E[t,j] = Σ_b  w[t,j]·x   (signed)        E[t,j] = |w[t,j]|   (weight)
    heads      the h largest of E[t,·]; ties go to the lower head, and a NaN loses to every number
    scores     S[t,b] = Σ_j w[t,j]·x    over all heads (HISA, arXiv 2603.28458)

Only blocks complete at the row's own length count, b < row_len // block_size. A row that has none routes by |w|.
As in DeepGEMM, ReLU of a NaN is 0. A row's heads and scores do not depend on the rows and requests beside it.

A program holds up to 256 (query, head) columns against tiles of 64 pooled keys, so that the sum over heads stays nearly
inside a thread and the sum over blocks is elementwise; only the last tiles of a row pay for masks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from .layout import expect

HEAD_DIM = 128
PAGE = 64
INDEX_HEADS = (32, 64)
Router = Literal["abs", "signed", "weight"]
ROUTERS: tuple[Router, ...] = ("abs", "signed", "weight")

_TILE = 64  # pooled keys a step: the tensor-core rows of one warpgroup
_WIDE_FROM = 1024  # rows from which several queries share a program; below it each has its own, to fill the GPU


class _Launch(NamedTuple):
    """Columns = queries × heads of a program; the register cap lets programs of one SM hide each other's waits."""

    columns: int
    num_warps: int
    maxnreg: int
    num_stages: int = 2


_WIDE = _Launch(columns=256, num_warps=8, maxnreg=128)  # the fewest reads of pooled keys
_WIDE_SCORES = _Launch(columns=128, num_warps=4, maxnreg=168)  # the gates take the registers of half the columns

# The interpreter multiplies bf16 bits as integers; fp32 holds the same values.
_OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(do_not_specialize=["table_stride", "max_blocks"], do_not_specialize_on_alignment=["p_table", "p_lens"])
def pool_blocks_fwd_kernel(
    p_means,
    p_table,
    p_lens,
    p_out,
    table_stride,
    max_blocks,
    BLOCK_PAGES: tl.constexpr,
    BLOCK_PAGES_P2: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    i_block, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if i_block < tl.load(p_lens + i_row) // (BLOCK_PAGES * PAGE):
        o_page, o_dim = tl.arange(0, BLOCK_PAGES_P2), tl.arange(0, HEAD_DIM)
        m_page = o_page < BLOCK_PAGES
        i_page = tl.load(p_table + i_row * table_stride + i_block * BLOCK_PAGES + o_page, mask=m_page, other=0)
        # [BLOCK_PAGES_P2, HEAD_DIM]
        p_mean = p_means + i_page.to(tl.int64)[:, None] * HEAD_DIM + o_dim[None, :]
        b_mean = tl.load(p_mean, mask=m_page[:, None], other=0.0).to(tl.float32)
        b_pooled = tl.sum(b_mean, axis=0) * (1.0 / BLOCK_PAGES)
        tl.store(p_out + (i_row * max_blocks + i_block) * HEAD_DIM + o_dim, b_pooled.to(p_out.dtype.element_ty))


@triton.jit
def _score_tile(
    p_pooled,
    p_row_scores,
    b_q,
    b_gate,
    b_sum,
    b_col_blocks,
    b_row_blocks,
    m_row,
    start,
    stop,
    max_blocks,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROUTE: tl.constexpr,
    SCORES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of pooled keys against all columns: returns the running sum, stores the block scores of rows `m_row`."""
    o_block, o_dim = start + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    p_key = p_pooled + o_block[:, None] * HEAD_DIM + o_dim[None, :]
    # [TILE, HEAD_DIM]
    b_key = tl.load(p_key, mask=o_block[:, None] < stop, other=0.0) if MASKED else tl.load(p_key)
    # [TILE, ROWS * H]
    b_x = tl.maximum(tl.dot(b_key.to(_OPERAND), b_q), 0.0)
    if MASKED:
        b_x = tl.where(o_block[:, None] < b_col_blocks[None, :], b_x, 0.0)
    if ROUTE:
        # Rows r and r + 8 of a tensor-core tile lie in one thread: added first, they halve the running sum's registers.
        b_sum += tl.sum(tl.reshape(b_x, [TILE // 16, 2, 8, ROWS * H]), axis=1)
    if SCORES:
        # [TILE, ROWS]
        b_score = tl.sum(tl.reshape(b_x * b_gate[None, :], [TILE, ROWS, H]), axis=2)
        m_score = m_row[None, :]
        if MASKED:
            b_score = tl.where(o_block[:, None] < b_row_blocks[None, :], b_score, float("-inf"))
            m_score = m_score & (o_block[:, None] < max_blocks)
        tl.store(p_row_scores[None, :] + o_block[:, None], b_score, mask=m_score)
    return b_sum


@triton.jit(do_not_specialize=["rows", "max_blocks", "span"], do_not_specialize_on_alignment=["p_batch", "p_len"])
def route_fwd_kernel(
    p_q,
    p_gate,
    p_pooled,
    p_batch,
    p_len,
    p_heads,
    p_scores,
    rows,
    max_blocks,
    span,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ROUTER: tl.constexpr,
    SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    ROUTE: tl.constexpr = HEADS > 0
    SUM: tl.constexpr = ROUTE and ROUTER != "weight"
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    i_row = tl.minimum(i_row, rows - 1).to(tl.int64)
    b_row_batch = tl.load(p_batch + i_row)
    b_row_blocks = tl.where(m_row, tl.minimum(tl.load(p_len + i_row) // BLOCK_SIZE, max_blocks), 0)

    o_col, o_dim = tl.arange(0, ROWS * H), tl.arange(0, HEAD_DIM)
    i_col_row = tl.program_id(0) * ROWS + o_col // H
    m_col = i_col_row < rows
    i_col_row = tl.minimum(i_col_row, rows - 1).to(tl.int64)
    i_col = i_col_row * H + o_col % H
    # [ROWS * H]
    b_gate = tl.load(p_gate + i_col)
    b_sum = tl.zeros([TILE // 16, 8, ROWS * H], tl.float32)

    if SUM or SCORES:
        b_col_batch = tl.load(p_batch + i_col_row)
        b_col_blocks = tl.where(m_col, tl.minimum(tl.load(p_len + i_col_row) // BLOCK_SIZE, max_blocks), 0)
        # [HEAD_DIM, ROWS * H]
        b_q = tl.trans(tl.load(p_q + i_col[:, None] * HEAD_DIM + o_dim[None, :]).to(_OPERAND))
        first = tl.program_id(1) * span
        last = tl.minimum(first + span, max_blocks)
        # Nearly always one request; where requests meet, one pass for each with the other rows masked.
        for i_batch in range(tl.min(b_row_batch), tl.max(b_row_batch) + 1):
            m_own = m_row & (b_row_batch == i_batch)
            b_own_row = tl.where(m_own, b_row_blocks, 0)
            b_own_col = tl.where(b_col_batch == i_batch, b_col_blocks, 0)
            p_own = p_pooled + i_batch * (max_blocks.to(tl.int64) * HEAD_DIM)
            p_row_scores = p_scores + i_row * max_blocks
            stop = tl.minimum(tl.max(b_own_row), last)
            whole = first + tl.maximum(tl.minimum(tl.min(b_own_row), last) - first, 0) // TILE * TILE
            for start in range(first, whole, TILE):
                b_sum = _score_tile(
                    p_own, p_row_scores, b_q, b_gate, b_sum, b_own_col, b_own_row, m_own, start, stop, max_blocks,
                    H, ROWS, TILE, HEAD_DIM, SUM, SCORES, False,
                )  # fmt: skip
            for start in range(whole, stop, TILE):
                b_sum = _score_tile(
                    p_own, p_row_scores, b_q, b_gate, b_sum, b_own_col, b_own_row, m_own, start, stop, max_blocks,
                    H, ROWS, TILE, HEAD_DIM, SUM, SCORES, True,
                )  # fmt: skip
            if SCORES:
                for start in range(whole + tl.cdiv(tl.maximum(stop - whole, 0), TILE) * TILE, last, TILE):
                    o_block = start + tl.arange(0, TILE)
                    m_score = m_own[None, :] & (o_block[:, None] < max_blocks)
                    b_none = tl.full([TILE, ROWS], float("-inf"), tl.float32)
                    tl.store(p_row_scores[None, :] + o_block[:, None], b_none, mask=m_score)

    if ROUTE:
        # [ROWS, H]
        b_gate = tl.reshape(b_gate, [ROWS, H])
        b_stat = tl.abs(b_gate)
        if SUM:
            b_total = tl.reshape(tl.sum(tl.sum(b_sum, axis=0), axis=0), [ROWS, H])
            b_routed = (b_gate if ROUTER == "signed" else b_stat) * b_total
            b_stat = tl.where(b_row_blocks[:, None] > 0, b_routed, b_stat)
        # Integers in the order of the numbers: -0 equals 0, a NaN is under -inf.
        b_bits = tl.where(b_stat == 0.0, 0.0, b_stat).to(tl.int32, bitcast=True)
        b_key = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
        b_key = tl.where(b_stat == b_stat, b_key, -0x80000000)
        o_head = tl.arange(0, H)
        b_other, b_self = b_key[:, None, :], b_key[:, :, None]
        # [ROWS, H, H]: whether the last axis goes before the middle one
        m_lower = o_head[None, None, :] < o_head[None, :, None]
        m_before = (b_other > b_self) | ((b_other == b_self) & m_lower)
        m_chosen = tl.sum(m_before.to(tl.int32), axis=2) < HEADS
        b_place = tl.cumsum(m_chosen.to(tl.int32), axis=1) - 1
        b_head = tl.broadcast_to(o_head[None, :], [ROWS, H])
        tl.store(p_heads + i_row[:, None] * HEADS + b_place, b_head, mask=m_chosen & m_row[:, None])


def pool_blocks(
    means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean key of every complete block of every request: bf16 [B, W·64 // block_size, 128].

    means [P, 128] bf16 page means; page_table [B, W] int32 physical page ids; seq_lens [B] int32, at most 64·W;
    block_size: tokens, a multiple of 64; out: where to write. Entries of blocks that are not complete are left as
    they were. Raises ValueError for another layout.
    """
    rows, width = page_table.shape
    block_pages = block_size // PAGE
    if block_size % PAGE or block_pages < 1:
        raise ValueError(f"block_size: expected a positive multiple of {PAGE}, got {block_size}")
    expect("means", means, (means.shape[0], HEAD_DIM), torch.bfloat16)
    expect("seq_lens", seq_lens, (rows,), torch.int32)
    if page_table.dtype != torch.int32 or page_table.stride(1) != 1:
        raise ValueError(
            f"page_table: expected int32 [B, W] with unit column stride, got {page_table.dtype} with strides "
            f"{page_table.stride()}; pass physical page ids, not token slots"
        )
    max_blocks = width // block_pages
    if out is None:
        out = torch.empty(rows, max_blocks, HEAD_DIM, dtype=torch.bfloat16, device=means.device)
    expect("out", out, (rows, max_blocks, HEAD_DIM), torch.bfloat16)
    if rows and max_blocks:
        pool_blocks_fwd_kernel[(max_blocks, rows)](
            means,
            page_table,
            seq_lens,
            out,
            page_table.stride(0),
            max_blocks,
            BLOCK_PAGES=block_pages,
            BLOCK_PAGES_P2=triton.next_power_of_2(block_pages),
            PAGE=PAGE,
            HEAD_DIM=HEAD_DIM,
            num_warps=1,
        )
    return out


def route(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    block_means: torch.Tensor,
    row_batch: torch.Tensor,
    row_len: torch.Tensor,
    heads: int,
    block_size: int,
    router: Router = "abs",
    want_block_scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The h index heads each query is scored with, and on request its block scores, in one launch.

    index_q [T, H, 128] fp8 e4m3; head_gates [T, H] fp32; block_means [B, M, 128] bf16 from `pool_blocks`; row_batch [T]
    int32, the request of each row, best in order; row_len [T] int32, the tokens each row sees; heads h ≤ H ∈ {32, 64}.
    Returns head_ids int32 [T, h], ascending, and S fp32 [T, M] (-inf where a block is not complete) or None.
    Raises ValueError for another layout.
    """
    rows, index_heads = _check_rows(index_q, head_gates, block_means, row_batch, row_len)
    if not 1 <= heads <= index_heads:
        raise ValueError(f"heads: expected 1 to the model's {index_heads} index heads, got {heads}")
    if router not in ROUTERS:
        raise ValueError(f"router: expected one of {', '.join(ROUTERS)}, got {router!r}")
    head_ids = torch.empty(rows, heads, dtype=torch.int32, device=index_q.device)
    scores = _empty_scores(rows, block_means) if want_block_scores else None
    statistic = "weight" if heads == index_heads else router  # every head is chosen whatever its statistic
    _launch(index_q, head_gates, block_means, row_batch, row_len, head_ids, scores, block_size, statistic)
    return head_ids, scores


def block_scores(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    block_means: torch.Tensor,
    row_batch: torch.Tensor,
    row_len: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Block scores S fp32 [T, M] alone, for policies that prune tokens with all heads; few rows are split over blocks.

    Arguments and -inf as in `route`. Raises ValueError for another layout.
    """
    rows, _ = _check_rows(index_q, head_gates, block_means, row_batch, row_len)
    scores = _empty_scores(rows, block_means)
    _launch(index_q, head_gates, block_means, row_batch, row_len, None, scores, block_size, "weight")
    return scores


def _launch(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    block_means: torch.Tensor,
    row_batch: torch.Tensor,
    row_len: torch.Tensor,
    head_ids: torch.Tensor | None,
    scores: torch.Tensor | None,
    block_size: int,
    router: Router,
) -> None:
    rows, index_heads, _ = index_q.shape
    max_blocks = block_means.shape[1]
    wide = rows >= _WIDE_FROM
    launch = _WIDE_SCORES if scores is not None else _WIDE
    if not wide:
        launch = _Launch(columns=index_heads, num_warps=4, maxnreg=168)
    rows_each = launch.columns // index_heads
    # A sum over blocks stays in one program, so that its order is the same for every shape of the call.
    span = _TILE if head_ids is None and not wide else max(max_blocks, 1)
    grid = (triton.cdiv(rows, rows_each), max(triton.cdiv(max_blocks, span), 1))
    if rows:
        route_fwd_kernel[grid](
            index_q,
            head_gates,
            block_means,
            row_batch,
            row_len,
            head_gates if head_ids is None else head_ids,  # unread, but as aligned as head ids: no other build
            head_gates if scores is None else scores,
            rows,
            max_blocks,
            span,
            BLOCK_SIZE=block_size,
            H=index_heads,
            HEADS=0 if head_ids is None else head_ids.shape[1],
            ROUTER=router,
            SCORES=scores is not None,
            ROWS=rows_each,
            TILE=_TILE,
            HEAD_DIM=HEAD_DIM,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            maxnreg=launch.maxnreg,
        )


def _empty_scores(rows: int, block_means: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, block_means.shape[1], dtype=torch.float32, device=block_means.device)


def _check_rows(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    block_means: torch.Tensor,
    row_batch: torch.Tensor,
    row_len: torch.Tensor,
) -> tuple[int, int]:
    """T and H of a well-formed call."""
    rows, index_heads, _ = index_q.shape
    if index_heads not in INDEX_HEADS:
        raise ValueError(f"index_q: expected {' or '.join(map(str, INDEX_HEADS))} index heads, got {index_heads}")
    expect("index_q", index_q, (rows, index_heads, HEAD_DIM), torch.float8_e4m3fn)
    expect("head_gates", head_gates, (rows, index_heads), torch.float32)
    expect("block_means", block_means, (*block_means.shape[:2], HEAD_DIM), torch.bfloat16)
    expect("row_batch", row_batch, (rows,), torch.int32)
    expect("row_len", row_len, (rows,), torch.int32)
    return rows, index_heads
