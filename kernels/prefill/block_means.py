"""Means of blocks of keys, which prefill routes on and ranks blocks by.

A block's mean is that of the bf16 means of its `block_size / 64` pages, in bf16 again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_misa.kernels.checks import expect, expect_block_size, expect_page_table
from sglang_misa.kernels.layout import HEAD_DIM, PAGE


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(do_not_specialize=["table_stride", "max_blocks"], do_not_specialize_on_alignment=["p_table", "p_lens"])
def block_means_fwd_kernel(
    p_means,
    p_blocks,
    p_table,
    p_lens,
    table_stride,
    max_blocks,
    BLOCK_PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    i_block, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_dim = tl.arange(0, HEAD_DIM)
    if (i_block + 1) * BLOCK_PAGES <= tl.load(p_lens + i_row) // PAGE:
        b_sum = tl.zeros([HEAD_DIM], tl.float32)
        for i in tl.static_range(BLOCK_PAGES):  # all loads on their way at once
            i_page = tl.load(p_table + i_row * table_stride + i_block * BLOCK_PAGES + i).to(tl.int64)
            b_sum += tl.load(p_means + i_page * HEAD_DIM + o_dim).to(tl.float32)
        b_mean = (b_sum * (1.0 / BLOCK_PAGES)).to(p_blocks.dtype.element_ty)
        tl.store(p_blocks + (i_row * max_blocks + i_block) * HEAD_DIM + o_dim, b_mean)


def block_means(means: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
    """The means of each row's complete blocks, bf16 [B, W·64 // block_size, 128], undefined beyond them.

    means [P, 128] bf16 of pages; page_table [B, W] int32 physical page ids; seq_lens [B] int32 tokens, at most 64·W;
    block_size: tokens, a multiple of 64. Raises ValueError for another layout.
    """
    expect("means", means, (len(means), HEAD_DIM), torch.bfloat16)
    rows, width = expect_page_table(page_table, seq_lens)
    expect_block_size(block_size)
    block_pages = block_size // PAGE
    max_blocks = width // block_pages
    blocks = torch.empty(rows, max_blocks, HEAD_DIM, dtype=torch.bfloat16, device=means.device)
    if rows and max_blocks:
        block_means_fwd_kernel[(max_blocks, rows)](
            means,
            blocks,
            page_table,
            seq_lens,
            page_table.stride(0),
            max_blocks,
            BLOCK_PAGES=block_pages,
            PAGE=PAGE,
            HEAD_DIM=HEAD_DIM,
            num_warps=1,
        )
    return blocks
