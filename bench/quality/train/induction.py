"""Where the small model's training begins: a circuit that looks a token up and says what followed it.

Learning that from nothing takes more tokens than two CPU cores see in some minutes; from here, training sharpens it.
"""

from __future__ import annotations

import torch

from sglang_misa.bench.quality.train.model import DsaModel
from sglang_misa.random_model import NOPE_DIM, ROPE_DIM

CIRCUIT, LATENT = 128, 64  # dimensions of the residual stream, and of latents, that the circuit uses
CONSTANT, IDENTITY, PREVIOUS = 0, slice(1, 64), slice(65, 128)
OTHERS = 0.2  # standard deviation of an embedding beside the circuit
KEPT = 32  # dimensions in which tokens are compared, and written
SHARP, MATCH, WRITE = 2.5, 6.0, 8.0
GATE = 0.5  # of the constant, so that index heads begin with positive gates


@torch.no_grad()
def begin_as_induction(model: DsaModel) -> None:
    """Head 0 of layer 0 looks one token back and keeps what it saw; head 0 of layer 1 looks that up.

    Raises ValueError for fewer than two layers, a hidden size under 128, or latents under 64.
    """
    shape = model.shape
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    if shape.layers < 2 or shape.hidden < CIRCUIT or min(shape.q_rank, first.rank) < LATENT:
        raise ValueError(f"expected 2 layers, {CIRCUIT} hidden, latents of {LATENT}, got {shape} and {first.rank}")
    who = torch.randn(shape.vocab, 63)
    who = who / who.norm(dim=1, keepdim=True)
    embedding = model.model.embed_tokens.weight
    embedding[:, :CIRCUIT] = 0
    embedding[:, CIRCUIT:].normal_(std=OTHERS)
    embedding[:, CONSTANT] = 4.0
    embedding[:, IDENTITY] = 8 * who
    model.lm_head.weight.zero_()[:, IDENTITY] = 0.8 * who
    for norm in (*(layer.input_layernorm for layer in model.model.layers[:2]), model.model.norm):
        norm.weight.fill_((CIRCUIT / shape.hidden) ** 0.5)  # the mean of squares counts the other dimensions too
    for attention in (first, second):
        attention.q_a_layernorm.weight.fill_((LATENT / shape.q_rank) ** 0.5)
        attention.kv_a_layernorm.weight.fill_((LATENT / attention.rank) ** 0.5)
        attention.q_a_proj.weight.zero_()[:LATENT, :LATENT] = torch.eye(LATENT)
        attention.kv_a_proj_with_mqa.weight.zero_()
        _head(attention.q_b_proj.weight, shape.heads).zero_()
        _head(attention.kv_b_proj.weight, shape.heads).zero_()
    frequency = shape.rope_theta ** (-torch.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    low = first.kv_a_proj_with_mqa.weight
    low[:LATENT, :LATENT] = torch.eye(LATENT)
    low[first.rank :: 2, CONSTANT] = SHARP
    query = _head(first.q_b_proj.weight, shape.heads)
    query[NOPE_DIM::2, CONSTANT] = SHARP * torch.cos(frequency)
    query[NOPE_DIM + 1 :: 2, CONSTANT] = -SHARP * torch.sin(frequency)
    _head(first.kv_b_proj.weight, shape.heads)[NOPE_DIM + 1 : NOPE_DIM + 64, IDENTITY] = torch.eye(63)
    first.o_proj.weight[PREVIOUS, IDENTITY] = 2 * torch.eye(63)

    compared = torch.linalg.qr(torch.randn(63, 63))[0][:KEPT]
    low = second.kv_a_proj_with_mqa.weight
    low[:KEPT, IDENTITY] = compared
    low[KEPT : 2 * KEPT, PREVIOUS] = compared
    _head(second.q_b_proj.weight, shape.heads)[:KEPT, IDENTITY] = MATCH * compared
    key_value = _head(second.kv_b_proj.weight, shape.heads)
    key_value[:KEPT, KEPT : 2 * KEPT] = MATCH * torch.eye(KEPT)
    key_value[NOPE_DIM : NOPE_DIM + KEPT, :KEPT] = torch.eye(KEPT)
    second.o_proj.weight[IDENTITY, :KEPT] = WRITE * compared.T

    indexer = second.indexer  # the comparison goes beside the rotated dimensions
    indexer.wk.weight[ROPE_DIM : ROPE_DIM + KEPT, PREVIOUS] += compared
    for rows in indexer.wq_b.weight.unflatten(0, (shape.index_heads, -1)):
        rows[ROPE_DIM : ROPE_DIM + KEPT, IDENTITY] += compared
    # Of a wider input the norm of the keys leaves more to the comparison, and scores would be too sharp to begin with.
    indexer.weights_proj.weight[:, CONSTANT] += GATE * CIRCUIT / shape.hidden


def _head(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of head 0."""
    return weight[: weight.shape[0] // heads]
