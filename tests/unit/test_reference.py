"""The invariants of the selection (h = H, zeroed weights, short rows, C ≥ L, chunks, …) on the reference."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import extend, integers

from sglang_misa import ops, reference, reference_pages
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES, ROUTERS, TILT, Router
from sglang_misa.policy import STOCK

HEADS, TOPK = 32, 96


class Case:
    """One request: fp8 queries and keys, gates of both signs, page means of the keys; a row sees its own prefix."""

    def __init__(self, seed: int, length: int, rows: int):
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(1, rows, HEADS, 128, generator=g).to(torch.float8_e4m3fn)
        self.gates = torch.randn(1, rows, HEADS, generator=g) * torch.rand(1, 1, HEADS, generator=g) ** 4
        self.keys = torch.randn(1, length, 128, generator=g).to(torch.float8_e4m3fn).float()
        self.k_scale = torch.ones(1, length)
        self.means = self.keys[:, : length // PAGE * PAGE].unflatten(1, (-1, PAGE)).mean(2)
        self.row_lens = torch.arange(length - rows + 1, length + 1).unsqueeze(0)

    def scores(self, policy: SelectionPolicy, rows: slice = slice(None)) -> torch.Tensor:
        return reference.policy_scores(
            policy, self.q[:, rows], self.gates[:, rows], self.keys, self.k_scale, self.means, self.row_lens[:, rows]
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    length = draw(st.integers(1, 700))
    return Case(draw(st.integers(0, 2**16)), length, draw(st.integers(1, min(length, 20))))


def policies(**fixed: object) -> st.SearchStrategy[SelectionPolicy]:
    axes = {
        "heads": st.sampled_from([None, 1, 4, 8, HEADS]),
        "blocks": st.sampled_from([None, 2, 4]),
        "candidates": st.sampled_from([None, TOPK, 128]),
        "block_size": st.sampled_from([64, 128]),
        "router": st.sampled_from(ROUTERS),
    }
    fixed_axes = {k: st.just(v) for k, v in fixed.items()}
    built = st.builds(SelectionPolicy, **(axes | {"min_len": st.just(0)} | fixed_axes))
    with_residual = st.booleans() if "residual" not in fixed else st.just(fixed["residual"])
    return st.tuples(built, with_residual).map(
        lambda pair: pair[0].model_copy(update={"residual": pair[1] and pair[0].heads not in (None, HEADS)})
    )


@given(cases(), policies(heads=HEADS, blocks=None, candidates=None))
def test_all_heads_routed_is_dsa(case: Case, policy: SelectionPolicy) -> None:
    torch.testing.assert_close(case.scores(policy), case.scores(STOCK), rtol=1e-5, atol=1e-4)


@given(cases(), policies(blocks=None, candidates=None))
def test_routed_heads_equal_all_heads_with_zeroed_gates_and_the_residual_is_one_linear_column(
    case: Case, policy: SelectionPolicy
) -> None:
    heads = policy.heads or HEADS
    complete = case.row_lens // policy.block_size
    k_tilde = reference.block_means(case.means, policy.block_size // PAGE)
    statistics = reference.block_statistics(case.q, case.gates, k_tilde, complete, reference.RouterView(policy.router))
    ids = reference.top_heads(statistics.heads, heads)
    zeroed = torch.zeros_like(case.gates).scatter(2, ids, case.gates.gather(2, ids))
    expected = reference.index_scores(case.q, zeroed, case.keys)
    if policy.residual:
        query, scale = reference.residual_query(case.q, case.gates, ids, statistics.positive)
        expected += torch.einsum("ntd,nld->ntl", query * scale.unsqueeze(-1), case.keys)
    visible = torch.isfinite(case.scores(policy))
    torch.testing.assert_close(case.scores(policy)[visible], expected[visible], rtol=1e-5, atol=1e-4)


@given(cases(), policies())
def test_a_row_always_has_enough_visible_tokens_and_never_an_invisible_one(case: Case, policy: SelectionPolicy) -> None:
    finite = torch.isfinite(case.scores(policy))
    assert not finite[torch.arange(finite.shape[-1]) >= case.row_lens.unsqueeze(-1)].any()
    assert (finite.sum(-1) >= case.row_lens.clamp_max(TOPK)).all()


@given(cases(), policies())
def test_rows_no_longer_than_k_keep_every_token(case: Case, policy: SelectionPolicy) -> None:
    short = case.row_lens[0] <= TOPK
    finite = torch.isfinite(case.scores(policy)[0, short])
    assert (finite.sum(-1) == case.row_lens[0, short]).all()


@given(cases(), policies(blocks=None, candidates=4096))
def test_candidates_that_cover_the_prefix_give_dsa(case: Case, policy: SelectionPolicy) -> None:
    torch.testing.assert_close(case.scores(policy), case.scores(STOCK))


@given(cases(), policies(heads=None, blocks=64, candidates=None))
def test_blocks_that_cover_the_prefix_give_dsa(case: Case, policy: SelectionPolicy) -> None:
    torch.testing.assert_close(case.scores(policy), case.scores(STOCK))


@settings(max_examples=50)
@given(cases(), policies(), st.data())
def test_a_chunk_selects_what_the_whole_call_selects(case: Case, policy: SelectionPolicy, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, case.q.shape[1]))
    parts = [case.scores(policy, part) for part in (slice(0, cut), slice(cut, None)) if part.stop != 0]
    torch.testing.assert_close(torch.cat(parts, dim=1), case.scores(policy), rtol=1e-5, atol=1e-4)


@given(cases(), policies())
def test_bytes_after_a_row_change_nothing(case: Case, policy: SelectionPolicy) -> None:
    before = case.scores(policy)[:, :1]
    seen = int(case.row_lens[0, 0])
    case.keys[:, seen:] = float("nan")
    case.means[:, seen // PAGE :] = float("nan")
    torch.testing.assert_close(case.scores(policy)[:, :1], before, rtol=1e-5, atol=1e-4)


@given(cases(), policies())
def test_nan_gates_never_make_holes(case: Case, policy: SelectionPolicy) -> None:
    case.gates[..., ::3] = float("nan")
    finite = torch.isfinite(case.scores(policy))
    assert (finite.sum(-1) >= case.row_lens.clamp_max(TOPK)).all()


def test_the_first_the_newest_and_the_tail_are_never_pruned() -> None:
    case = Case(0, 64 * 9 + 5, 1)
    scores = case.scores(SelectionPolicy(blocks=2, block_size=64, min_len=0))
    kept = torch.isfinite(scores[0, 0]).nonzero().flatten().tolist()
    assert kept == [*range(64), *range(64 * 8, 64 * 9 + 5)]


def test_router_picks_the_heads_that_answer_the_blocks() -> None:
    """Hand-made: head 3 answers the only block, head 5 has the larger weight but points away from it."""
    q = torch.zeros(1, 1, HEADS, 128)
    q[..., 3, 0], q[..., 5, 0] = 1.0, -1.0
    gates = torch.zeros(1, 1, HEADS)
    gates[..., 3], gates[..., 5] = -1.0, 2.0
    k_tilde, complete = torch.eye(128)[:1].unsqueeze(0), torch.ones(1, 1, dtype=torch.int32)
    for router, head in {"mean": 3, "weight": 5}.items():
        statistics = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView(router))
        assert reference.top_heads(statistics.heads, 1).item() == head
    signed = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView("signed"))
    assert signed.heads[0, 0, 3] < 0  # the signed router would suppress the head that answers


def test_the_error_router_picks_what_a_residual_would_get_wrong() -> None:
    """Heads 1 and 2 are of one sign each, which a linear column has right; head 3 is the loudest of both signs."""
    k_tilde = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0))
    k_tilde[..., 0] = 50.0
    q = torch.zeros(1, 1, HEADS, 128)
    q[..., 1, 0], q[..., 2, 0], q[..., 3, 1], q[..., 4, 2] = 9.0, -9.0, 2.0, 1.0
    q[..., 1:3, 3] = 5.0
    gates, complete = torch.ones(1, 1, HEADS), torch.full((1, 1), 40)
    found = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView("error")).heads[0, 0]
    assert found[3] > found[4] > 100 * found[[1, 2]].max()
    assert found[0] == 0  # of a query of zeros
    one = reference.block_statistics(
        q, gates * 3, k_tilde[:, :1], torch.ones(1, 1), reference.RouterView("error")
    ).heads
    assert one.tolist() == (gates * 3).tolist()  # a single block has no deviation


def test_errors_are_those_of_fp64_down_to_heads_of_a_settled_sign() -> None:
    g = torch.Generator().manual_seed(5)
    q, gates = torch.randn(1, 1, HEADS, 128, generator=g), torch.randn(1, 1, HEADS, generator=g)
    k_tilde = (torch.randn(1, 40, 128, generator=g) + 4 * torch.randn(128, generator=g)).bfloat16().float()
    complete = torch.full((1, 1), 40)
    for tilted in (False, True):
        found = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView("error", tilted=tilted))
        x = q[0, 0].double() @ k_tilde[0].double().T
        mean, deviation = x.mean(1), x.std(1, correction=0)
        if tilted:
            plain = reference.RouterView("error", tilted=False)
            share = reference.block_statistics(q, gates, k_tilde, complete, plain).positive
            every, _ = reference.residual_query(q, gates, torch.empty(1, 1, 0, dtype=torch.int64), share)
            scores = k_tilde[0].double() @ every[0, 0].double()
            mean += TILT * (x - mean[:, None]) @ (scores - scores.mean()) / 40 / scores.std(correction=0)
        spread = torch.maximum(deviation, mean.abs() / 6)
        both = (torch.special.erfc(mean / spread * sign * 0.5**0.5) / 2 for sign in (-1, 1))
        wanted = gates[0, 0].double().abs() * spread * (next(both) * next(both)).sqrt()
        assert wanted.min() < 1e-4 * wanted.max()
        torch.testing.assert_close(found.heads[0, 0].double(), wanted, rtol=1e-3, atol=0)


@given(st.integers(0, 2**16), st.floats(20, 1000))
def test_heads_of_a_settled_sign_do_not_tie(seed: int, loudness: float) -> None:
    """Beyond 13 deviations of block means their tails are 0 in fp32, and the lowest heads would be routed."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(128, generator=g), dim=0)
    k_tilde = torch.randn(1, 40, 128, generator=g) + loudness * direction
    q = torch.randn(1, 1, HEADS, 128, generator=g)
    q += torch.sign(q @ direction)[..., None] * direction  # no head is near the middle
    gates, complete = torch.rand(1, 1, HEADS, generator=g) + 0.5, torch.full((1, 1), 40)
    found = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView("error")).heads[0, 0]
    assert (found > 0).all()
    assert len(found.unique()) > HEADS - 2


