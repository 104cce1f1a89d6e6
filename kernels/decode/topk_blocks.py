"""Decode on SGLang's index-K pages: the pipeline of a step, and the scores of the kept tokens with all heads.

A step is three launches, each overlapping the end of the one before: `keep_blocks` reads page means and lists the pages
worth reading, `score_kept` scores their tokens, `topk_kept` selects.
Bytes of a row: 4 a token of prefix for the means, 132 a kept token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_misa.kernels.checks import expect_blocks
from sglang_misa.kernels.decode.keep_blocks import KeepTuning, KeptPages, keep_blocks, launch_options
from sglang_misa.kernels.decode.operands import Chosen, PagedRows
from sglang_misa.kernels.decode.topk_kept import topk_kept
from sglang_misa.kernels.layout import HEAD_DIM, MAX_KEPT_DECODE, PAGE


@dataclass(frozen=True)
class DecodeScratch:
    """Everything a decode call writes besides its result. See `KeptPages` for `kept`.

    logits: fp32 [R, (blocks + 1) · block_size]  scores of the kept tokens in their kept order; unwritten past
            kept.lens, and in a row that keeps no more than k
    """

    kept: KeptPages
    logits: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, table_width: int, blocks: int, block_size: int, device: torch.device) -> DecodeScratch:
        """Room for `rows` rows. Allocate once for a shape, outside of graph capture; all layers of a step share it."""
        return cls(
            kept=KeptPages.allocate(rows, table_width, blocks, block_size, device),
            logits=torch.empty(rows, (blocks + 1) * block_size, dtype=torch.float32, device=device),
        )

    def first(self, rows: int) -> DecodeScratch:
        """The same memory for the first `rows` rows."""
        return DecodeScratch(self.kept.first(rows), self.logits[:rows])


@dataclass(frozen=True)
class ScoreTuning:
    """How a launch is cut: a program of `warps` warps scores `pages` pages. Looping over more of them never paid."""

    pages: int = 2
    warps: int = 4


@dataclass(frozen=True)
class Cut:
    """How the launches of a step are cut; None: the default for the rows."""

    keep: KeepTuning | None = None
    score: ScoreTuning | None = None


def decode_topk(
    rows: PagedRows, page_means: torch.Tensor, *, scratch: DecodeScratch, out: Chosen, cut: Cut = Cut()
) -> None:
    """Top k of the tokens in the best blocks of every row, as physical slots: decode with HISA's block filter.

    Stands in for DeepGEMM's `fp8_paged_mqa_logits` and SGLang's `topk_transform_512_v2`. The number of blocks nb and
    their size B are the scratch's; see `keep_blocks` for which are kept. A row with len // B <= nb equals DSA, one with
    len <= k gets its tokens exactly. There is no room for other exact rows: a length gate above nb · B + B - 1 is the
    caller's to refuse. The launches and grids depend on shapes alone: safe to capture in a CUDA graph.

    page_means: bf16 [P, 128]; valid for complete pages
    """
    room, block_size = scratch.logits.shape[1], scratch.kept.block_size
    expect_blocks(scratch.kept.blocks.shape[1] - 1, block_size, out.topk)
    if room > MAX_KEPT_DECODE:
        raise ValueError(
            f"blocks · block_size: expected at most {MAX_KEPT_DECODE - block_size} tokens, got {room - block_size}; "
            "change the number of blocks"
        )
    keep_blocks(rows, page_means, out=scratch.kept, tuning=cut.keep or keep_tuning(len(rows)))
    score_kept(rows, topk=out.topk, scratch=scratch, tuning=cut.score or ScoreTuning())
    topk_kept(scratch.logits, scratch.kept, out)


def keep_tuning(rows: int) -> KeepTuning:
    """The choice for `rows` rows: small programs spread a few rows over all multiprocessors."""
    if rows < 4:
        return KeepTuning(pages=64, warps=8)
    return KeepTuning(pages=64 if rows < 32 else 128, warps=4)


def score_kept(rows: PagedRows, *, topk: int, scratch: DecodeScratch, tuning: ScoreTuning = ScoreTuning()) -> None:
    """Write scratch.logits: I[s] = k_scale[s] · Σ_j w_j · ReLU(q_j · k_s) of the tokens on `scratch.kept.pages`.

    Rows that keep no more than `topk` tokens need no scores and get none.
    """
    kept = scratch.kept
    programs = triton.cdiv(kept.pages.shape[1], tuning.pages)
    _score_kernel[(programs, len(rows))](
        rows.index_q,
        rows.head_gates,
        rows.index_k_pages.view(torch.float8_e4m3fn),
        rows.index_k_pages.view(torch.float32),
        rows.seq_lens,
        kept.pages,
        scratch.logits,
        HEADS=rows.index_heads,
        DIM=HEAD_DIM,
        PAGE=PAGE,
        PAGE_BYTES=rows.index_k_pages.stride(0),
        BLOCK=kept.block_size,
        KEEP=kept.blocks.shape[1] - 1,
        ROOM=scratch.logits.shape[1],
        TOPK=topk,
        TILE_PAGES=tuning.pages,
        **launch_options(rows.interpreted, tuning.warps),
    )


@triton.jit
def _score_kernel(
    q,
    gates,
    keys,
    scales,
    seq_lens,
    kept_pages,
    logits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    ROOM: tl.constexpr,
    TOPK: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TILE: tl.constexpr = TILE_PAGES * PAGE
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    o_h = tl.arange(0, HEADS)
    o_d = tl.arange(0, DIM)
    o_n = i_t * TILE + tl.arange(0, TILE)

    # All but the pages is older than the launch before this one, which began its dependents once that was complete.
    length = tl.load(seq_lens + i_r)
    n = tl.minimum(length // BLOCK, KEEP) * BLOCK + length % BLOCK
    b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :], cache_modifier=".cg")  # [HEADS, DIM]
    b_w = tl.load(gates + i_r * HEADS + o_h, cache_modifier=".cg")
    b_qt = tl.trans(b_q)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if (n <= TOPK) | (i_t * TILE >= n):
        return

    m_n = o_n < n
    page = tl.load(kept_pages + i_r * (ROOM // PAGE) + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
    offset = o_n % PAGE
    p_k = keys + page * PAGE_BYTES + offset * DIM
    b_k = tl.load(p_k[:, None] + o_d[None, :])  # past the end page 0 stands in: always there, not stored
    b_scale = tl.load(scales + page * (PAGE_BYTES // 4) + (PAGE * DIM // 4) + offset, mask=m_n, other=0.0)
    b_s = tl.dot(b_k, b_qt)  # [TILE, HEADS]
    score = tl.sum(tl.maximum(b_s, 0.0) * b_w[None, :], 1) * b_scale
    tl.store(logits + i_r * ROOM + o_n, score, mask=m_n)
