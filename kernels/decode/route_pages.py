"""The scored columns of decode rows: the routed heads of each row, and the residual of its other heads (Triton).

One launch. The programs of a row multiply its heads with the means of its pages; the last one to finish ranks the
heads, gathers the routed queries and gates, and fuses the other heads to one linear column. Queries leave as signed
bytes, which is what the scan of sketches multiplies. Bytes: 256 for every 64 tokens of prefix, where the keys
themselves are 8448.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_misa.kernels.decode.keep_blocks import last_of, launch_options
from sglang_misa.kernels.decode.operands import PagedRows, SketchPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.kernels.prefill.route import ROUTERS

INT8_MAX = tl.constexpr(127.0)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
CHUNK = 32
TILE = 64  # pages of a product at most


@dataclass(frozen=True)
class RouteTuning:
    """How a launch is cut: a program of `warps` warps takes `pages` pages."""

    pages: int
    warps: int


FEW_ROWS = RouteTuning(64, 8)  # spreads them over all multiprocessors
MANY_ROWS = ((64, RouteTuning(512, 4)), (16, RouteTuning(256, 4)))  # from so many on, to read queries less often


@dataclass(frozen=True)
class Columns:
    """What a row's keys are multiplied with, and the scratch of choosing it.

    queries: int8 [R, columns, 128]  the routed heads in ascending order, then the residual, each with 127 at its
             largest number; unwritten in rows that do not choose
    gates:   fp32 [R, columns]  times what a unit of the column's query stands for
    partial: fp32 [R, programs, 3, H]  scratch: sum of the products, of their squared distances from the program's own
             mean, and the router's statistic
    done:    int32 [R]  scratch: programs that have finished; zero between launches
    """

    queries: torch.Tensor
    gates: torch.Tensor
    partial: torch.Tensor
    done: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, table_width: int, heads: int, columns: int, device: torch.device) -> Columns:
        """Room for `rows` rows of page tables with `table_width` columns. Allocate outside of graph capture: `done`
        must be zero before the first launch, and one object must not serve two streams at once."""
        programs = triton.cdiv(table_width, FEW_ROWS.pages)
        return cls(
            queries=torch.empty(rows, columns, HEAD_DIM, dtype=torch.int8, device=device),
            gates=torch.empty(rows, columns, dtype=torch.float32, device=device),
            partial=torch.empty(rows, programs, 3, heads, dtype=torch.float32, device=device),
            done=torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def first(self, rows: int) -> Columns:
        """The same memory for the first `rows` rows."""
        return Columns(*(getattr(self, field.name)[:rows] for field in fields(self)))


def tuning_of(rows: int) -> RouteTuning:
    return next((tuning for least, tuning in MANY_ROWS if rows >= least), FEW_ROWS)


def route_pages(rows: PagedRows, page_means: torch.Tensor, policy: SketchPolicy, *, out: Columns) -> None:
    """Fill `out` with the columns of every row of more tokens than the policy's candidates.

    `heads` None takes all of them. Fewer rank by |w| · mean ReLU(q·k̃) (`mean`), |w| · max ReLU(q·k̃) (`peak`),
    w · mean ReLU(q·k̃) (`signed`) or |w| (`weight`), over the means k̃ of the row's complete pages but the newest; ties
    fall to the lower head, NaN never wins.
    The residual is Σ w · Φ(μ/σ) · q of the heads that are not routed, μ and σ of their products; a head whose μ, σ or
    w is not finite adds nothing. NaN in a query counts as 0.

    page_means: bf16 [P, 128], contiguous
    """
    rows.check(page_means)
    width = rows.page_table.shape[1]
    tuning = tuning_of(len(rows))
    programs = 1 if policy.heads is None else triton.cdiv(width, tuning.pages)
    _route_kernel[(programs, len(rows))](
        rows.index_q,
        rows.head_gates,
        page_means,
        rows.page_table,
        rows.seq_lens,
        out.queries,
        out.gates,
        out.partial,
        out.done,
        rows.page_table.stride(0),
        width,
        out.partial.stride(0),
        policy.candidates,
        HEADS=rows.index_heads,
        ROUTED=rows.index_heads if policy.heads is None else policy.heads,
        ROUTER=ROUTERS.index(policy.router),
        RESIDUAL=policy.residual,
        DIM=HEAD_DIM,
        PAGE=PAGE,
        PAGES=tuning.pages,
        TILE=min(tuning.pages, TILE),
        CHUNK=CHUNK,
        EXACT=rows.interpreted,
        **launch_options(rows.interpreted, tuning.warps),
    )


@triton.jit
def _top_heads(statistic, HEADS: tl.constexpr, ROUTED: tl.constexpr):
    """(routed, place) [HEADS]: the ROUTED largest and their ascending places. NaN and -inf rank last, in this order."""
    o_h = tl.arange(0, HEADS)
    # NaN compares as the lowest: -inf above it would be one number too many
    x = tl.where(statistic > LOWEST, statistic, LOWEST)
    x = tl.where(statistic != statistic, float("-inf"), x)
    before = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (o_h[None, :] < o_h[:, None]))
    routed = tl.sum(before.to(tl.int32), 1) < ROUTED
    return routed, tl.cumsum(routed.to(tl.int32), 0) - 1


@triton.jit
def _positive_share(mean, variance):
    """Φ(μ/σ), 0 where either is not finite."""
    share = 0.5 * (1.0 + tl.erf(mean * tl.rsqrt(tl.where(variance > 0, variance, 1.0)) * 0.7071067811865476))
    share = tl.where(variance > 0, share, tl.where(mean > 0, 1.0, tl.where(mean == 0, 0.5, 0.0)))
    return tl.where((tl.abs(mean) < float("inf")) & (variance < float("inf")), share, 0.0)


@triton.jit
def _to_int8(x):
    """`reference.to_int8` of x [N, DIM]: int8 and units [N]."""
    WHOLE: tl.constexpr = 1.5 * 2**23  # a sum with it has no fraction
    most = tl.max(tl.abs(x), 1)
    usable = (most > 0) & (most < float("inf"))
    per_unit = tl.where(usable, tl.div_rn(INT8_MAX, tl.where(usable, most, 1.0)), 0.0)
    rounded = (tl.where(usable[:, None], x, 0.0) * per_unit[:, None] + WHOLE) - WHOLE
    return rounded.to(tl.int8), tl.where(usable, most * (1 / INT8_MAX), 0.0)


@triton.jit(do_not_specialize=["table_stride", "WIDTH", "partial_stride"])
def _route_kernel(
    q,
    gates,
    means,
    table,
    seq_lens,
    out_q,
    out_gates,
    partial,
    done,
    table_stride,
    WIDTH,
    partial_stride,
    LONGER_THAN: tl.constexpr,
    HEADS: tl.constexpr,
    ROUTED: tl.constexpr,
    ROUTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # of a program
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,  # programs whose results are read at once
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    COLUMNS: tl.constexpr = ROUTED + RESIDUAL
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_h = tl.arange(0, HEADS)
    o_d = tl.arange(0, DIM)
    o_t = tl.arange(0, TILE)
    length = tl.load(seq_lens + i_r)
    n_pages = length // PAGE - 1  # the newest may have been completed by this step
    if (length <= LONGER_THAN) | (i_t * PAGES >= n_pages):
        return

    b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :])  # [HEADS, DIM]
    b_w = tl.load(gates + i_r * HEADS + o_h)
    if ROUTED == HEADS:
        b_qf = b_q.to(tl.float32)
        b_column, unit = _to_int8(tl.where(b_qf == b_qf, b_qf, 0.0))
        tl.store(out_q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :], b_column)
        tl.store(out_gates + i_r * HEADS + o_h, b_w * unit)
        return

    # fp8 fits bf16, so the products are exact; the interpreter multiplies bf16 as integers, hence fp32 there
    b_qt = tl.trans(b_q.to(tl.float32)) if EXACT else tl.trans(b_q.to(tl.float32).to(tl.bfloat16))
    n_own = tl.minimum(n_pages - i_t * PAGES, PAGES)
    # added up place by place and folded once: Φ(μ/σ) is 0 or 1 long before squares cancel against their mean's
    b_total = tl.zeros([TILE, HEADS], tl.float32)
    b_squares = tl.zeros([TILE, HEADS], tl.float32)
    b_active = tl.zeros([TILE, HEADS], tl.float32)
    for begin in range(0, n_own, TILE):
        m_p = begin + o_t < n_own
        page = tl.load(table + i_r * table_stride + i_t * PAGES + begin + o_t, mask=m_p, other=0).to(tl.int64)
        b_k = tl.load(means + page[:, None] * DIM + o_d[None, :], mask=m_p[:, None], other=0.0)
        b_s = tl.dot(b_k.to(tl.float32) if EXACT else b_k, b_qt)  # [TILE, HEADS]; pages that are not there give 0
        b_total += b_s
        b_squares += b_s * b_s
        b_s = tl.maximum(b_s, 0.0)
        b_active = tl.maximum(b_active, b_s) if ROUTER == 1 else b_active + b_s
    p_partial = partial + i_r * partial_stride + i_t * (3 * HEADS) + o_h
    total = tl.sum(b_total, 0)
    tl.store(p_partial, total)
    tl.store(p_partial + HEADS, tl.maximum(tl.sum(b_squares, 0) - total * total / n_own.to(tl.float32), 0.0))
    tl.store(p_partial + 2 * HEADS, tl.max(b_active, 0) if ROUTER == 1 else tl.sum(b_active, 0))

    n_programs = tl.cdiv(n_pages, PAGES)
    if last_of(done + i_r, n_programs):
        n = n_pages.to(tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        statistic = tl.zeros([HEADS], tl.float32)
        p_row = partial + i_r * partial_stride + o_h[None, :]
        for chunk in range(0, n_programs, CHUNK):
            o_i = chunk + tl.arange(0, CHUNK)[:, None]
            p_part = p_row + o_i * (3 * HEADS)
            total += tl.sum(tl.load(p_part, mask=o_i < n_programs, other=0.0, cache_modifier=".cg"), 0)
            b_part = tl.load(p_part + 2 * HEADS, mask=o_i < n_programs, other=0.0, cache_modifier=".cg")
            if ROUTER == 1:
                statistic = tl.maximum(statistic, tl.max(b_part, 0))
            else:
                statistic += tl.sum(b_part, 0)
        mean = total / n
        if ROUTER != 1:
            statistic /= n
        if ROUTER == 3:
            statistic = tl.abs(b_w)
        elif ROUTER == 2:
            statistic *= b_w
        else:
            statistic *= tl.abs(b_w)
        if ROUTER != 3:
            statistic = tl.where(total != total, float("nan"), statistic)  # which maxima drop
        routed, place = _top_heads(statistic, HEADS, ROUTED)
        b_qf = b_q.to(tl.float32)
        b_qf = tl.where(b_qf == b_qf, b_qf, 0.0)
        b_column, unit = _to_int8(b_qf)
        p_q = out_q + (i_r * COLUMNS + place[:, None]) * DIM + o_d[None, :]
        tl.store(p_q, b_column, mask=routed[:, None])
        tl.store(out_gates + i_r * COLUMNS + place, b_w * unit, mask=routed)

        if RESIDUAL:
            squares = tl.zeros([HEADS], tl.float32)
            for chunk in range(0, n_programs, CHUNK):
                o_i = chunk + tl.arange(0, CHUNK)[:, None]
                p_part = p_row + o_i * (3 * HEADS)
                n_part = tl.maximum(tl.minimum(n_pages - o_i * PAGES, PAGES), 1).to(tl.float32)
                b_sum = tl.load(p_part, mask=o_i < n_programs, other=0.0, cache_modifier=".cg")
                off = b_sum / n_part - mean[None, :]
                b_part = tl.load(p_part + HEADS, mask=o_i < n_programs, other=0.0, cache_modifier=".cg")
                squares += tl.sum(b_part + tl.where(o_i < n_programs, n_part * off * off, 0.0), 0)
            weight = b_w * _positive_share(mean, squares / n)
            weight = tl.where(routed | ((tl.abs(weight) < float("inf")) == 0), 0.0, weight)
            b_rest = tl.sum(b_qf * weight[:, None], 0)[None, :]  # [1, DIM]
            b_column, unit = _to_int8(b_rest)
            tl.store(out_q + (i_r * COLUMNS + ROUTED) * DIM + o_d[None, :], b_column)
            tl.store(out_gates + i_r * COLUMNS + ROUTED + tl.arange(0, 1), unit)
