"""Statistics of complete pages: the mean of the stored keys, which routing and block pruning score, and their sketch.

A page of SGLang's index-K pool is one uint8 row of 8448 bytes: 64 keys × 128 bytes of fp8 e4m3, then 64 fp32 scales.
Its mean is that of the dequantised keys (fp8 × scale), summed in fp32 and kept as bf16. Every entry point below runs
the same program on a page, so a mean has the same bits whether a page was filled by prefill, by decode or healed later.
The sketch, where one is kept, is `reference_pages.quantize_pages` of the page and its stored mean, bit by bit.

All of them fit in a CUDA graph: grids come from shapes, lengths are read on the device, and page-table entries beyond
a row's complete pages are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_misa.kernels.checks import expect, expect_page_table
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES, SKETCH_STEP, sketch_bits

_WARPS = 4  # 64 bytes of keys a thread: four 16-byte loads in flight


@triton.jit
def _folded_sum(x, ROWS: tl.constexpr, LOG_COLUMNS: tl.constexpr):
    """Sums [ROWS] over the columns of x, the upper half folded onto the lower one until one is left."""
    for i in tl.static_range(LOG_COLUMNS):
        x = tl.sum(tl.reshape(x, [ROWS, 2, 2 ** (LOG_COLUMNS - 1 - i)]), 1)
    return tl.reshape(x, [ROWS])


@triton.jit
def _store_sketch(
    b_residual, p_sketch, BITS: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store a page's sketch at `p_sketch` from its keys without their mean, [PAGE, HEAD_DIM]."""
    o_key, o_dim = tl.arange(0, PAGE), tl.arange(0, HEAD_DIM)
    LOG_DIM: tl.constexpr = tl.constexpr(HEAD_DIM.bit_length() - 1)
    b_square = b_residual * b_residual
    energy = _folded_sum(b_square, PAGE, LOG_DIM)
    usable = (energy > 0) & (energy < float("inf"))
    b_level = tl.where(b_residual >= 0, 0.5, -0.5)
    if BITS == 2:
        b_level = tl.where(b_square > energy[:, None] * FAR, b_level * 3, b_level)
    overlap = _folded_sum(b_residual * b_level, PAGE, LOG_DIM)
    scale = tl.where(usable, tl.div_rn(energy, tl.where(usable, overlap, 1.0)), 0.0)
    b_code = tl.where(usable[:, None], b_level + (2**BITS - 1) * 0.5, 0.0).to(tl.int32)

    # where a code lies in its word, and its word in the page: see `layout.sketch_bytes`
    PLANES: tl.constexpr = 8 // BITS  # keys that share a byte: of some groups of 16 an even and an odd one
    HALVES: tl.constexpr = PAGE // 8 // PLANES
    plane = (o_key // 16 * 2 + o_key % 2) % PLANES
    b_word = b_code << (plane[:, None] * BITS + o_dim[None, :] % 4 * 8)
    b_word = tl.reshape(b_word, [HALVES, PLANES // 2, 8, 2, HEAD_DIM // 4, 4])
    b_word = tl.sum(tl.sum(tl.sum(b_word, 5), 3), 1)  # [HALVES, 8, HEAD_DIM // 4]
    lane = tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, HEAD_DIM // 4)[None, None, :] // 8
    word = tl.arange(0, HEAD_DIM // 4)[None, None, :] % 8
    place = ((tl.arange(0, HALVES)[:, None, None] * 2 + word // 4) * 32 + lane) * 4 + word % 4
    tl.store(p_sketch.to(tl.pointer_type(tl.int32)) + place, b_word)

    place = PAGE * HEAD_DIM * BITS // 16 + o_key // 2 % 8 * 8 + o_key // 16 * 2 + o_key % 2
    # to bf16, ties to even, as the interpreter does not
    b_bits = scale.to(tl.uint32, bitcast=True)
    b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
    tl.store(p_sketch.to(tl.pointer_type(tl.uint16)) + place, b_bits.to(tl.uint16))


@triton.jit
def _store_page_mean(
    p_keys, p_scales, p_means, p_sketches, i_page,
    BITS: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    """Store the mean of physical page `i_page`; `p_keys`, `p_scales` view one pool as fp8 and as fp32.

    With BITS > 0 store its sketch too.
    """
    i_page = i_page.to(tl.int64)
    o_key, o_dim = tl.arange(0, PAGE), tl.arange(0, HEAD_DIM)
    # [PAGE, HEAD_DIM]
    b_key = tl.load(p_keys + i_page * PAGE_BYTES + o_key[:, None] * HEAD_DIM + o_dim[None, :]).to(tl.float32)
    # [PAGE]
    b_scale = tl.load(p_scales + i_page * (PAGE_BYTES // 4) + PAGE * HEAD_DIM // 4 + o_key)
    b_key *= b_scale[:, None]
    b_mean = (tl.sum(b_key, axis=0) * (1.0 / PAGE)).to(p_means.dtype.element_ty)
    tl.store(p_means + i_page * HEAD_DIM + o_dim, b_mean)
    if BITS:
        p_sketch = p_sketches + i_page * (PAGE * HEAD_DIM * BITS // 8 + PAGE * 2)
        _store_sketch(b_key - b_mean.to(tl.float32)[None, :], p_sketch, BITS, FAR, PAGE, HEAD_DIM)


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["p_table", "p_lens", "p_kept"])
def page_means_fwd_kernel(
    p_keys,
    p_scales,
    p_means,
    p_sketches,
    p_table,
    p_lens,
    p_kept,
    table_stride,
    KEPT: tl.constexpr,
    BITS: tl.constexpr,
    FAR: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    i_logical, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if KEPT:
        i_logical += tl.load(p_kept + i_row)
    if i_logical < tl.load(p_lens + i_row) // PAGE:
        i_page = tl.load(p_table + i_row * table_stride + i_logical)
        _store_page_mean(p_keys, p_scales, p_means, p_sketches, i_page, BITS, FAR, PAGE, HEAD_DIM, PAGE_BYTES)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["p_table", "p_lens"])
def last_page_means_fwd_kernel(
    p_pools,
    p_means,
    p_sketches,
    p_table,
    p_lens,
    table_stride,
    BITS: tl.constexpr,
    FAR: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_layer = tl.program_id(1)
    length = tl.load(p_lens + i_row)
    if (length > 0) & (length % PAGE == 0):
        i_page = tl.load(p_table + i_row.to(tl.int64) * table_stride + length // PAGE - 1)
        pool = tl.load(p_pools + i_layer)
        keys = tl.multiple_of(pool.to(tl.pointer_type(tl.float8e4nv)), 16)
        scales = tl.multiple_of(pool.to(tl.pointer_type(tl.float32)), 16)
        means = tl.multiple_of(tl.load(p_means + i_layer).to(tl.pointer_type(tl.bfloat16)), 16)
        sketches = means
        if BITS:
            sketches = tl.multiple_of(tl.load(p_sketches + i_layer).to(tl.pointer_type(tl.uint8)), 16)
        _store_page_mean(keys, scales, means, sketches, i_page, BITS, FAR, PAGE, HEAD_DIM, PAGE_BYTES)


@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def slot_page_means_fwd_kernel(
    p_keys, p_scales, p_means, p_sketches, p_slots,
    BITS: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    slot = tl.load(p_slots + tl.program_id(0))
    if (slot >= 0) & (slot % PAGE == PAGE - 1):
        _store_page_mean(p_keys, p_scales, p_means, p_sketches, slot // PAGE, BITS, FAR, PAGE, HEAD_DIM, PAGE_BYTES)


@triton.jit
def compared_pages_fwd_kernel(
    p_keys, p_scales, p_means, p_sketches, p_pages, p_seen, p_wrong,
    SKETCH_PAD: tl.constexpr,
    BITS: tl.constexpr, FAR: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    MEAN: tl.constexpr = HEAD_DIM // 2  # in words
    SKETCH: tl.constexpr = (PAGE * HEAD_DIM * BITS // 8 + PAGE * 2) // 4 if BITS else 0
    i = tl.program_id(0)
    i_page = tl.load(p_pages + i).to(tl.int64)
    if i_page < 0:
        tl.store(p_wrong + i, -1)
    else:
        p_stored = p_seen + i * (MEAN + SKETCH)
        p_expected = p_stored + tl.num_programs(0) * (MEAN + SKETCH)
        # numbered by page, as the statistics that are stored: this program's lies at `p_expected`
        p_fresh_means = p_expected.to(tl.pointer_type(tl.bfloat16)) - i_page * HEAD_DIM
        p_fresh_sketches = (p_expected + MEAN).to(tl.pointer_type(tl.uint8)) - i_page * (SKETCH * 4)
        _store_page_mean(
            p_keys, p_scales, p_fresh_means, p_fresh_sketches, i_page, BITS, FAR, PAGE, HEAD_DIM, PAGE_BYTES
        )
        tl.debug_barrier()
        o = tl.arange(0, MEAN)
        b_stored = tl.load(p_means.to(tl.pointer_type(tl.int32)) + i_page * MEAN + o)
        tl.store(p_stored + o, b_stored)
        wrong = tl.max((b_stored != tl.load(p_expected + o, cache_modifier=".cg")).to(tl.int32), 0)
        if BITS:
            o = tl.arange(0, SKETCH_PAD)
            mask = o < SKETCH
            b_stored = tl.load(p_sketches.to(tl.pointer_type(tl.int32)) + i_page * SKETCH + o, mask=mask, other=0)
            tl.store(p_stored + MEAN + o, b_stored, mask=mask)
            b_expected = tl.load(p_expected + MEAN + o, mask=mask, other=0, cache_modifier=".cg")
            wrong = tl.maximum(wrong, tl.max((b_stored != b_expected).to(tl.int32), 0))
        tl.store(p_wrong + i, wrong)


@dataclass(frozen=True)
class Kept:
    """Pages whose statistics are right as they are.

    pages: int32 [B]: so many of each row, from its first on
    new: complete pages of a row behind them, at most
    """

    pages: torch.Tensor
    new: int


def update_page_means(
    index_k_pages: torch.Tensor,
    means: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sketches: torch.Tensor | None = None,
    kept: Kept | None = None,
) -> None:
    """Compute the statistics of every complete page of each row, those that are kept left out.

    index_k_pages [P, 8448] uint8; means [P, 128] bf16, written at physical pages; page_table [B, W] int32 physical page
    ids; seq_lens [B] int32 tokens, at most 64·W; sketches uint8 [P, sketch_bytes(b)], optional, written beside the
    means. Bound by reading 8448 bytes a page. Raises ValueError for another layout.
    """
    views = _views(index_k_pages, means)
    bits = _sketch_bits(index_k_pages, sketches)
    rows, width = expect_page_table(page_table, seq_lens)
    pages = width if kept is None else min(kept.new, width)
    if kept is not None:
        expect("kept.pages", kept.pages, (rows,), torch.int32)
    if rows and pages:
        page_means_fwd_kernel[(pages, rows)](
            *views,
            means,
            means if sketches is None else sketches,
            page_table,
            seq_lens,
            seq_lens if kept is None else kept.pages,
            page_table.stride(0),
            KEPT=kept is not None,
            **_options(bits),
        )


@dataclass(frozen=True)
class Layers:
    """Where each layer's pool and statistics lie, for a launch that serves all of them. The tensors must outlive it.

    pools, means, sketches: int64 [L] addresses on the device, of layers that have an indexer
    bits: of the sketches, 0 without any (`sketches` are the means then, and not used)
    """

    pools: torch.Tensor
    means: torch.Tensor
    sketches: torch.Tensor
    bits: int

    @classmethod
    def of(
        cls,
        pools: Sequence[torch.Tensor],
        means: Sequence[torch.Tensor],
        sketches: Sequence[torch.Tensor] | None = None,
    ) -> Layers:
        """pools [P, 8448] uint8, means [P, 128] bf16 and, optional, sketches uint8 [P, sketch_bytes(b)] of each layer.

        Layers with P = 0 are left out.
        """
        held = [layer for layer in zip(pools, means, sketches or means, strict=True) if len(layer[0])]
        bits = 0
        for index_k_pages, mean, sketch in held:
            _views(index_k_pages, mean)
            bits = _sketch_bits(index_k_pages, sketch if sketches else None)
        addresses = torch.tensor([[t.data_ptr() for t in layer] for layer in held], dtype=torch.int64).T.contiguous()
        pools_, means_, sketches_ = addresses.to(pools[0].device)
        return cls(pools_, means_, sketches_, bits)


def update_last_page_means(layers: Layers, page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Recompute, in every layer, the statistics of the page that each row's newest token completed (seq_len % 64 == 0).

    For decode, once a step. page_table [R, W] int32; seq_lens [R] int32 with the new token counted, at most 64·W.
    Raises ValueError for another layout.
    """
    rows, _ = expect_page_table(page_table, seq_lens)
    if rows:
        last_page_means_fwd_kernel[(rows, len(layers.pools))](
            layers.pools,
            layers.means,
            layers.sketches,
            page_table,
            seq_lens,
            page_table.stride(0),
            **_options(layers.bits),
        )


def update_slots(
    index_k_pages: torch.Tensor, means: torch.Tensor, slots: torch.Tensor, sketches: torch.Tensor | None = None
) -> None:
    """Recompute the means of the pages whose last token is among the slots just written; negative slots are skipped.

    index_k_pages [P, 8448] uint8; means [P, 128] bf16; slots [N] int64, slot = 64·page + offset, as in SGLang's
    out_cache_loc; sketches uint8 [P, sketch_bytes(b)], optional, written beside the means. Raises ValueError for
    another layout.
    """
    views = _views(index_k_pages, means)
    expect("slots", slots, (slots.shape[0],), torch.int64)
    if len(slots):
        written = means if sketches is None else sketches
        slot_page_means_fwd_kernel[(len(slots),)](
            *views, means, written, slots, **_options(_sketch_bits(index_k_pages, sketches))
        )


def compare_pages(
    index_k_pages: torch.Tensor, means: torch.Tensor, pages: torch.Tensor, sketches: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the statistics of `pages` anew and compare them with those stored, bit by bit, in one launch.

    index_k_pages [P, 8448] uint8; means [P, 128] bf16; pages [N] int32 or int64, negative for none; sketches uint8
    [P, sketch_bytes(b)], optional. Returns what is stored and what was computed, int32 [2, N, words] of the mean and
    then the sketch, and int32 [N]: 1 where they differ, 0 where not, -1 for no page. Raises ValueError for another
    layout.
    """
    views = _views(index_k_pages, means)
    bits = _sketch_bits(index_k_pages, sketches)
    held = means if sketches is None else sketches
    words = (HEAD_DIM * 2 + (0 if sketches is None else held.shape[1])) // 4
    seen = torch.empty(2, len(pages), words, dtype=torch.int32, device=means.device)
    wrong = torch.empty(len(pages), dtype=torch.int32, device=means.device)
    if len(pages):
        pad = triton.next_power_of_2(words - HEAD_DIM // 2) if bits else 0
        compared_pages_fwd_kernel[(len(pages),)](*views, means, held, pages, seen, wrong, pad, **_options(bits))
    return seen, wrong


def _views(index_k_pages: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool's bytes as fp8 keys and as fp32 scales."""
    expect("index_k_pages", index_k_pages, (index_k_pages.shape[0], PAGE_BYTES), torch.uint8)
    expect("means", means, (index_k_pages.shape[0], HEAD_DIM), torch.bfloat16)
    return index_k_pages.view(torch.float8_e4m3fn), index_k_pages.view(torch.float32)


def _sketch_bits(index_k_pages: torch.Tensor, sketches: torch.Tensor | None) -> int:
    """Bits a coordinate of `sketches`, 0 without any."""
    if sketches is None:
        return 0
    expect("sketches", sketches, (index_k_pages.shape[0], None), torch.uint8)
    return sketch_bits(int(sketches.shape[1]))


def _options(bits: int) -> dict[str, object]:
    """Constants of a launch. A fused product has bits of its own, which the reference's sketch does not."""
    return {
        "BITS": bits,
        "FAR": SKETCH_STEP**2 / HEAD_DIM,
        "PAGE": PAGE,
        "HEAD_DIM": HEAD_DIM,
        "PAGE_BYTES": PAGE_BYTES,
        "num_warps": _WARPS,
        **({"enable_fp_fusion": False} if bits else {}),
    }
