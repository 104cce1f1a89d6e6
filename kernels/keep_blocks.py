"""Which token blocks of a paged row are worth reading: scored on the means of their keys, best `blocks` kept.

One launch. The programs of a row score its blocks; the last one to finish picks the best and lists their pages.
Bytes: 256 for every 64 tokens of prefix, where the keys themselves are 8448.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .rank_select import CERTAIN, MAX_ROW, NOTHING, kth_largest, order_key, places, wins_and_ties

PAGE = 64  # tokens in a page of SGLang's index-K pool
HEAD_DIM = 128


@dataclass(frozen=True)
class KeptPages:
    """The pages of the kept blocks, in logical order: token p of a row's kept tokens lies in page p // 64 at p % 64.

    Room is for `blocks` complete blocks and the tail, the tokens past the last complete block.

    pages:  int32 [R, (blocks + 1) · block_size / 64]  physical page ids; entries past ceil(lens / 64) are stale
    blocks: int32 [R, blocks + 1]  block numbers in the row; entries past ceil(lens / block_size) are stale
    lens:   int32 [R]  kept tokens of a row; a function of its length alone
    scores: fp32 [R, ceil(table_width · 64 / block_size)]  scratch: block scores of the rows that had to choose
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
        return cls(
            pages=torch.empty(rows, (blocks + 1) * block_size // PAGE, **ints),
            blocks=torch.empty(rows, blocks + 1, **ints),
            lens=torch.empty(rows, **ints),
            scores=torch.empty(rows, triton.cdiv(table_width * PAGE, block_size), dtype=torch.float32, device=device),
            done=torch.zeros(rows, **ints),
        )


@dataclass(frozen=True)
class KeepTuning:
    """How a launch is cut: a program of `warps` warps scores `tile` blocks, with `stages` loads in flight."""

    tile: int = 64
    warps: int = 4
    stages: int = 3


def keep_blocks(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    page_means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    out: KeptPages,
    tuning: KeepTuning = KeepTuning(),
) -> None:
    """Fill `out` with the best blocks of every row: the block filter of HISA (arXiv 2603.28458) on page means.

    A block of B = `block_size` tokens scores Σ_j w_j · ReLU(q_j · k̃_b) with k̃_b the mean of its page means, over all H
    heads. Of a row's len // B complete blocks the first and the newest are kept and the best between them, up to nb in
    all; the tail behind them always. So len // B <= nb keeps everything. Ties fall to the older block, NaN never wins.

    index_q:    float8_e4m3fn [R, H, 128], contiguous; H = 16, 32, 64, …
    head_gates: fp32 [R, H], contiguous
    page_means: bf16 [num_pages, 128], contiguous; read for the blocks between the first and the newest complete one
    page_table: int32 [R, W], unit column stride; entries past ceil(len / 64) are never followed
    seq_lens:   int32 [R], 0 <= len <= 64 · W
    """
    rows, heads, _ = index_q.shape
    n_blocks = out.scores.shape[1]
    n_pad = triton.next_power_of_2(n_blocks)
    if n_pad > MAX_ROW:
        raise ValueError(f"page_table: expected at most {MAX_ROW} blocks a row, got {n_pad}; use a larger block_size")
    interpreted = index_q.device.type == "cpu"
    grid = (triton.cdiv(n_blocks, tuning.tile), rows)
    _keep_kernel[grid](
        index_q,
        head_gates,
        page_means,
        page_table,
        seq_lens,
        out.scores,
        out.blocks,
        out.pages,
        out.lens,
        out.done,
        page_table.stride(0),
        HEADS=heads,
        DIM=HEAD_DIM,
        PAGES=block_size // PAGE,
        PAGE=PAGE,
        KEEP=out.blocks.shape[1] - 1,
        TILE=tuning.tile,
        N_BLOCKS=n_blocks,
        N_PAD=n_pad,
        STAGES=tuning.stages,
        EXACT=interpreted,
        **launch_options(interpreted, tuning.warps),
    )


def launch_options(interpreted: bool, warps: int) -> dict[str, object]:
    """Arguments of a launch that may begin while the kernel before it drains (programmatic dependent launch)."""
    return {"PDL": False} if interpreted else {"PDL": True, "launch_pdl": True, "num_warps": warps}


@triton.jit
def last_of(done, n):
    """True in the last of the `n` programs that call this with the counter at `done`, which is zero again after it.

    Everything the others wrote before the call is visible to the one that gets True (read it past L1: ".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu") == n - 1
    if last:
        tl.store(done, 0)
    return last


@triton.jit
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
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGES: tl.constexpr,  # pages in a block
    PAGE: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    N_BLOCKS: tl.constexpr,  # columns of the page table, in blocks
    N_PAD: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_r = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(seq_lens + i_r)
    n_full = length // (PAGES * PAGE)
    tail = length - n_full * (PAGES * PAGE)
    chooses = n_full > KEEP
    n_programs = tl.where(chooses, tl.cdiv(n_full, TILE), 1)
    if i_t >= n_programs:
        return
    p_table = table + i_r * table_stride
    p_scores = scores + i_r * N_BLOCKS

    if chooses:
        o_b = i_t * TILE + tl.arange(0, TILE)
        o_h = tl.arange(0, HEADS)
        o_d = tl.arange(0, DIM)
        m_b = (o_b > 0) & (o_b < n_full - 1)
        b_q = tl.load(q + (i_r * HEADS + o_h[:, None]) * DIM + o_d[None, :])  # [HEADS, DIM]
        b_w = tl.load(gates + i_r * HEADS + o_h)
        # fp8 fits bf16, so the products are exact; the interpreter multiplies bf16 as integers, hence fp32 there
        b_qt = tl.trans(b_q.to(tl.float32) if EXACT else b_q.to(tl.float32).to(tl.bfloat16))
        b_s = tl.zeros([TILE, HEADS], tl.float32)
        # the sum over a block's page means happens in the accumulator: positive factors do not change the order
        for i in tl.range(PAGES, num_stages=STAGES):
            page = tl.load(p_table + o_b * PAGES + i, mask=m_b, other=0).to(tl.int64)
            b_k = tl.load(means + page[:, None] * DIM + o_d[None, :], mask=m_b[:, None], other=0.0)
            if EXACT:
                b_k = b_k.to(tl.float32)
            b_s = tl.dot(b_k, b_qt, b_s)
        score = tl.sum(tl.maximum(b_s, 0.0) * b_w[None, :], 1)
        tl.store(p_scores + o_b, score, mask=m_b)

    if last_of(done + i_r, n_programs):
        o_n = tl.arange(0, N_PAD)
        m_middle = (o_n > 0) & (o_n < n_full - 1)
        # loads are masked by constants so that they stay wide: what a row has not written is replaced afterwards
        score = tl.load(p_scores + o_n, mask=o_n < N_BLOCKS, other=0.0, cache_modifier=".cg")
        key = tl.where(m_middle, order_key(score), NOTHING)
        threshold, room = kth_largest(key, None, n_full - 2, KEEP - 2)
        key = tl.where((o_n * (PAGES * PAGE) < length) & (m_middle == 0), CERTAIN, key)
        taken, place = places(wins_and_ties(key, threshold), 0, room)
        tl.store(kept_blocks + i_r * (KEEP + 1) + place, o_n, mask=taken)
        for i in tl.static_range(PAGES):
            o_p = o_n * PAGES + i
            m_p = taken & (o_p * PAGE < length)
            page = tl.load(p_table + o_p, mask=m_p, other=0)
            tl.store(kept_pages + (i_r * (KEEP + 1) + place) * PAGES + i, page, mask=m_p)
        tl.store(kept_lens + i_r, tl.minimum(n_full, KEEP) * (PAGES * PAGE) + tail)
