"""Whether a kernel's selection is the reference's, near ties aside: no timing is reported on a wrong one."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE

SAME = 0.9995  # share of the selected scores that must agree
CLOSE = 2.0**-11  # relative: tensor cores keep about 13 fraction bits of a sum of fp8 products
NEAR = 2.0**-7  # relative gap under which two head statistics or block scores count as tied: pooled keys are bf16


def same_selection(
    policy: SelectionPolicy, index_q: Tensor, head_gates: Tensor, keys: Tensor, means: Tensor, chosen: Tensor, topk: int
) -> bool | None:
    """Whether the positions `chosen` are a top-k of the policy for one row that sees all of `keys`.

    index_q [H, 128], head_gates [H], keys [L, 128] fp32, means [L // 64, 128], chosen [topk] int (-1 behind the last).
    Blocks whose scores tie at the cut may be kept or not; None where heads tie at the cut, which decides nothing.
    """
    length = keys.shape[0]
    wanted = min(topk, length)
    chosen = chosen[chosen >= 0].long()
    if len(chosen) != wanted or chosen.unique().numel() != wanted or int(chosen.max()) >= length:
        return False
    q, gates, row_lens = index_q[None, None], head_gates[None, None], torch.tensor([[length]], device=keys.device)
    complete = row_lens // policy.block_size
    k_tilde = reference.block_means(means[None], policy.block_size // PAGE)
    statistics = reference.block_statistics(q, gates, k_tilde, complete, policy.router)
    if policy.heads is not None and policy.heads < head_gates.numel():
        ranked = statistics.heads.flatten().sort(descending=True).values
        if _tied(ranked[policy.heads - 1], ranked[policy.heads]):
            return None
    allowed = torch.ones(length, dtype=torch.bool, device=keys.device)
    if policy.blocks is not None and int(complete) > policy.blocks:
        block, scores = torch.arange(int(complete), device=keys.device), statistics.blocks.flatten()
        forced = (block == 0) | (block == int(complete) - 1)
        kept = reference.keep_blocks(statistics.blocks, complete, policy.blocks).flatten()
        contested = scores[kept & ~forced]
        cut = contested.min() if contested.numel() else scores.new_tensor(torch.inf)
        tied = ~forced & ((scores - cut).abs() <= NEAR * scores.abs().max())
        used = torch.zeros_like(kept)
        used[(chosen // policy.block_size).clamp_max(int(complete) - 1)] = True
        if bool((used & ~kept & ~tied).any()) or int((used | forced).sum()) > policy.blocks:
            return False
        position = torch.arange(length, device=keys.device)
        tail = position >= int(complete) * policy.block_size
        kept = torch.where(tied, used, kept)
        allowed = tail | kept[(position // policy.block_size).clamp_max(int(complete) - 1)]
    free = policy.model_copy(update={"blocks": None})
    scores = reference.policy_scores(free, q, gates, keys[None], means[None], row_lens).flatten()
    best = scores.masked_fill(~allowed, -torch.inf).topk(wanted).values
    ours = scores[chosen].sort(descending=True).values
    return bool(torch.isclose(ours, best, rtol=CLOSE, atol=1e-4).float().mean() >= SAME)


def _tied(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs() <= NEAR * a.abs())
