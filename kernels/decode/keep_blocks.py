"""The token blocks of a paged row that are worth reading: scored on the means of their keys, best `blocks` kept.

One launch. The programs of a row score its blocks; the last one to finish picks the best and lists their pages.
Bytes: 256 for every 64 tokens of prefix, where the keys themselves are 8448.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang_misa.kernels.decode.operands import PagedRows
from sglang_misa.kernels.decode.rank_select import MAX_ROW, kth_largest, places, ranked, wins_and_ties
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

WIDE_LOAD = 4 * 32  # fp32 elements that a warp loads at once
MIN_TILE = 16  # blocks that one tensor-core tile holds at least
SHORT_ROW = 512  # rows of at most so many blocks are chosen from by code of their own: a wide table costs them nothing


@dataclass(frozen=True)
class KeptPages:
    """The pages of the kept blocks, in logical order: token p of a row's kept tokens lies in page p // 64 at p % 64.

    Room is for `blocks` complete blocks and the tail, the tokens past the last complete block.

    pages:  int32 [R, (blocks + 1) · block_size / 64]  physical page ids; entries past ceil(lens / 64) are stale
    blocks: int32 [R, blocks + 1]  block numbers in the row; entries past ceil(lens / block_size) are stale
    lens:   int32 [R]  kept tokens of a row; a function of its length alone
    scores: fp32 [R, N]  scratch: block scores of the rows that had to choose; N is the power of two that holds the
            blocks of a whole page table
    done:   int32 [R]  scratch: programs that have finished; zero between launches
    """

    pages: torch.Tensor
    blocks: torch.Tensor
    lens: torch.Tensor
    scores: torch.Tensor
    done: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, table_width: int, blocks: int, block_size: int, device: torch.device) -> KeptPages:
        """Room for `rows` rows of page tables with `table_width` columns. Allocate outside of graph capture: `done`
        must be zero before the first launch, and one object must not serve two streams at once."""
        ints = {"dtype": torch.int32, "device": device}
        room = triton.next_power_of_2(triton.cdiv(table_width * PAGE, block_size))
        return cls(
            pages=torch.empty(rows, (blocks + 1) * block_size // PAGE, **ints),
            blocks=torch.empty(rows, blocks + 1, **ints),
            lens=torch.empty(rows, **ints),
            scores=torch.empty(rows, room, dtype=torch.float32, device=device),
            done=torch.zeros(rows, **ints),
        )

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return int(self.pages.shape[1] * PAGE // self.blocks.shape[1])

    def first(self, rows: int) -> KeptPages:
        """The same memory for the first `rows` rows."""
        return KeptPages(*(getattr(self, field.name)[:rows] for field in fields(self)))


@dataclass(frozen=True)
class KeepTuning:
    """How a launch is cut: a program of `warps` warps scores the blocks of `pages` pages, MIN_TILE blocks at least."""

    pages: int = 64
    warps: int = 4


def keep_blocks(
    rows: PagedRows, page_means: torch.Tensor, *, out: KeptPages, tuning: KeepTuning = KeepTuning()
) -> None:
    """Fill `out` with the best blocks of every row: the block filter of HISA (arXiv 2603.28458) on page means.

    A block of B tokens scores Σ_j w_j · ReLU(q_j · k̃_b) over all H heads, k̃_b the mean of its page means in bf16, as in
    prefill. Of a row's len // B complete blocks the first and the newest are kept and the best between them, up to nb
    in all; the tail behind them always. So len // B <= nb keeps everything. Ties fall to the older block, NaN never
    wins. B and nb are those of `out`.

    page_means: bf16 [P, 128], contiguous; read for the blocks between the first and the newest complete one
    """
    rows.check(page_means)
    width, room = rows.page_table.shape[1], out.scores.shape[1]
    pages = out.block_size // PAGE
    blocks = triton.cdiv(width, pages)
    if not blocks <= room <= MAX_ROW:
        raise ValueError(
            f"page_table: expected at most {min(room, MAX_ROW)} blocks a row, got {blocks}; use a larger block_size, "
            "or scratch for this table"
        )
    tile = max(MIN_TILE, tuning.pages // triton.next_power_of_2(pages))
    grid = (triton.cdiv(blocks, tile), len(rows))
    _keep_kernel[grid](
        rows.index_q,
        rows.head_gates,
        page_means,
        rows.page_table,
        rows.seq_lens,
        out.scores,
        out.blocks,
        out.pages,
        out.lens,
        out.done,
        rows.page_table.stride(0),
        width,
        HEADS=rows.index_heads,
        DIM=HEAD_DIM,
        PAGES=pages,
        PAGES_PAD=triton.next_power_of_2(pages),
        PAGE=PAGE,
        KEEP=out.blocks.shape[1] - 1,
        TILE=tile,
        ROOM=room,
        SHORT=min(room, SHORT_ROW),
        WIDE=tuning.warps * WIDE_LOAD,
        EXACT=rows.interpreted,
        **launch_options(rows.interpreted, tuning.warps),
    )


def launch_options(interpreted: bool, warps: int) -> dict[str, object]:
    """Arguments of a launch that may begin while the kernel before it drains (programmatic dependent launch)."""
    return {"PDL": False} if interpreted else {"PDL": True, "launch_pdl": True, "num_warps": warps}


@triton.jit
def last_of(done, n):
    """True in the last of the `n` programs that call this with the counter at `done`, which is zero again after it.

    Everything the others wrote before the call is visible to the one that gets True (read it past L1: ".cg").
    """
    last = n == 1
    if n > 1:
        tl.debug_barrier()
        last = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == n - 1
        if last:
            tl.store(done, 0)
    return last


@triton.jit
def _list_kept(
    scores,
    p_table,
    kept_blocks,
    kept_pages,
    length,
    WIDTH,
    PAGES: tl.constexpr,
    PAGES_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    KEEP: tl.constexpr,
    N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Choose among the scores of one row's first N blocks, which hold its `length` tokens, and list what is kept."""
    FOLD: tl.constexpr = min(N, WIDE)
    n_full = length // (PAGES * PAGE)
    o_n = tl.arange(0, N)
    m_middle = (o_n > 0) & (o_n < n_full - 1)
    # loaded without a mask so that loads stay wide: what the row has not written is replaced afterwards
    score = tl.load(scores + o_n, cache_modifier=".cg")
    o_i = tl.arange(0, PAGES_PAD)
    o_p = o_n[:, None] * PAGES + o_i[None, :]
    m_p = o_i[None, :] < PAGES
    b_page = tl.load(p_table + o_p, mask=m_p & (o_p < WIDTH), other=0)
    x = ranked(score, m_middle)
    threshold, room = kth_largest(x, n_full - 2, KEEP - 2, FOLD)
    # the first, the newest and the tail win without a contest, even against a threshold of +inf
    certain = (o_n * (PAGES * PAGE) < length) & (m_middle == 0)
    taken, place = places(tl.where(certain, 1, wins_and_ties(x, threshold)), room)
    tl.store(kept_blocks + place, o_n, mask=taken)
    p_kept = kept_pages + place[:, None] * PAGES + o_i[None, :]
    tl.store(p_kept, b_page, mask=taken[:, None] & m_p & (o_p * PAGE < length))


