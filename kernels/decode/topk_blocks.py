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

from sglang_misa.kernels.decode.keep_blocks import KeepTuning, KeptPages, keep_blocks, launch_options
from sglang_misa.kernels.decode.topk_kept import MAX_ROW, topk_kept
from sglang_misa.kernels.layout import HEAD_DIM, PAGE


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


def decode_topk(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    index_k_pages: torch.Tensor,
    page_means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    scratch: DecodeScratch,
    out: torch.Tensor,
    positions: torch.Tensor | None = None,
    keep: KeepTuning | None = None,
    score: ScoreTuning | None = None,
) -> None:
    """Top k of the tokens in the best blocks of every row, as physical slots: decode with HISA's block filter.

    Stands in for DeepGEMM's `fp8_paged_mqa_logits` and SGLang's `topk_transform_512_v2`. The number of blocks nb is the
    scratch's; see `keep_blocks` for which are kept. A row with len // B <= nb equals DSA, one with len <= k gets its
    tokens exactly. There is no room for other exact rows: a length gate above nb · B + B - 1 is the caller's to refuse.
    The launches and grids depend on shapes alone: safe to capture in a CUDA graph.

    index_q:       float8_e4m3fn [R, H, 128], contiguous; one row a query, so verify rows bring their own length
    head_gates:    fp32 [R, H], contiguous; the query's scale and the softmax scale folded in
    index_k_pages: uint8 [num_pages, 8448]: 64 keys of 128 fp8, then their 64 fp32 scales
    page_means:    bf16 [num_pages, 128]; valid for complete pages
    page_table:    int32 [R, W]; entries past ceil(len / 64) are stale and never followed
    seq_lens:      int32 [R], 0 <= len <= 64 · W
    out:           int32 [R, k]: page · 64 + offset, in the order of the row, -1 behind the last
    positions:     int32 [R, k], optional: the same tokens as positions in the row
    """
    rows, topk = index_q.shape[0], out.shape[1]
    room = scratch.logits.shape[1]
    if not topk <= room - block_size <= MAX_ROW - block_size:
        raise ValueError(
            f"blocks · block_size: expected k = {topk} to {MAX_ROW - block_size} tokens, got {room - block_size}; "
            "change the number of blocks"
        )
    keep_blocks(
        index_q,
        head_gates,
        page_means,
        page_table,
        seq_lens,
        block_size=block_size,
        out=scratch.kept,
        tuning=keep or keep_tuning(rows),
    )
    score_kept(
        index_q,
        head_gates,
        index_k_pages,
        seq_lens,
        block_size=block_size,
        topk=topk,
        scratch=scratch,
        tuning=score or ScoreTuning(),
    )
    topk_kept(scratch.logits, scratch.kept, block_size=block_size, out=out, positions=positions)


def keep_tuning(rows: int) -> KeepTuning:
    """The measured choice for `rows` rows on an H100: small programs spread a few rows over all multiprocessors."""
    if rows < 4:
        return KeepTuning(pages=64, warps=8)
    return KeepTuning(pages=64 if rows < 32 else 128, warps=4)


def score_kept(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    index_k_pages: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    topk: int,
    scratch: DecodeScratch,
    tuning: ScoreTuning = ScoreTuning(),
) -> None:
    """Write scratch.logits: I[s] = k_scale[s] · Σ_j w_j · ReLU(q_j · k_s) of the tokens on `scratch.kept.pages`.

    Rows that keep no more than `topk` tokens need no scores and get none. Shapes and dtypes as in `decode_topk`.
    """
    rows, heads, _ = index_q.shape
    kept = scratch.kept
    interpreted = index_q.device.type == "cpu"
    programs = triton.cdiv(kept.pages.shape[1], tuning.pages)
    _score_kernel[(programs, rows)](
        index_q,
        head_gates,
        index_k_pages.view(torch.float8_e4m3fn),
        index_k_pages.view(torch.float32),
        seq_lens,
        kept.pages,
        scratch.logits,
        HEADS=heads,
        DIM=HEAD_DIM,
        PAGE=PAGE,
        PAGE_BYTES=index_k_pages.stride(0),
        BLOCK=block_size,
        KEEP=kept.blocks.shape[1] - 1,
        ROOM=scratch.logits.shape[1],
        TOPK=topk,
        TILE_PAGES=tuning.pages,
        **launch_options(interpreted, tuning.warps),
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
