"""The gate before every timing: it passes the policy's selection, near ties aside, and nothing else."""

import pytest
import torch

from sglang_misa import reference
from sglang_misa.bench import check
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE

HEADS, LENGTH, TOPK = 32, 64 * 30 + 7, 128
POLICIES = {
    "misa": SelectionPolicy(heads=8, block_size=64),
    "hisa": SelectionPolicy(blocks=6, block_size=64),
    "misa-hier": SelectionPolicy(heads=8, candidates=256, block_size=64),
}


def case(policy: SelectionPolicy, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, 128, generator=g).to(torch.float8_e4m3fn)
    gates = torch.randn(HEADS, generator=g).mul(1.5).exp()
    keys = torch.randn(LENGTH, 128, generator=g).to(torch.float8_e4m3fn).float()
    means = keys[: LENGTH // PAGE * PAGE].unflatten(0, (-1, PAGE)).mean(1).bfloat16()
    scores = reference.policy_scores(
        policy, q[None, None], gates[None, None], keys[None], means[None], torch.tensor([[LENGTH]])
    ).flatten()
    return (policy, q, gates, keys, means), scores


@pytest.mark.parametrize("name", POLICIES)
def test_the_policys_selection_passes_and_others_fail(name: str) -> None:
    inputs, scores = case(POLICIES[name])
    best = scores.topk(TOPK).indices
    assert check.same_selection(*inputs, best, TOPK) is True
    assert check.same_selection(*inputs, torch.arange(TOPK), TOPK) is False  # the first tokens
    doubled = torch.cat([best[:-1], best[:1]])
    assert check.same_selection(*inputs, doubled, TOPK) is False
    assert check.same_selection(*inputs, torch.cat([best[:-1], torch.tensor([-1])]), TOPK) is False  # one short
    worst = scores.masked_fill(~torch.isfinite(scores), torch.inf).topk(8, largest=False).indices
    assert check.same_selection(*inputs, torch.cat([best[:-8], worst]), TOPK) is False


def test_a_block_far_below_the_cut_may_not_replace_one_above() -> None:
    policy = POLICIES["hisa"]
    inputs, _ = case(policy)
    dense = reference.index_scores(inputs[1][None, None], inputs[2][None, None], inputs[3][None]).flatten()
    assert check.same_selection(*inputs, dense.topk(TOPK).indices, TOPK) is False  # DSA's own tokens, from any block


def test_heads_that_tie_decide_nothing() -> None:
    policy = POLICIES["misa"]
    (_, q, _, keys, means), scores = case(policy)
    same_head = q[:1].expand(HEADS, 128)
    flat = torch.ones(HEADS)
    assert check.same_selection(policy, same_head, flat, keys, means, scores.topk(TOPK).indices, TOPK) is None
