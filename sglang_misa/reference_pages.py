"""What index-K pages hold, in plain fp32 PyTorch: keys, their means, and sketches of them around their page's mean.

A sketch is each key of a complete page as b bits a coordinate of its difference to the mean. As in `reference.py`, no
function reads a tensor back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_misa.kernels.layout import HEAD_DIM, PAGE, SKETCH_STEP


def unpack_pages(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys fp8 [64 n, 128] and scales fp32 [64 n] of index-K pages [n, 8448] uint8, as SGLang's pool lays them out."""
    codes, scales = pages.split([PAGE * HEAD_DIM, PAGE * 4], dim=1)
    return codes.reshape(-1, HEAD_DIM).view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32).flatten()


def dequantize_pages(pages: Tensor) -> Tensor:
    """Keys [n, 64, 128] fp32 of index-K pages [n, 8448] uint8."""
    keys, scales = unpack_pages(pages)
    return (keys.float() * scales.unsqueeze(-1)).unflatten(0, (-1, PAGE))


def page_means(pages: Tensor) -> Tensor:
    """Mean key [n, 128] fp32 of each page row [n, 8448] uint8. Only meaningful for complete pages."""
    return dequantize_pages(pages).mean(dim=1)


def quantize_pages(pages: Tensor, means: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, 64, 128] and scales bf16 [n, 64] of page rows [n, 8448] uint8 around `means` bf16 [n, 128].

    A key is sketched as mean + scale · u, with u = code - (2^bits - 1) / 2. One bit is the sign of the key's residual
    r = key - mean; two bits are the nearest of four levels SKETCH_STEP · σ apart, σ = ‖r‖ / √128. The scale keeps the
    inner product: ⟨r, scale · u⟩ = ‖r‖². A residual of zero, or one that is not finite, has codes and scale 0: such a
    key is its page's mean, so what is broken stays in its page. Sums fold the upper half onto the lower one until one
    number is left, in fp32 and without fused products: a kernel that does the same has the same bits.
    """
    residual = dequantize_pages(pages) - means.float().unsqueeze(1)
    energy = _folded_sum(residual * residual)
    usable = torch.isfinite(energy) & (energy > 0)
    level = torch.where(residual >= 0, 0.5, -0.5)
    if bits == 2:
        far = residual * residual > energy.unsqueeze(-1) * (SKETCH_STEP**2 / HEAD_DIM)
        level = torch.where(far, 3 * level, level)
    scales = torch.where(usable, energy / _folded_sum(residual * level), 0.0)
    codes = torch.where(usable.unsqueeze(-1), level + (2**bits - 1) / 2, 0.0)
    return codes.to(torch.uint8), scales.bfloat16()


def sketched_keys(codes: Tensor, scales: Tensor, means: Tensor, bits: int) -> Tensor:
    """Keys fp32 [n, 64, 128] as sketches say: codes and scales of `quantize_pages`, means [n, 128] bf16."""
    levels = codes.float() - (2**bits - 1) / 2
    return means.float().unsqueeze(1) + scales.float().unsqueeze(-1) * levels


def pack_sketches(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Sketches uint8 [n, sketch_bytes(bits)] of what `quantize_pages` returns, laid out as `sketch_bytes` says."""
    key, dim = torch.meshgrid(
        torch.arange(PAGE, device=codes.device), torch.arange(HEAD_DIM, device=codes.device), indexing="ij"
    )
    group, r, odd, c, e = key // 16, key % 16 // 2, key % 2, dim // 32, dim % 4
    lane = 4 * r + c
    half, plane = (2 * group + odd) // (8 // bits), (2 * group + odd) % (8 // bits)
    word, bit = ((half * 2 + dim % 32 // 16) * 32 + lane) * 4 + dim % 16 // 4, 8 * e + bits * plane
    words = torch.zeros(len(codes), PAGE * HEAD_DIM * bits // 32, dtype=torch.int64, device=codes.device)
    words.index_add_(1, word.flatten(), (codes.long() << bit).flatten(1))
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    first = torch.arange(PAGE, device=codes.device)
    ordered = torch.empty_like(scales)
    ordered[:, first % 16 // 2 * 8 + first // 16 * 2 + first % 2] = scales
    return torch.cat([signed.view(torch.uint8), ordered.view(torch.uint8)], 1)


def _folded_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two, in the order that `quantize_pages` states."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, dim=-1)
        x = low + high
    return x.squeeze(-1)