@given(st.integers(0, 2**16), st.integers(2, 60))
def test_blocks_that_are_equal_tilt_no_head(seed: int, blocks: int) -> None:
    """Their scores differ by rounding at most, which points nowhere."""
    g = torch.Generator().manual_seed(seed)
    q, gates = torch.randn(1, 1, HEADS, 128, generator=g), torch.randn(1, 1, HEADS, generator=g)
    key = torch.randn(128, generator=g).bfloat16().float()
    complete = torch.full((1, 1), blocks)
    found = reference.block_statistics(q, gates, key.expand(1, blocks, 128), complete, reference.RouterView("error"))
    assert torch.equal(found.positive[0, 0], (q[0, 0] @ key > 0).float())


def test_keys_whose_scores_have_no_deviation_in_fp32_are_routed_without_a_tilt() -> None:
    case = Case(2, 640, 1)
    k_tilde, complete = 1e18 * reference.block_means(case.means, 1), torch.full((1, 1), 10)
    found, plain = (
        reference.block_statistics(case.q, case.gates, k_tilde, complete, reference.RouterView("error", tilted=tilted))
        for tilted in (True, False)
    )
    assert torch.equal(found.heads, plain.heads)
    assert (plain.heads > 0).all()


def test_a_residual_beside_heads_routed_by_error_is_nearest_to_dsa() -> None:
    """On keys whose pages differ more than the keys of a page, as texts have topics."""
    case, g = Case(0, 4096, 60), torch.Generator().manual_seed(1)
    pages = torch.randn(1, 64, 128, generator=g) + 2 * torch.randn(1, 1, 128, generator=g)
    case.keys = 0.3 * case.keys + pages.repeat_interleave(PAGE, 1)
    case.means = case.keys.unflatten(1, (-1, PAGE)).mean(2)
    exact = case.scores(STOCK)
    seen = torch.isfinite(exact)

    def off(router: Router) -> float:
        policy = SelectionPolicy(heads=4, router=router, residual=True, block_size=64, min_len=0)
        return float((case.scores(policy)[seen] - exact[seen]).square().mean())

    assert off("error") < min(off(router) for router in ROUTERS if router != "error")


