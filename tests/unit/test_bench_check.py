"""The gate before every timing: it passes the policy's selection, near ties aside, and nothing else."""

from pathlib import Path

import pytest
import torch

from sglang_misa import reference
from sglang_misa.bench import check, inputs
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE

TRAINED = Path(__file__).parents[3] / "shared/trained/layer2.safetensors"
HEADS, LENGTH, TOPK = 32, 64 * 30 + 7, 128
POLICIES = {
    "misa": SelectionPolicy(heads=8, block_size=64),
    "hisa": SelectionPolicy(blocks=6, block_size=64),
    "misa-hier": SelectionPolicy(heads=8, candidates=256, block_size=64),
}


def case(policy: SelectionPolicy, name: str = "random", length: int = LENGTH, heads: int = HEADS):
    """A row, and the scores whose top k is the policy's."""
    x = inputs.make(name, 1, length, heads, seed=1, device="cpu")
    keys = x.index_k.float() * x.k_scale[:, None]
    means = keys[: length // PAGE * PAGE].unflatten(0, (-1, PAGE)).mean(1).bfloat16()
    row = check.Row(x.index_q[0], x.head_gates[0], x.index_k, x.k_scale, means)
    tensors = row.index_q[None, None], row.head_gates[None, None], x.index_k[None], x.k_scale[None], means[None]
    scores = reference.policy_scores(policy, *tensors, torch.tensor([[length]]))
    return row, scores.flatten()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", ["random", "topics", "hostile:negative-gates", "hostile:period-24"])
def test_the_policys_selection_passes_and_others_fail(name: str, kind: str) -> None:
    policy = POLICIES[name]
    row, scores = case(policy, kind)
    best = scores.topk(TOPK).indices
    assert check.selection_flaw(policy, row, best, TOPK) is None
    assert check.selection_flaw(policy, row, torch.arange(TOPK), TOPK)  # the first tokens
    assert "different" in check.selection_flaw(policy, row, torch.cat([best[:-1], best[:1]]), TOPK)
    assert "expected 128" in check.selection_flaw(policy, row, torch.cat([best[:-1], torch.tensor([-1])]), TOPK)
    worst = scores.masked_fill(~torch.isfinite(scores), torch.inf).topk(1, largest=False).indices
    assert check.selection_flaw(policy, row, torch.cat([worst, best[1:]]), TOPK)


@pytest.mark.parametrize("name", ["misa", "misa-hier"])
def test_keys_that_are_nan_win_no_place_whatever_heads_are_routed(name: str) -> None:
    """Every page has such keys, so that no mean says which heads are best."""
    row, scores = case(POLICIES[name], "hostile:nan-keys")
    finite = row.k_scale.isfinite().nonzero()[:, 0]
    assert check.selection_flaw(POLICIES[name], row, scores.topk(TOPK).indices, TOPK) is None
    assert check.selection_flaw(POLICIES[name], row, finite[:TOPK], TOPK) is None
    broken = row.k_scale.isnan().nonzero()[:1, 0]
    assert "below the cut" in check.selection_flaw(POLICIES[name], row, torch.cat([broken, finite[: TOPK - 1]]), TOPK)


def test_keys_of_infinite_scale_may_have_any_place_and_nan_none() -> None:
    row, _ = case(POLICIES["misa"], "hostile:inf-keys")
    infinite, finite = (mask.nonzero()[:, 0] for mask in (row.k_scale.isinf(), row.k_scale.isfinite()))
    assert len(infinite) > 10
    assert check.selection_flaw(POLICIES["misa"], row, torch.cat([infinite, finite])[:TOPK], TOPK) is None
    assert check.selection_flaw(POLICIES["misa"], row, finite[:TOPK], TOPK) is None


def test_means_too_small_for_bf16_say_nothing_of_heads_and_blocks() -> None:
    row, _ = case(POLICIES["hisa"], "hostile:denormal-scales")
    assert check.selection_flaw(POLICIES["hisa"], row, torch.arange(TOPK), TOPK) is None
    row, _ = case(POLICIES["hisa"])
    assert check.selection_flaw(POLICIES["hisa"], row, torch.arange(TOPK), TOPK)


@pytest.mark.parametrize("name", ["random", "hostile:nan-keys", "hostile:negative-scales"])
def test_recall_is_of_the_scores_that_stock_computes(name: str) -> None:
    """The scale is outside the ReLU, and NaN is the worst score: torch.topk takes it for the best."""
    row, _ = case(POLICIES["misa"], name)
    dots = (row.index_q.float() @ row.index_k.float().T).relu()
    scores = ((row.head_gates @ dots) * row.k_scale).nan_to_num(nan=-torch.inf)
    best = scores.topk(TOPK).indices
    assert check.recall(row, best, TOPK) == 1
    assert check.recall(row, torch.cat([best[: TOPK // 2], scores.topk(TOPK, largest=False).indices]), TOPK) == 0.5


@pytest.mark.parametrize("name", ["one-key", "distinct-64", "zero-scores", "zero-scales", "denormal-scales"])
def test_any_of_equal_keys_may_be_taken(name: str) -> None:
    policy = POLICIES["misa"]
    row, scores = case(policy, f"hostile:{name}")
    for order in (scores, scores.flip(0)):
        best = order.topk(TOPK).indices
        assert check.selection_flaw(policy, row, best if order is scores else LENGTH - 1 - best, TOPK) is None


@pytest.mark.skipif(not TRAINED.exists(), reason=f"needs {TRAINED}")
@pytest.mark.parametrize("name", ["misa", "misa-hier"])
def test_rounding_passes_where_scores_cancel_and_a_wrong_row_does_not(name: str) -> None:
    """Trained scores near the cut are sums of large terms of both signs: their own size says nothing of their error."""
    policy, topk = POLICIES[name], 512
    policy = policy.model_copy(update={"candidates": policy.candidates and 2048})
    row, scores = case(policy, f"trained:{TRAINED}", length=16384, heads=64)
    dots = (row.index_q.float() @ row.index_k.float().T).relu()
    size = row.head_gates.abs() @ dots * row.k_scale
    noise = size * 2.0**-12 * torch.randn(len(row), generator=torch.Generator().manual_seed(0))
    if policy.candidates is None:
        assert check.selection_flaw(policy, row, (scores + noise).topk(topk).indices, topk) is None
    assert check.selection_flaw(policy, row, scores.topk(topk).indices, topk) is None
    swapped = scores.topk(topk + 64).indices[64:]  # the best ones left out
    assert check.selection_flaw(policy, row, swapped, topk)


def test_a_block_far_below_the_cut_may_not_replace_one_above() -> None:
    row, _ = case(POLICIES["hisa"])
    keys = row.index_k.float() * row.k_scale[:, None]
    dense = reference.index_scores(row.index_q[None, None], row.head_gates[None, None], keys[None]).flatten()
    of_any_block = dense.topk(TOPK).indices
    assert "block" in check.selection_flaw(POLICIES["hisa"], row, of_any_block, TOPK)
    assert check.recall(row, of_any_block, TOPK) == 1.0


def test_any_of_two_heads_that_tie_may_be_routed_to() -> None:
    policy = SelectionPolicy(heads=1, block_size=64)
    row, _ = case(policy)
    gates = torch.zeros(HEADS)
    gates[[3, 5]] = 1.0
    q = row.index_q.float().clone()
    q[5] = q[3].flip(0) * 1.0
    # The means see both heads alike, their keys do not.
    row = check.Row(q, gates, row.index_k, row.k_scale, torch.ones_like(row.means))
    for head, verdict in ((3, True), (5, True), (4, False)):
        chosen = ((q[head] @ row.index_k.float().T).relu() * row.k_scale).topk(TOPK).indices
        assert (check.selection_flaw(policy, row, chosen, TOPK) is None) is verdict


def test_heads_that_all_tie_decide_nothing() -> None:
    policy = POLICIES["misa"]
    row, scores = case(policy)
    same = check.Row(row.index_q[:1].float().expand(HEADS, 128), torch.ones(HEADS), row.index_k, row.k_scale, row.means)
    with pytest.raises(check.Undecided):
        check.selection_flaw(policy, same, scores.topk(TOPK).indices, TOPK)
