"""What Triton programs over block means begin with: their query rows, and the blocks that each sees."""

from __future__ import annotations

import triton
import triton.language as tl

# Of matrix products. The interpreter multiplies bf16 bits as integers; fp32 holds the same values.
OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def seen_blocks(p_batch, p_len, rows, max_blocks, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Of a program's ROWS rows: numbers (the last row's behind the end), which there are, requests, complete blocks."""
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = i_row < rows
    i_row = tl.minimum(i_row, rows - 1).to(tl.int64)
    b_batch = tl.load(p_batch + i_row)
    b_blocks = tl.where(m_row, tl.minimum(tl.load(p_len + i_row) // BLOCK_SIZE, max_blocks), 0)
    return i_row, m_row, b_batch, b_blocks