SCALES = torch.tensor([1.0, 0.5, 2.0, 0.0, -0.0, -1.0, -2.0, torch.inf, -torch.inf, torch.nan, 2.0**-140])


@given(st.integers(0, 2**16), st.sampled_from([None, 8]), st.sampled_from([None, 128]))
def test_a_scale_of_any_sign_and_size_multiplies_the_score_as_in_the_operations(
    seed: int, heads: int | None, candidates: int | None
) -> None:
    """k_scale is outside of the ReLU: a key of negative scale scores where its products are positive."""
    kinds = torch.randint(len(SCALES), (640,), generator=torch.Generator().manual_seed(seed))
    x = extend(replace(integers(4, 640, HEADS, seed=seed, device="cpu"), k_scale=SCALES[kinds]), 8)
    rows, keys, _ = x.operands
    ids, output = reference.top_heads(x.head_gates.abs(), heads or HEADS).int(), ops.Output.empty(rows, TOPK)
    if candidates is None:
        found = ops.topk_routed(rows, keys, ops.RoutedHeads(ids), output, backend="reference")
    else:
        found = ops.topk_reranked(rows, keys, ops.RoutedHeads(ids), candidates, output, backend="reference")
    policy = SelectionPolicy(heads=heads, router="weight", candidates=candidates, block_size=64, min_len=0)
    means = (keys.index_k.float() * keys.k_scale[:, None]).view(1, 10, PAGE, 128).mean(2)
    tensors = (part[None] for part in (rows.index_q, rows.head_gates, keys.index_k, keys.k_scale))
    scores = reference.policy_scores(policy, *tensors, means, x.lens[None])
    assert torch.equal(found.sort().values, reference.top_tokens(scores[0], TOPK).sort().values.int())