@triton.jit(do_not_specialize=["table_stride", "WIDTH"])
def _keep_kernel(
    q,
    gates,
    means,
    table,
    seq_lens,
    scores,
    kept_blocks,
    kept_pages,
    kept_lens,
    done,
    table_stride,
    WIDTH,  # columns of the page table
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGES: tl.constexpr,  # pages in a block
    PAGES_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    SHORT: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    p_table = table + i_r * table_stride
    o_h = tl.arange(0, HEADS)
    o_d = tl.arange(0, DIM)
    o_b = i_t * TILE + tl.arange(0, TILE)
    # stale ids come along and are replaced below: the length is still on its way
    ids = ()
    for i in tl.static_range(PAGES):
        o_page = o_b * PAGES + i
        ids += (tl.load(p_table + o_page, mask=o_page < WIDTH, other=0),)  # type: ignore[assignment]
    length = tl.load(seq_lens + i_r)
    n_full = length // (PAGES * PAGE)
    tail = length - n_full * (PAGES * PAGE)
    chooses = n_full > KEEP
    n_programs = tl.where(chooses, tl.cdiv(n_full, TILE), 1)
    if i_t >= n_programs:
        return

    if chooses:
        m_b = (o_b > 0) & (o_b < n_full - 1)
        b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :])  # [HEADS, DIM]
        b_w = tl.load(gates + i_r * HEADS + o_h)
        b_k = tl.zeros([TILE, DIM], tl.float32)
        for i in tl.static_range(PAGES):
            page = tl.where(m_b, ids[i], 0).to(tl.int64)
            b_k += tl.load(means + page[:, None] * DIM + o_d[None, :], mask=m_b[:, None], other=0.0).to(tl.float32)
        if PAGES & (PAGES - 1):  # a power of two changes neither the rounding nor the order of scores
            b_k *= 1.0 / PAGES
        b_k = b_k.to(tl.bfloat16)
        # fp8 fits bf16, so the products are exact; the interpreter multiplies bf16 as integers, hence fp32 there
        if EXACT:
            b_s = tl.dot(b_k.to(tl.float32), tl.trans(b_q.to(tl.float32)))  # [TILE, HEADS]
        else:
            b_s = tl.dot(b_k, tl.trans(b_q.to(tl.float32).to(tl.bfloat16)))
        score = tl.sum(tl.maximum(b_s, 0.0) * b_w[None, :], 1)
        tl.store(scores + i_r * ROOM + o_b, score, mask=m_b)

    if last_of(done + i_r, n_programs):
        p_scores = scores + i_r * ROOM
        p_blocks = kept_blocks + i_r * (KEEP + 1)
        p_pages = kept_pages + i_r * ((KEEP + 1) * PAGES)
        if length <= SHORT * (PAGES * PAGE):
            _list_kept(p_scores, p_table, p_blocks, p_pages, length, WIDTH, PAGES, PAGES_PAD, PAGE, KEEP, SHORT, WIDE)
        elif SHORT < ROOM:
            _list_kept(p_scores, p_table, p_blocks, p_pages, length, WIDTH, PAGES, PAGES_PAD, PAGE, KEEP, ROOM, WIDE)
        tl.store(kept_lens + i_r, tl.minimum(n_full, KEEP) * (PAGES * PAGE) + tail)
