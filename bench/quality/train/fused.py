"""Which fused attention trains fastest on this GPU. The one that writes out a score for each pair is never taken."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_misa.random_model import NOPE_DIM, ROPE_DIM, V_DIM

ROWS, TOKENS, TRIED = 2, 8191, 3
AGREE = 0.02  # relative error of gradients in bf16


def choose(heads: int) -> str:
    """Time FlashAttention and cuDNN, forward and backward; leave the faster enabled, and tell which.

    cuDNN counts only where its gradients agree with FlashAttention's. RuntimeError: no fused kernel runs here.
    """
    torch.backends.cuda.enable_math_sdp(False)
    shape = (3, ROWS, TOKENS, heads, NOPE_DIM + ROPE_DIM)
    inputs = torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(2, 3).requires_grad_(True)
    _enable(cudnn=False)
    wanted, flash = _measure(inputs)
    _enable(cudnn=True)
    told = f"FlashAttention {flash * 1e3:.1f} ms"
    try:
        got, cudnn = _measure(inputs)
    except RuntimeError as refusal:
        _enable(cudnn=False)
        return f"{told}; cuDNN refuses: {refusal}"
    error = float((got - wanted).norm() / wanted.norm())
    taken = cudnn < flash and error < AGREE
    _enable(cudnn=taken)
    return f"{told}, cuDNN {cudnn * 1e3:.1f} ms, gradients {error:.1e} apart; {'cuDNN' if taken else 'the first'} taken"


def _enable(*, cudnn: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(not cudnn)
    torch.backends.cuda.enable_mem_efficient_sdp(not cudnn)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def _measure(inputs: Tensor) -> tuple[Tensor, float]:
    """(gradients, seconds) of causal attention as the model calls it, the shortest of `TRIED` after one."""
    seconds = float("inf")
    for turn in range(TRIED + 1):
        torch.cuda.synchronize()
        begin = time.monotonic()
        q, k, v = inputs
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., :V_DIM].transpose(1, 2).flatten(-2)
        (gradients,) = torch.autograd.grad(out.float().square().sum(), inputs)
        torch.cuda.synchronize()
        seconds = min(seconds, time.monotonic() - begin) if turn else seconds
    return gradients.float(), seconds