def test_page_layout_round_trip() -> None:
    keys = torch.randn(3, PAGE, 128).to(torch.float8_e4m3fn)
    scales = torch.rand(3, PAGE) + 0.1
    pages = torch.cat([keys.view(torch.uint8).flatten(1), scales.view(torch.uint8).flatten(1)], dim=1)
    assert pages.shape[1] == PAGE_BYTES
    torch.testing.assert_close(reference_pages.dequantize_pages(pages), keys.float() * scales.unsqueeze(-1))
    torch.testing.assert_close(reference_pages.page_means(pages), (keys.float() * scales.unsqueeze(-1)).mean(1))


def test_the_residual_is_the_expected_value_of_the_heads_left_out() -> None:
    """One head is always positive, one never, one half the time: their shares are 1, 0 and ½ of their products."""
    q = torch.zeros(1, 1, HEADS, 128)
    q[..., 1, 0], q[..., 2, 0], q[..., 3, 1] = 2.0, -2.0, 4.0
    gates = torch.zeros(1, 1, HEADS)
    gates[..., 0], gates[..., 1:4] = 9.0, 1.0
    k_tilde = torch.zeros(1, 2, 128)
    k_tilde[0, :, 0], k_tilde[0, :, 1] = 1.0, torch.tensor([1.0, -1.0])
    complete = torch.full((1, 1), 2)
    statistics = reference.block_statistics(q, gates, k_tilde, complete, reference.RouterView("weight"))
    assert statistics.positive[0, 0, 1:4].tolist() == [1.0, 0.0, 0.5]
    query, scale = reference.residual_query(q, gates, torch.tensor([[[0]]]), statistics.positive)
    torch.testing.assert_close((query * scale.unsqueeze(-1))[0, 0, :3], torch.tensor([2.0, 2.0, 0.0]))


def test_a_head_that_is_not_finite_adds_nothing_to_the_residual() -> None:
    case = Case(1, 200, 3)
    clean, broken = case.gates.clone(), case.gates.clone()
    clean[..., 5], broken[..., 5] = 0.0, float("nan")
    ids = torch.zeros(1, 3, 1, dtype=torch.int64)
    complete = case.row_lens // 64
    k_tilde = reference.block_means(case.means, 1)
    for gates in (clean, broken):
        statistics = reference.block_statistics(case.q, gates, k_tilde, complete, reference.RouterView("peak"))
        query, scale = reference.residual_query(case.q, gates, ids, statistics.positive)
        assert torch.isfinite(query * scale.unsqueeze(-1)).all()
        if gates is clean:
            expected = query
    assert torch.equal(query, expected)
