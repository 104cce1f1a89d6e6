"""The tokens that the server selected, against a forward of layer 0 written from the papers for this test.

Layer 0's indexer sees the embedded tokens alone, so one layer needs no attention. Roundings follow the model's types:
bf16 activations, fp8 queries and keys with power-of-two scales, fp32 scores, bf16 page means.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sglang_misa import random_model

pytestmark = pytest.mark.serving

SHAPE = random_model.CPU
TOPK, HEADS, DIM, ROPE = SHAPE.index_topk, SHAPE.index_heads, 128, 64
ROUTED, KEPT_BLOCKS, BLOCK, MIN_LEN, TAIL, CHUNK = 8, 4, 64, 100, 24, 512  # of the server
NEW = 24
ENOUGH = 0.97


def rms(x, weight):
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.float()).bfloat16()


def yarn_frequencies():
    """Frequencies [32] of the rotary embedding, from config.json's rope_scaling (arXiv 2309.00071)."""
    scaling = random_model.config(SHAPE)["rope_scaling"]
    base, window = 10000.0, scaling["original_max_position_embeddings"]

    def dimension(turns):
        return ROPE * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(dimension(scaling["beta_fast"])), math.ceil(dimension(scaling["beta_slow"]))
    plain = base ** (-torch.arange(0, ROPE, 2) / ROPE)
    slowed = ((torch.arange(ROPE // 2) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - slowed) + plain / scaling["factor"] * slowed


def rotate(x, positions):
    """Rotary embedding of the first 64 dimensions of [T, …, 128], halves as pairs."""
    angle = (positions[:, None] * yarn_frequencies()).reshape(len(positions), *[1] * (x.dim() - 2), ROPE // 2)
    a, b = x[..., : ROPE // 2].float(), x[..., ROPE // 2 : ROPE].float()
    turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)
    return torch.cat((turned.bfloat16(), x[..., ROPE:]), dim=-1)


def hadamard(x):
    """x · H / √128 by the butterfly."""
    y, step = x.float(), 1
    while step < DIM:
        a, b = y.reshape(*x.shape[:-1], -1, 2, step).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        step *= 2
    return (y * DIM**-0.5).bfloat16()


def quantise(x):
    """(fp8 values as fp32, scales [..., 1]) with the next power of two of max|x| / 448 as scale."""
    scale = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)))
    return (x.float() / scale).to(torch.float8_e4m3fn).float(), scale


def indexer(weights, ids):
    """(q [T, H, 128], gates [T, H], keys [T, 128]) fp32 of layer 0, queries and keys on their fp8 grids."""
    name = "model.layers.0.self_attn"
    x = rms(weights["model.embed_tokens.weight"][ids], weights["model.layers.0.input_layernorm.weight"])
    low = rms(x @ weights[f"{name}.q_a_proj.weight"].T, weights[f"{name}.q_a_layernorm.weight"])
    query = (low @ weights[f"{name}.indexer.wq_b.weight"].T).reshape(-1, HEADS, DIM)
    key = (x @ weights[f"{name}.indexer.wk.weight"].T).float()
    norm = weights[f"{name}.indexer.k_norm.weight"], weights[f"{name}.indexer.k_norm.bias"]
    key = F.layer_norm(key, (DIM,), *norm, eps=1e-6).bfloat16()
    positions = torch.arange(len(ids))
    q, q_scale = quantise(hadamard(rotate(query, positions)))
    k, k_scale = quantise(hadamard(rotate(key, positions)))
    gates = x.float() @ weights[f"{name}.indexer.weights_proj.weight"].T.float()
    return q, gates * q_scale.squeeze(-1) * HEADS**-0.5 * DIM**-0.5, k * k_scale


def selected(q, gates, keys, row, prompt):
    """The positions that `row` should attend to: MISA's (arXiv 2605.07363) in a prompt, HISA's blocks in decode."""
    length = row + 1
    visible = keys[:length]
    scores = gates[row] @ torch.relu(q[row] @ visible.T)
    if length >= MIN_LEN and not prompt - TAIL <= row < prompt:
        blocks = length // BLOCK
        means = visible[: blocks * BLOCK].reshape(blocks, BLOCK, DIM).mean(1).bfloat16().float()
        pooled = gates[row][:, None] * torch.relu(q[row] @ means.T)  # [H, M]
        if row < prompt:
            heads = pooled.abs().mean(1).topk(ROUTED).indices
            scores = gates[row][heads] @ torch.relu(q[row][heads] @ visible.T)
        elif blocks > KEPT_BLOCKS:
            ranked = pooled.sum(0)
            ranked[[0, -1]] = torch.inf
            dropped = ranked.argsort(descending=True)[KEPT_BLOCKS:]
            for block in dropped.tolist():
                scores[block * BLOCK : (block + 1) * BLOCK] = -torch.inf
    return set(scores.topk(min(TOPK, length)).indices.tolist())


def share(chosen, wanted):
    """Mean |A∩B| / |A| over pairs of sets."""
    return float(np.mean([len(a & b) / len(a) for a, b in zip(wanted, chosen, strict=True)]))


def sets(rows):
    """A set of positions for each of [rows, topk], without the padding."""
    return [set(row[row >= 0].tolist()) for row in rows]


@pytest.mark.parametrize("length", [640, CHUNK + TAIL // 3], ids=["", "a tail in two chunks"])
def test_layer_0_selects_what_the_papers_say(server, weights, length):
    ids = np.random.default_rng(5).integers(0, 256, length).tolist()
    server.flush()
    answer = server.generate(ids, new=NEW, selections=True)
    assert answer.cached_tokens == 0
    chosen = sets(answer.selected[:, 0])
    assert len(chosen) == len(ids) + NEW - 1  # the last new token was not fed back

    q, gates, keys = indexer(weights, torch.tensor([*ids, *answer.ids[:-1]]))
    wanted = [selected(q, gates, keys, row, len(ids)) for row in range(len(chosen))]
    assert [len(row) for row in chosen] == [len(row) for row in wanted]
    assert chosen[:TOPK] == wanted[:TOPK]  # all that is visible
    edges = (TOPK, MIN_LEN - 1, length - TAIL, length, len(chosen))
    parts = dict(zip(("under the gate", "misa", "tail", "hisa"), itertools.pairwise(edges), strict=True))
    shares = {name: share(chosen[a:b], wanted[a:b]) for name, (a, b) in parts.items()}
    assert min(shares.values()) >= ENOUGH, shares

    dense = [
        set((gates[row] @ torch.relu(q[row] @ keys[: row + 1].T)).topk(TOPK).indices.tolist()) for row in (300, 480)
    ]
    assert share([chosen[300], chosen[480]], dense) < ENOUGH  # these rows can tell MISA from stock


def test_a_radix_hit_selects_what_a_cold_prompt_selects(server):
    ids = np.random.default_rng(6).integers(0, 256, 500).tolist()
    server.flush()
    server.generate(ids[:300])
    warm = server.generate(ids, selections=True)
    assert warm.cached_tokens == 256
    server.flush()
    cold = server.generate(ids, selections=True)
    assert cold.cached_tokens == 0
    assert warm.ids == cold.ids
    for layer in range(SHAPE.layers):
        assert share(sets(warm.selected[256:, layer]), sets(cold.selected[256:, layer])) >= ENOUGH
    assert sets(warm.selected[:, 0]) == sets(cold.selected[:, 0])
