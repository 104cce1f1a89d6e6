"""Layer 0's index selection computed from the checkpoint alone: no SGLang, no sglang_misa code.

Rounds to bf16 where a GPU model holds bf16, and quantises index q and k to fp8 with power-of-two scales for q and k.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FP8_MAX, PAGE, DIM, ROPE = 448.0, 64, 128, 64


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return bf16(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def yarn_angles(positions: Tensor, config: dict) -> Tensor:
    """[T, 32] rotation angles: YaRN blends interpolated and original frequencies between two turning counts."""
    rope, base = config["rope_scaling"], config["rope_theta"]
    inverse = base ** (-torch.arange(0, ROPE, 2) / ROPE)

    def dim_of(turns: float) -> float:
        length = rope["original_max_position_embeddings"]
        return ROPE * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(rope["beta_fast"])), 0)
    high = min(math.ceil(dim_of(rope["beta_slow"])), ROPE - 1)
    ramp = ((torch.arange(ROPE // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return positions[:, None] * (inverse / rope["factor"] * ramp + inverse * (1 - ramp))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """The first 64 of the last dimension, as two halves."""
    while angles.dim() < x.dim():
        angles = angles.unsqueeze(1)
    a, b = x[..., : ROPE // 2], x[..., ROPE // 2 : ROPE]
    cos, sin = angles.cos(), angles.sin()
    return bf16(torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., ROPE:]), dim=-1))


def hadamard(x: Tensor) -> Tensor:
    """Fast Walsh-Hadamard transform of the last dimension, scaled to keep lengths."""
    size, step = x.shape[-1], 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        x = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        step *= 2
    return bf16(x * size**-0.5)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1).clamp_min(1e-4) / FP8_MAX)))
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float(), scale


def index_tensors(model: Path, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(q [T, H, 128] in fp8 units, head gates [T, H] with every scale folded in, keys [T, 128] dequantised)."""
    config = json.loads((model / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    layer, heads = "model.layers.0.self_attn", config["index_n_heads"]
    angles = yarn_angles(torch.arange(len(ids)).float(), config)
    x = rms_norm(weights["model.embed_tokens.weight"][ids], weights["model.layers.0.input_layernorm.weight"])
    q_lora = rms_norm(bf16(x @ weights[f"{layer}.q_a_proj.weight"].T), weights[f"{layer}.q_a_layernorm.weight"])
    q = bf16(q_lora @ weights[f"{layer}.indexer.wq_b.weight"].T).unflatten(-1, (heads, DIM))
    k = bf16(x @ weights[f"{layer}.indexer.wk.weight"].T)
    k = bf16(torch.nn.functional.layer_norm(k, (DIM,), weights[f"{layer}.indexer.k_norm.weight"], eps=1e-6))
    q_fp8, q_scale = quantise(hadamard(rotate(q, angles)))
    k_fp8, k_scale = quantise(hadamard(rotate(k, angles)))
    gates = x @ weights[f"{layer}.indexer.weights_proj.weight"].T
    return q_fp8, gates * q_scale * heads**-0.5 * DIM**-0.5, k_fp8 * k_scale[:, None]


def misa_selection(q: Tensor, gates: Tensor, keys: Tensor, row: int, heads: int, block: int, topk: int) -> set[int]:
    """MISA's positions for one row: the heads with the largest mean |w · ReLU(q · block mean)| over complete blocks."""
    seen = keys[: row + 1]
    complete = len(seen) // block
    if complete:
        means = seen[: complete * block].unflatten(0, (complete, block)).mean(1)
        energy = (gates[row, :, None] * torch.relu(q[row] @ means.T)).abs().mean(1)
        kept = energy.topk(heads).indices
    else:
        kept = torch.arange(q.shape[1])
    scores = gates[row, kept] @ torch.relu(q[row, kept] @ seen.T)
    return set(scores.topk(min(topk, len(seen))).indices.tolist())
