"""Decode on SGLang's index-K pages: score the tokens of the kept pages with all heads, take the exact top k of them.

The pipeline of a decode step is two launches: `keep_blocks` reads page means and lists the pages worth reading,
`topk_kept` scores their tokens and the last program of a row selects.
Bytes of a row: 4 a token of prefix for the means, 132 a kept token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .keep_blocks import HEAD_DIM, PAGE, KeepTuning, KeptPages, keep_blocks, last_of, launch_options
from .rank_select import MAX_ROW, NOTHING, kth_largest, order_key, places, wins_and_ties

WIDE_LOAD = 4 * 32  # fp32 elements that a warp loads at once


@dataclass(frozen=True)
class DecodeScratch:
    """Everything a decode call writes besides its result. See `KeptPages` for `kept`.

    logits: fp32 [R, (blocks + 1) · block_size]  scores of the kept tokens in their kept order; unwritten past
            kept.lens, and in a row that keeps no more than k
    done:   int32 [R]  programs that have finished; zero between launches
    """

    kept: KeptPages
    logits: torch.Tensor
    done: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, table_width: int, blocks: int, block_size: int, device: torch.device) -> DecodeScratch:
        """Room for `rows` rows. Allocate once for a shape, outside of graph capture; all layers of a step share it."""
        return cls(
            kept=KeptPages.allocate(rows, table_width, blocks, block_size, device),
            logits=torch.empty(rows, (blocks + 1) * block_size, dtype=torch.float32, device=device),
            done=torch.zeros(rows, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class ScoreTuning:
    """How a launch is cut: a program of `warps` warps scores `tiles` times `pages` pages, `stages` loads in flight.

    `split` selects in a launch of its own with `topk_warps` warps instead of in the last program of the row.
    """

    pages: int = 2
    tiles: int = 1
    warps: int = 8
    stages: int = 3
    split: bool = False
    topk_warps: int = 8


def decode_topk(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    pool: torch.Tensor,
    page_means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    scratch: DecodeScratch,
    out: torch.Tensor,
    positions: torch.Tensor | None = None,
    head_ids: torch.Tensor | None = None,
    keep: KeepTuning | None = None,
    score: ScoreTuning | None = None,
) -> None:
    """Top k of the tokens in the best blocks of every row, as physical slots: decode with HISA's block filter.

    Stands in for DeepGEMM's `fp8_paged_mqa_logits` and SGLang's `topk_transform_512_v2`. The number of blocks nb is the
    scratch's; see `keep_blocks` for which are kept. A row with len // B <= nb equals DSA, one with len <= k gets its
    tokens exactly. There is no room for other exact rows: a length gate above nb · B + B - 1 is the caller's to refuse.
    The launches and grids depend on shapes alone: safe to capture in a CUDA graph.

    index_q:    float8_e4m3fn [R, H, 128], contiguous; one row a query, so verify rows bring their own length
    head_gates: fp32 [R, H], contiguous; the query's scale and the softmax scale folded in
    pool:       uint8 [num_pages, 8448]: 64 keys of 128 fp8, then their 64 fp32 scales
    page_means: bf16 [num_pages, 128]; valid for complete pages
    page_table: int32 [R, W]; entries past ceil(len / 64) are stale and never followed
    seq_lens:   int32 [R], 0 <= len <= 64 · W
    out:        int32 [R, k]: page · 64 + offset, in the order of the row, -1 behind the last
    positions:  int32 [R, k], optional: the same tokens as positions in the row
    head_ids:   int32 [R, h], optional: routed heads, the only ones in token scores (block scores use all)
    """
    rows = index_q.shape[0]
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
    topk_kept(
        index_q,
        head_gates,
        pool,
        block_size=block_size,
        scratch=scratch,
        out=out,
        positions=positions,
        head_ids=head_ids,
        tuning=score or score_tuning(rows),
    )


def keep_tuning(rows: int) -> KeepTuning:
    """The measured choice for `rows` rows on Hopper: small tiles spread a few rows over all SMs."""
    return KeepTuning(tile=32) if rows < 8 else KeepTuning(tile=64)


def score_tuning(rows: int) -> ScoreTuning:
    """The measured choice for `rows` rows on Hopper: with many rows a program keeps its queries for more pages."""
    return ScoreTuning() if rows < 8 else ScoreTuning(tiles=4, split=True, topk_warps=16)


def topk_kept(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    pool: torch.Tensor,
    *,
    block_size: int,
    scratch: DecodeScratch,
    out: torch.Tensor,
    positions: torch.Tensor | None = None,
    head_ids: torch.Tensor | None = None,
    tuning: ScoreTuning = ScoreTuning(),
) -> None:
    """Score the tokens of `scratch.kept` and select: I[s] = k_scale[s] · Σ_j w_j · ReLU(q_j · k_s), exact top k.

    Shapes and dtypes as in `decode_topk`. Ties fall to the older token; NaN takes only places no number wants.
    """
    rows, heads, _ = index_q.shape
    kept, topk = scratch.kept, out.shape[1]
    room = scratch.logits.shape[1]
    capacity = room - block_size
    if not topk <= capacity <= room <= MAX_ROW:
        raise ValueError(
            f"blocks · block_size: expected k = {topk} to {MAX_ROW - block_size} tokens, got {capacity}; "
            "change the number of blocks"
        )
    n_main, n_more = _row_shape(room, tuning.topk_warps if tuning.split else tuning.warps)
    interpreted = index_q.device.type == "cpu"
    select = {
        "ROOM": room,
        "N_MAIN": n_main,
        "N_MORE": n_more,
        "PAGE": PAGE,
        "BLOCK": block_size,
        "TOPK": topk,
        "TOPK_PAD": triton.next_power_of_2(topk),
        "POSITIONS": positions is not None,
    }
    results = (scratch.logits, kept.pages, kept.blocks, kept.lens, out, out if positions is None else positions)
    programs = triton.cdiv(kept.pages.shape[1], tuning.pages * tuning.tiles)
    _score_kernel[(programs, rows)](
        index_q,
        head_gates,
        index_q if head_ids is None else head_ids,
        pool.view(torch.float8_e4m3fn),
        pool.view(torch.float32),
        *results,
        scratch.done,
        HEADS=heads,
        ROUTED=0 if head_ids is None else head_ids.shape[1],
        DIM=HEAD_DIM,
        PAGE_BYTES=pool.stride(0),
        TILE_PAGES=tuning.pages,
        TILES=tuning.tiles,
        STAGES=tuning.stages,
        SPLIT=tuning.split,
        **select,
        **launch_options(interpreted, tuning.warps),
    )
    if tuning.split:
        _topk_kernel[(rows,)](*results, **select, **launch_options(interpreted, tuning.topk_warps))


def _row_shape(room: int, warps: int) -> tuple[int, int]:
    """(N, M): a row of `room` scores as two powers of two, M = 0 where padding N alone costs little.

    M is at least one load of all `warps`, so that partial counts of both parts meet inside a thread.
    """
    n_main = 1 << (room.bit_length() - 1)
    rest = room - n_main
    if rest == 0 or 4 * rest > n_main:
        return triton.next_power_of_2(room), 0
    return n_main, max(triton.next_power_of_2(rest), min(warps * WIDE_LOAD, n_main))


@triton.jit
def _score_kernel(
    q,
    gates,
    head_ids,
    keys,
    scales,
    logits,
    kept_pages,
    kept_blocks,
    kept_lens,
    out,
    positions,
    done,
    HEADS: tl.constexpr,
    ROUTED: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    ROOM: tl.constexpr,
    N_MAIN: tl.constexpr,
    N_MORE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    TILE: tl.constexpr = TILE_PAGES * PAGE
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        if SPLIT:
            gdc_launch_dependents()
    n = tl.load(kept_lens + i_r)
    chooses = n > TOPK
    n_programs = tl.where(chooses, tl.cdiv(n, TILE * TILES), 1)
    if i_t >= n_programs:
        return

    if chooses:
        o_h = tl.arange(0, HEADS)
        o_d = tl.arange(0, DIM)
        o_s = tl.arange(0, TILE)
        b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :])  # [HEADS, DIM]
        b_w = tl.load(gates + i_r * HEADS + o_h)
        if ROUTED > 0:
            o_i = tl.arange(0, ROUTED)
            ids = tl.load(head_ids + i_r * ROUTED + o_i)
            b_w = tl.where(tl.sum((ids[None, :] == o_h[:, None]).to(tl.int32), 1) > 0, b_w, 0.0)
        b_qt = tl.trans(b_q)
        for i in tl.range(TILES, num_stages=STAGES):
            o_n = (i_t * TILES + i) * TILE + o_s
            m_n = o_n < n
            page = tl.load(kept_pages + i_r * (ROOM // PAGE) + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
            offset = o_n % PAGE
            p_k = keys + page * PAGE_BYTES + offset * DIM
            b_k = tl.load(
                p_k[:, None] + o_d[None, :]
            )  # past the end page 0 stands in: always there, its scores are not stored
            b_scale = tl.load(scales + page * (PAGE_BYTES // 4) + (PAGE * DIM // 4) + offset, mask=m_n, other=0.0)
            b_s = tl.dot(b_k, b_qt)  # [TILE, HEADS]
            score = tl.sum(tl.maximum(b_s, 0.0) * b_w[None, :], 1) * b_scale
            tl.store(logits + i_r * ROOM + o_n, score, mask=m_n)

    if not SPLIT:  # noqa: SIM102 (the first is decided when the kernel is compiled)
        if last_of(done + i_r, n_programs):
            _select(
                i_r, n, logits, kept_pages, kept_blocks, out, positions,
                ROOM, N_MAIN, N_MORE, PAGE, BLOCK, TOPK, TOPK_PAD, POSITIONS,
            )  # fmt: skip


@triton.jit
def _topk_kernel(
    logits,
    kept_pages,
    kept_blocks,
    kept_lens,
    out,
    positions,
    ROOM: tl.constexpr,
    N_MAIN: tl.constexpr,
    N_MORE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
    n = tl.load(kept_lens + i_r)
    _select(
        i_r, n, logits, kept_pages, kept_blocks, out, positions,
        ROOM, N_MAIN, N_MORE, PAGE, BLOCK, TOPK, TOPK_PAD, POSITIONS,
    )  # fmt: skip


@triton.jit
def _select(
    i_r,
    n,
    logits,
    kept_pages,
    kept_blocks,
    out,
    positions,
    ROOM: tl.constexpr,
    N_MAIN: tl.constexpr,
    N_MORE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Write the slots (and positions) of the TOPK best of the row's `n` kept tokens, in the row's order, then -1."""
    o_main = tl.arange(0, N_MAIN)
    key = _keys(i_r, o_main, n, logits, ROOM)
    if N_MORE > 0:
        o_more = N_MAIN + tl.arange(0, N_MORE)
        more = _keys(i_r, o_more, n, logits, ROOM)
    else:
        more = None
    threshold, room = kth_largest(key, more, n, TOPK)
    pair = wins_and_ties(key, threshold)
    if N_MORE > 0:
        taken, place = places(wins_and_ties(more, threshold), tl.sum(pair, 0), room)
        _emit(i_r, o_more, taken, place, kept_pages, kept_blocks, out, positions, ROOM, PAGE, BLOCK, TOPK, POSITIONS)
    taken, place = places(pair, 0, room)
    _emit(i_r, o_main, taken, place, kept_pages, kept_blocks, out, positions, ROOM, PAGE, BLOCK, TOPK, POSITIONS)

    o_k = tl.arange(0, TOPK_PAD)
    m_k = (o_k >= n) & (o_k < TOPK)
    tl.store(out + i_r * TOPK + o_k, -1, mask=m_k)
    if POSITIONS:
        tl.store(positions + i_r * TOPK + o_k, -1, mask=m_k)


@triton.jit
def _keys(i_r, o_n, n, logits, ROOM: tl.constexpr):
    # masked by a constant so that the load stays wide: what the row has not written is replaced afterwards
    score = tl.load(logits + i_r * ROOM + o_n, mask=o_n < ROOM, other=0.0, cache_modifier=".cg")
    return tl.where(o_n < n, order_key(score), NOTHING)


@triton.jit
def _emit(
    i_r,
    o_n,
    taken,
    place,
    kept_pages,
    kept_blocks,
    out,
    positions,
    ROOM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    page = tl.load(kept_pages + i_r * (ROOM // PAGE) + o_n // PAGE, mask=taken, other=0)
    tl.store(out + i_r * TOPK + place, page * PAGE + o_n % PAGE, mask=taken)
    if POSITIONS:
        block = tl.load(kept_blocks + i_r * (ROOM // BLOCK) + o_n // BLOCK, mask=taken, other=0)
        tl.store(positions + i_r * TOPK + place, block * BLOCK + o_n % BLOCK, mask=taken)
