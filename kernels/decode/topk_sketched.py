"""Decode over page sketches: the pipeline of a step, and all-head scores of the candidates.

A step is five launches, each overlapping the end of the one before: `route_pages` chooses the columns of a row on
page means, `scan_sketches` scores every sketched token by them, `list_candidates` takes the best C, `rescore` scores
those with all heads on the stored keys, `topk_listed` selects.
Bytes of a row: 4 a token of prefix for the router, 4 + 16 · bits + 2 for the scan, 132 a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.decode.keep_blocks import launch_options
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns, route_pages
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches
from sglang_misa.kernels.decode.topk_kept import topk_listed
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES, sketch_bytes

TILE, WARPS = 256, 4  # candidates and warps of a program that scores them


@dataclass(frozen=True)
class SketchScratch:
    """Everything a step writes besides its result, and its policy. All layers share one object.

    columns:   see `Columns`
    keys:      uint16 [R, W · 64]  scores of the sketched tokens, as `score_keys`
    positions: int32 [R, C]  candidates, ascending
    logits:    fp32 [R, C]  their scores with all heads
    """

    policy: SketchPolicy
    columns: Columns
    keys: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def allocate(
        cls, rows: int, table_width: int, index_heads: int, policy: SketchPolicy, device: torch.device
    ) -> SketchScratch:
        """Room for `rows` rows of page tables of at most `table_width` pages. Allocate outside of graph capture."""
        columns = index_heads if policy.heads is None else policy.heads + policy.residual
        return cls(
            policy=policy,
            columns=Columns.allocate(rows, columns, device),
            keys=torch.empty(rows, table_width * PAGE, dtype=torch.uint16, device=device),
            positions=torch.empty(rows, policy.candidates, dtype=torch.int32, device=device),
            logits=torch.empty(rows, policy.candidates, dtype=torch.float32, device=device),
        )

    def first(self, rows: int) -> SketchScratch:
        """The same memory for the first `rows` rows."""
        columns = self.columns.first(rows)
        return SketchScratch(self.policy, columns, self.keys[:rows], self.positions[:rows], self.logits[:rows])


def sketch_topk(rows: PagedRows, stats: PageSketch, *, scratch: SketchScratch, out: Chosen) -> None:
    """Top k, by all heads, of each row's C best tokens on its pages' sketches, as physical slots.

    Stands in for DeepGEMM's `fp8_paged_mqa_logits` and SGLang's `topk_transform_512_v2`. A row of at most C tokens
    equals DSA, one of at most k gets its tokens exactly. The tokens of the newest complete page and those behind it are
    always candidates: that page may have been completed in this step, at whose end its statistics are written. So a
    request's rows, a token and its drafts, are at most 64. Launches and grids depend on shapes alone: safe to capture
    in a CUDA graph.

    rows:    their page table is at most as wide as the scratch's
    stats:   of the same pages
    scratch: of R rows (`first`); it also says heads, router, residual and candidates
    """
    count, width, policy = len(rows), rows.page_table.shape[1], scratch.policy
    expect("stats.sketches", stats.sketches, (len(rows.index_k_pages), sketch_bytes(stats.bits)), torch.uint8)
    if len(scratch.keys) != count or scratch.keys.shape[1] < width * PAGE:
        raise ValueError(
            f"scratch: expected {count} rows of at least {width} pages, got {len(scratch.keys)} of "
            f"{scratch.keys.shape[1] // PAGE}; allocate it for the widest page table and pass scratch.first({count})"
        )
    if out.topk > policy.candidates:
        raise ValueError(f"candidates: expected at least k = {out.topk}, got {policy.candidates}; raise the candidates")
    route_pages(rows, stats.means, policy, out=scratch.columns)
    scan_sketches(scratch.columns, rows, stats, policy, scores=scratch.keys)
    list_candidates(scratch.keys, rows.seq_lens, positions=scratch.positions)
    rescore(rows, topk=out.topk, scratch=scratch)
    topk_listed(scratch.logits, scratch.positions, rows.page_table, rows.seq_lens, out)


def rescore(rows: PagedRows, *, topk: int, scratch: SketchScratch) -> None:
    """Write scratch.logits: I[s] = k_scale[s] · Σ_j w_j · ReLU(q_j · k_s) of the tokens s at `scratch.positions`.

    Rows of no more than `topk` tokens need no scores and get none.
    """
    candidates = scratch.policy.candidates
    _rescore_kernel[(triton.cdiv(candidates, TILE), len(rows))](
        rows.index_q,
        rows.head_gates,
        rows.index_k_pages.view(torch.float8_e4m3fn),
        rows.index_k_pages.view(torch.float32),
        rows.page_table,
        rows.seq_lens,
        scratch.positions,
        scratch.logits,
        rows.page_table.stride(0),
        HEADS=rows.index_heads,
        DIM=HEAD_DIM,
        PAGE=PAGE,
        PAGE_BYTES=PAGE_BYTES,
        CANDIDATES=candidates,
        TOPK=topk,
        TILE=TILE,
        **launch_options(rows.interpreted, WARPS),
    )


@triton.jit(do_not_specialize=["table_stride"])
def _rescore_kernel(
    q,
    gates,
    keys,
    scales,
    table,
    seq_lens,
    positions,
    logits,
    table_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TOPK: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    o_h = tl.arange(0, HEADS)
    o_d = tl.arange(0, DIM)
    o_n = i_t * TILE + tl.arange(0, TILE)

    # All but the positions is older than the launch before this one, which began its dependents once that was complete.
    length = tl.load(seq_lens + i_r)
    n = tl.minimum(length, CANDIDATES)
    b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :], cache_modifier=".cg")  # [HEADS, DIM]
    b_w = tl.load(gates + i_r * HEADS + o_h, cache_modifier=".cg")
    b_qt = tl.trans(b_q)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if (length <= TOPK) | (i_t * TILE >= n):
        return

    m_n = o_n < n
    position = tl.load(positions + i_r * CANDIDATES + o_n, mask=m_n, other=0, cache_modifier=".cg")
    page = tl.load(table + i_r * table_stride + position // PAGE).to(tl.int64)
    offset = position % PAGE
    p_k = keys + page * PAGE_BYTES + offset * DIM
    b_k = tl.load(p_k[:, None] + o_d[None, :])  # past the end token 0 stands in: always there, not stored
    b_scale = tl.load(scales + page * (PAGE_BYTES // 4) + (PAGE * DIM // 4) + offset)
    b_s = tl.dot(b_k, b_qt)  # [TILE, HEADS]
    score = tl.sum(tl.maximum(b_s, 0.0) * b_w[None, :], 1) * b_scale
    tl.store(logits + i_r * CANDIDATES + o_n, score, mask=m_n)
