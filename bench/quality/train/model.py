"""DeepSeek-V3.2's architecture for training: latent attention, lightning indexer, dense MLPs, in plain PyTorch.

Parameters carry the names of the published checkpoints, so that `state_dict` is what SGLang loads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_misa.random_model import INDEX_DIM, LATENT_DIM, NOPE_DIM, ROPE_DIM, V_DIM, Shape

FP8_MAX, AMAX_FLOOR = 448.0, 1e-4  # SGLang's act_quant
EPS = 1e-6


class Norm(nn.Module):
    """RMS norm in fp32, its result in the input's type."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * self.weight.float()).to(x.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection N(0, 1 / inputs) without a bias."""
    made = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(made.weight, std=inputs**-0.5)
    return made


def rope(x: Tensor, positions: Tensor, theta: float, *, halves: bool) -> Tensor:
    """Rotary embedding of [..., T, h, d] at positions [T], in fp32; pairs are halves, or neighbours.

    Mirrors SGLang's deepseek_yarn with factor 1, under which the frequencies stay plain.
    """
    dim = x.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = (positions.float()[:, None] * frequency)[:, None]  # [T, 1, d / 2]
    cos, sin = angle.cos(), angle.sin()
    y = x.float()
    a, b = y.chunk(2, dim=-1) if halves else (y[..., ::2], y[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    return (torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)).to(x.dtype)


@functools.cache
def hadamard(device: torch.device) -> Tensor:
    """SGLang's rotation of index queries and keys, [128, 128] fp32, orthonormal."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < INDEX_DIM:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * INDEX_DIM**-0.5


def on_fp8_grid(x: Tensor) -> Tensor:
    """Vectors [..., 128] as SGLang quantises them: e4m3 with one power-of-two scale each; fp32."""
    y = x.float()
    scale = torch.exp2(torch.ceil(torch.log2(y.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR) / FP8_MAX)))
    return (y / scale).to(torch.float8_e4m3fn).float() * scale


class Indexer(nn.Module):
    """The lightning indexer: H query heads of 128 from the query's latent, one key a token, gates from the input."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.theta = shape.index_heads, shape.rope_theta
        self.wq_b = linear(shape.q_rank, shape.index_heads * INDEX_DIM)
        self.wk = linear(shape.hidden, INDEX_DIM)
        self.k_norm = nn.LayerNorm(INDEX_DIM, eps=EPS)
        self.weights_proj = linear(shape.hidden, shape.index_heads)

    def keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """[T, 128] of normed inputs x [T, hidden]."""
        key = self.wk(x)
        key = F.layer_norm(key.float(), (INDEX_DIM,), self.k_norm.weight.float(), self.k_norm.bias.float(), EPS)
        return self._rotated(key.to(x.dtype)[:, None], positions)[:, 0]

    def queries(self, x: Tensor, latent: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [T, H, 128], gates [T, H] fp32) of normed inputs and the queries' latents [T, q_rank]."""
        query = self._rotated(self.wq_b(latent).unflatten(-1, (self.heads, INDEX_DIM)), positions)
        gates = F.linear(x.float(), self.weights_proj.weight.float())
        return query, gates * self.heads**-0.5 * INDEX_DIM**-0.5

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = rope(x[..., :ROPE_DIM], positions, self.theta, halves=True)
        return (torch.cat((turned, x[..., ROPE_DIM:]), -1).float() @ hadamard(x.device)).to(x.dtype)


def index_scores(query: Tensor, gates: Tensor, keys: Tensor) -> Tensor:
    """[R, T] of queries [R, H, 128], gates [R, H], keys [T, 128]: Σ_h gate · ReLU(query · key)."""
    products = F.relu(query.flatten(0, 1) @ keys.T).unflatten(0, query.shape[:2])
    return torch.einsum("rht,rh->rt", products, gates.to(products.dtype))


class Attention(nn.Module):
    """Multi-head latent attention, as it is written for training: keys and values spelled out."""

    def __init__(self, shape: Shape, latent: int):
        super().__init__()
        self.heads, self.theta, self.rank = shape.heads, shape.rope_theta, latent
        self.q_a_proj = linear(shape.hidden, shape.q_rank)
        self.q_a_layernorm = Norm(shape.q_rank)
        self.q_b_proj = linear(shape.q_rank, shape.heads * (NOPE_DIM + ROPE_DIM))
        self.kv_a_proj_with_mqa = linear(shape.hidden, latent + ROPE_DIM)
        self.kv_a_layernorm = Norm(latent)
        self.kv_b_proj = linear(latent, shape.heads * (NOPE_DIM + V_DIM))
        self.o_proj = linear(shape.heads * V_DIM, shape.hidden)
        self.indexer = Indexer(shape)

    def latent(self, x: Tensor) -> Tensor:
        """What queries of attention and indexer are made of, [B, T, q_rank]."""
        return self.q_a_layernorm(self.q_a_proj(x))

    def parts(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k [B, heads, T, 192], v [B, heads, T, 128])."""
        q = self.q_b_proj(self.latent(x)).unflatten(-1, (self.heads, -1))
        low, k_pe = self.kv_a_proj_with_mqa(x).split((self.rank, ROPE_DIM), -1)
        k, v = self.kv_b_proj(self.kv_a_layernorm(low)).unflatten(-1, (self.heads, -1)).split((NOPE_DIM, V_DIM), -1)
        q_pe = rope(q[..., NOPE_DIM:], positions, self.theta, halves=False)
        k_pe = rope(k_pe[..., None, :], positions, self.theta, halves=False).expand(*k.shape[:-1], -1)
        whole = (torch.cat((q[..., :NOPE_DIM], q_pe), -1), torch.cat((k, k_pe), -1), v)
        return tuple(part.transpose(1, 2) for part in whole)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = self.parts(x, positions)
        wide = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # one head size, which the fused kernels ask for
        out = F.scaled_dot_product_attention(q, k, wide, attn_mask=seen, is_causal=seen is None)
        return self.o_proj(out[..., :V_DIM].transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = linear(shape.hidden, shape.intermediate)
        self.up_proj = linear(shape.hidden, shape.intermediate)
        self.down_proj = linear(shape.intermediate, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, latent: int):
        super().__init__()
        self.input_layernorm = Norm(shape.hidden)
        self.self_attn = Attention(shape, latent)
        self.post_attention_layernorm = Norm(shape.hidden)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, positions: Tensor, seen: Tensor | None = None) -> Tensor:
        """x [B, T, hidden]; seen [T, T] bool says which tokens a row attends to, None: all before it."""
        x = x + self.self_attn(self.input_layernorm(x), positions, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, shape: Shape, latent: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, latent) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)


class DsaModel(nn.Module):
    """The language model. Dense layers only, no multi-token prediction.

    latent: rank of keys and values that is trained; the checkpoint's is 512, filled with zeros.
    """

    def __init__(self, shape: Shape, latent: int = LATENT_DIM):
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape, latent)
        self.lm_head = linear(shape.hidden, shape.vocab)
        for layer in self.model.layers:  # a layer begins as the identity
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T] under dense attention."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, positions)
        return self.model.norm(x)

    @torch.no_grad()
    def served(self, ids: Tensor, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Logits [T, vocab] fp32 of ids [T] as a server computes them: bf16, and attention to the selected tokens.

        `watch` hears each layer's selection, [T, T] bool.
        """
        positions = torch.arange(len(ids), device=ids.device)
        x = self.model.embed_tokens(ids)[None]
        for number, layer in enumerate(self.model.layers):
            seen = self.selected(layer, layer.input_layernorm(x)[0], positions)
            if watch is not None:
                watch(number, seen)
            x = layer(x, positions, seen)
        return self.lm_head(self.model.norm(x))[0].float()

    def selected(self, layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """[T, T] bool: the index_topk best tokens of each row by the quantised indexer; all where there are no more."""
        attention = layer.self_attn
        query, gates = attention.indexer.queries(x, attention.latent(x), positions)
        keys = on_fp8_grid(attention.indexer.keys(x, positions))
        scores = index_scores(on_fp8_grid(query), gates, keys)
        ahead = positions[None] > positions[:, None]
        best = scores.masked_fill(ahead, -torch.inf).topk(min(self.shape.index_topk, len(positions)), -1).indices
        return torch.zeros_like(ahead).scatter_(1, best, True) & ~ahead
