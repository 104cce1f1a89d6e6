"""Where the keys lie that score high: the direction in which their mean differs from that of all keys.

A residual takes φ·x for a head's ReLU(x), and matters for the keys that may be selected, so φ is to be theirs. Over the
M complete blocks of row t, with the residual q̄ of all heads by their φ of all keys:

    s[t,b]       = q̄[t]·k̃_b
    direction[t] = TILT · Σ_b (s[t,b] − s̄[t]) · k̃_b / (M · σ_s)
    μ[t,j]      += q[t,j]·direction[t], which is TILT · Cov(q[t,j]·k̃, s[t]) / σ_s

the mean of a Gaussian where s lies TILT deviations above its own. It is linear attention over blocks: a program holds
32 rows and passes over their blocks twice, for s̄ and for the sum. A row's direction does not depend on the rows beside
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_misa.kernels.layout import HEAD_DIM, TILT
from sglang_misa.kernels.prefill.seen_blocks import OPERAND, seen_blocks

_ROWS, _TILE, _WARPS = 32, 64, 4
_ROUNDING = 2.0**-32  # of a mean in fp32, over its square


@triton.jit
def _tile(p_own, b_query, b_own, start, stop, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Pooled keys [TILE, HEAD_DIM], 0 where not finite; the rows' scores [ROWS, TILE]; and whether a row sees a key."""
    o_block, o_dim = start + tl.arange(0, TILE), tl.arange(0, HEAD_DIM)
    b_key = tl.load(p_own + o_block[:, None] * HEAD_DIM + o_dim[None, :], mask=o_block[:, None] < stop, other=0.0)
    b_key = tl.where(tl.abs(b_key.to(tl.float32)) < float("inf"), b_key, 0.0).to(OPERAND)
    return b_key, tl.dot(b_query, tl.trans(b_key)), o_block[None, :] < b_own[:, None]


# Shapes change from batch to batch and slices start anywhere: specialising on either would compile while serving.
@triton.jit(do_not_specialize=["rows", "max_blocks"], do_not_specialize_on_alignment=["p_batch", "p_len"])
def tilt_fwd_kernel(
    p_query,
    p_pooled,
    p_batch,
    p_len,
    p_direction,
    rows,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    TILT: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    i_row, m_row, b_batch, b_blocks = seen_blocks(p_batch, p_len, rows, max_blocks, BLOCK_SIZE, ROWS)
    o_dim = tl.arange(0, HEAD_DIM)
    b_count = tl.maximum(b_blocks, 1).to(tl.float32)
    # [ROWS, HEAD_DIM]
    b_query = tl.load(p_query + i_row[:, None] * HEAD_DIM + o_dim[None, :]).to(OPERAND)
    b_sum = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    b_total, b_squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    # Nearly always one request; where requests meet, one pass for each with the other rows out of sight.
    for i_batch in range(tl.min(b_batch), tl.max(b_batch) + 1):
        b_own = tl.where(b_batch == i_batch, b_blocks, 0)
        p_own = p_pooled + i_batch * (max_blocks.to(tl.int64) * HEAD_DIM)
        stop = tl.max(b_own)
        for start in range(0, stop, TILE):
            _, b_score, m_seen = _tile(p_own, b_query, b_own, start, stop, HEAD_DIM, TILE)
            b_total += tl.sum(tl.where(m_seen, b_score, 0.0), axis=1)
        b_mean = b_total / b_count
        for start in range(0, stop, TILE):
            b_key, b_score, m_seen = _tile(p_own, b_query, b_own, start, stop, HEAD_DIM, TILE)
            b_score = tl.where(m_seen, b_score - b_mean[:, None], 0.0)
            b_squares += tl.sum(b_score * b_score, axis=1)
            b_high = b_score.to(OPERAND)  # and what bf16 rounds off
            b_sum += tl.dot(b_high, b_key) + tl.dot((b_score - b_high.to(tl.float32)).to(OPERAND), b_key)
    b_mean = b_total / b_count
    b_variance = b_squares / b_count
    b_scale = TILT / (b_count * tl.sqrt(b_variance))
    # Scores of equal blocks differ from their mean by its rounding, and that points nowhere.
    m_differ = (b_variance > b_mean * b_mean * ROUNDING) & (b_scale > 0.0) & (b_scale < float("inf"))
    b_direction = tl.where(m_differ[:, None], b_sum * b_scale[:, None], 0.0)
    tl.store(p_direction + i_row[:, None] * HEAD_DIM + o_dim[None, :], b_direction, mask=m_row[:, None])


def tilt(
    query: torch.Tensor, block_means: torch.Tensor, row_batch: torch.Tensor, row_len: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Directions fp32 [T, 128], 0 where the scores of a row's blocks do not differ.

    query [T, 128] fp8 e4m3: the residual of all heads, in any unit; block_means [B, M, 128] bf16; row_batch, row_len
    [T] int32: the request of each row, and the tokens that it sees.
    """
    rows, max_blocks = len(query), block_means.shape[1]
    direction = torch.empty(rows, HEAD_DIM, dtype=torch.float32, device=query.device)
    if rows:
        tilt_fwd_kernel[(-(-rows // _ROWS),)](
            query,
            block_means,
            row_batch,
            row_len,
            direction,
            rows,
            max_blocks,
            BLOCK_SIZE=block_size,
            TILT=TILT,
            ROUNDING=_ROUNDING,
            ROWS=_ROWS,
            TILE=_TILE,
            HEAD_DIM=HEAD_DIM,
            num_warps=_WARPS,
        )
    return direction
