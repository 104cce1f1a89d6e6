"""Decode over page sketches: the pipeline of a step, and all-head scores of the candidates.

A step is five launches, each overlapping the end of the one before: `route_pages` chooses the columns of a row on
page means, `scan_sketches` scores every sketched token by them, `list_candidates` takes the best C, `rescore` scores
those with all heads on the stored keys, `topk_listed` selects.
Bytes of a row: at most 64 KiB for the router, 4 + 16 · bits + 2 a token of prefix for the scan, 132 a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from sglang_misa.kernels.build import build, resident, stream_of
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns, route_pages
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches
from sglang_misa.kernels.decode.topk_kept import topk_listed
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, sketch_bytes
from sglang_misa.kernels.structs import Rescore

TILE = 64  # candidates of a product


@dataclass(frozen=True)
class SketchScratch:
    """Everything a step writes besides its result, and its policy. All layers share one object.

    columns:   see `Columns`
    keys:      uint16 [R, W · 64]  scores of the sketched tokens, as `score_keys`, until they are listed
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
    if rows.interpreted:
        _rescore_on_cpu(rows, topk, scratch)
        return
    if len(rows) == 0:
        return
    candidates, count = scratch.policy.candidates, len(rows)
    tiles = triton.cdiv(candidates, TILE)
    at_once = resident("sketch_rescore", index_heads=rows.index_heads)
    span = triton.cdiv(count * tiles, at_once)  # so that all blocks run at once
    call = Rescore(
        index_q=rows.index_q,
        head_gates=rows.head_gates,
        index_k_pages=rows.index_k_pages,
        pages=rows.page_table,
        lens=rows.seq_lens,
        positions=scratch.positions,
        logits=scratch.logits,
        pitch=rows.page_table.stride(0),
        candidates=candidates,
        topk=topk,
        span=span,
        blocks=triton.cdiv(tiles, span),
    )
    module = build("sketch_rescore", index_heads=rows.index_heads)
    module.rescore(bytes(call), count, stream_of(rows.index_q.device))


def _rescore_on_cpu(rows: PagedRows, topk: int, scratch: SketchScratch) -> None:
    """The same in PyTorch: what the steps around it are tested with."""
    for row, length in enumerate(rows.seq_lens.tolist()):
        if length <= topk:
            continue
        token = scratch.positions[row, :length].long()
        page, offset = rows.page_table[row, token // PAGE].long(), token % PAGE
        pages = rows.index_k_pages[page]
        every = torch.arange(len(token))
        keys = pages[:, : PAGE * HEAD_DIM].view(torch.float8_e4m3fn).float().view(-1, PAGE, HEAD_DIM)[every, offset]
        scales = pages[:, PAGE * HEAD_DIM :].contiguous().view(torch.float32)[every, offset]
        active = (keys @ rows.index_q[row].float().T).nan_to_num(0.0, torch.inf, -torch.inf).relu()
        scratch.logits[row, : len(token)] = active @ rows.head_gates[row] * scales
