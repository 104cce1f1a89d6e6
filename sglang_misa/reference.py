"""The algorithms in plain fp32 PyTorch: the oracle of every kernel test, and the engine where there is no kernel.

Shapes carry a leading N: an extend call is one request with T query rows (N = 1), a decode call is N requests with
one row each. D = 128 dimensions, H index heads, h routed heads, L keys, P = L // 64 complete pages, M blocks.

No function reads a tensor back to the host, so all of them can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sglang_misa.config import Router, SelectionPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, ROUTED_PAGES
from sglang_misa.reference_pages import quantize_pages, sketched_keys, unpack_pages
from sglang_misa.reference_products import Products

LOWEST = torch.finfo(torch.float32).min
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127.0

_CHUNK_ELEMENTS = 1 << 26  # fp32 [rows, heads, keys] held at once: 256 MiB


def block_means(means: Tensor, block_pages: int) -> Tensor:
    """Mean keys k̃ [N, M, 128] of M = P // block_pages complete blocks, from page means [N, P, 128].

    Rounded to bf16, as the kernels multiply them (and the authors' code), and returned as fp32.
    """
    n, pages, dim = means.shape
    blocks = pages // block_pages
    return means[:, : blocks * block_pages].float().reshape(n, blocks, block_pages, dim).mean(dim=2).bfloat16().float()


def index_scores(
    index_q: Tensor, head_gates: Tensor, keys: Tensor, residual: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """DSA scores I[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s]), and scale[t] · q̄[t] · k[s] of a residual.

    index_q [N, T, H, 128], head_gates [N, T, H], keys [N, L, 128] (any float dtype) → fp32 [N, T, L], for keys of a
    k_scale to be multiplied with it. residual: q̄ [N, T, 128] and its scale [N, T].
    """
    n, rows, heads, _ = index_q.shape
    length = keys.shape[1]
    scores = torch.empty(n, rows, length, dtype=torch.float32, device=keys.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, n * heads * length))
    keys_t = keys.float().transpose(1, 2)
    for start in range(0, rows, step):
        q = index_q[:, start : start + step].float()
        dots = torch.matmul(q.flatten(1, 2), keys_t).unflatten(1, q.shape[1:3]).relu_()  # [N, step, H, L]
        gates = head_gates[:, start : start + step].float().unsqueeze(2)  # [N, step, 1, H]
        scores[:, start : start + step] = torch.matmul(gates, dots).squeeze(2)
    if residual is not None:
        query, scale = residual
        scores += scale.unsqueeze(-1) * torch.matmul(query.float(), keys_t)
    return scores


class RouterView(NamedTuple):
    """How a router looks at the blocks of a row."""

    router: Router
    stride: Tensor | None = None  # [N, T]: every so many of them; None: all
    tilted: bool = True  # whether errors are those of the keys that score high

    @classmethod
    def of(cls, policy: SelectionPolicy, complete: Tensor) -> RouterView:
        """As a policy does that finds `complete` [N, T] blocks.

        Over sketches, which blur scores more than a residual does, ROUTED_PAGES of them are enough, as far as no blocks
        are kept, which takes the scores of all; and the mean key is that of all keys.
        """
        stride = None
        if policy.sketch is not None and policy.blocks is None:
            stride = (-(-complete // ROUTED_PAGES)).clamp_min(1)
        return cls(policy.router, stride, tilted=policy.sketch is None)


class BlockStatistics(NamedTuple):
    """What a row's products with the block means tell of its heads and of the blocks."""

    heads: Tensor  # E [N, T, H]: what the router ranks
    positive: Tensor  # φ [N, T, H]: share of the keys on which a head is positive, as Φ(μ/σ) of its products
    blocks: Tensor  # [N, T, M]: scores with all heads, -inf for blocks that are not complete


def block_statistics(
    index_q: Tensor, head_gates: Tensor, k_tilde: Tensor, complete: Tensor, view: RouterView
) -> BlockStatistics:
    """Router statistic, positive shares and block scores, from one product with the block means.

    index_q [N, T, H, 128], head_gates [N, T, H], k_tilde [N, M, 128], complete [N, T]: blocks complete at the row's own
    length, of which every `stride`-th is looked at. E over those blocks: `mean` of |w·ReLU(q·k̃)| (arXiv
    2605.07363, Eq. 7), `peak` its maximum, `signed` the mean of w·ReLU(q·k̃), `error` |w|·σ'·√(φ'(1 − φ')), what a
    residual would get wrong; |w| for `weight`, without a block, for `error` without two. φ is ½ without a block. A head
    whose products are not finite has φ = 0, so that it adds nothing to the residual, and no error.

    φ = Φ(μ/σ), and for the error σ' = max(σ, SPREAD · |μ|) and φ' = Φ(μ/σ'). By `error` μ is tilted, unless the view
    says otherwise, to μ + TILT · Cov(x, s) / σ_s with the scores s by the residual of all heads: the mean product with
    the keys that score high, for which a residual matters.
    """
    n, rows, heads, _ = index_q.shape
    blocks = k_tilde.shape[1]
    gates = head_gates.float()
    weight = gates.abs()
    if blocks == 0:
        return BlockStatistics(weight, torch.full_like(gates, 0.5), gates.new_empty(n, rows, 0))
    found = BlockStatistics(torch.empty_like(gates), torch.empty_like(gates), gates.new_empty(n, rows, blocks))
    index = torch.arange(blocks, device=k_tilde.device)
    visible = index < complete.unsqueeze(-1)  # [N, T, M]
    if view.stride is not None:
        visible = visible & (index % view.stride.unsqueeze(-1) == 0)
    step = max(1, _CHUNK_ELEMENTS // max(1, n * heads * blocks))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        seen = visible[:, part].unsqueeze(2)
        of_part = _statistics_of_seen(index_q[:, part].float(), gates[:, part], k_tilde.float(), seen, view)
        for whole, own in zip(found, of_part, strict=True):
            whole[:, part] = own
    some = complete.unsqueeze(-1) > 0
    return BlockStatistics(
        torch.where(some, found.heads, weight),
        found.positive.masked_fill_(~some, 0.5),
        found.blocks.masked_fill_(~visible, -torch.inf),
    )


def _statistics_of_seen(q: Tensor, w: Tensor, k_tilde: Tensor, seen: Tensor, view: RouterView) -> BlockStatistics:
    """`block_statistics` of rows that look at a block or more: seen [N, T, 1, M]; all others fp32, as there.

    Scores are those of all blocks, seen or not.
    """
    k_tilde_t = k_tilde.transpose(1, 2)
    dots = torch.matmul(q.flatten(1, 2), k_tilde_t).unflatten(1, q.shape[1:3])  # [N, T, H, M]
    products = Products.of(dots.masked_fill(~seen, 0.0), seen)
    if view.router == "error" and view.tilted:
        every = residual_query(q, w, torch.empty_like(w[..., :0], dtype=torch.int64), products.linear_part()[0])[0]
        products = products.tilted(torch.matmul(every, k_tilde_t).unsqueeze(2))
    positive, error = products.linear_part()
    activity = dots.relu()
    block_scores = torch.matmul(w.unsqueeze(2), activity).squeeze(2)
    activity = activity.masked_fill_(~seen, 0.0)
    mean = activity.sum(-1) / seen.sum(-1).clamp_min(1)
    heads = {
        "mean": w.abs() * mean,
        "peak": w.abs() * activity.amax(-1),
        "signed": w * mean,
        "weight": w.abs(),
        "error": w.abs() * torch.where(seen.sum(-1) > 1, error, 1.0),
    }[view.router]
    return BlockStatistics(heads, positive, block_scores)


def residual_query(
    index_q: Tensor, head_gates: Tensor, head_ids: Tensor, positive: Tensor, *, int8: bool = False
) -> tuple[Tensor, Tensor]:
    """The heads that are not routed as one linear query: q̄ = Σ_{j not routed} w[t, j] · φ[t, j] · q[t, j].

    index_q […, H, 128], head_gates […, H], head_ids […, h], positive φ […, H]. Returns q̄ / scale, rounded to fp8 e4m3,
    as fp32 […, 128] and scale […], amax |q̄| / 448; or both as `to_int8` has them, which is what sketches are
    multiplied with. A head of no finite weight adds nothing.
    """
    weight = head_gates.float() * positive
    weight = torch.where(torch.isfinite(weight) & (positive > 0), weight, 0.0).scatter(-1, head_ids, 0.0)
    query = torch.matmul(weight.unsqueeze(-2), torch.nan_to_num(index_q.float())).squeeze(-2)
    if int8:
        return to_int8(query)
    scale = query.abs().amax(-1) / FP8_MAX
    usable = torch.isfinite(scale) & (scale > 0)
    query = torch.where(usable.unsqueeze(-1), query / scale.unsqueeze(-1), 0.0)
    return query.to(torch.float8_e4m3fn).float(), torch.where(usable, scale, 1.0)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x fp32 [..., D] in whole units, 127 of which are the largest: numbers fp32 [..., D] and units [...].

    What sketches are multiplied with: x · (127 / largest), halves to the even number. NaN counts as 0; a row that is
    not finite otherwise, or 0, has a unit of 0.
    """
    x = torch.where(x.isnan(), 0.0, x)
    most = x.abs().amax(-1)
    usable = torch.isfinite(most) & (most > 0)
    per_unit = torch.where(usable, torch.full_like(most, INT8_MAX) / most, 0.0)  # a scalar would be times a reciprocal
    numbers = (torch.where(usable.unsqueeze(-1), x, 0.0) * per_unit.unsqueeze(-1)).round()
    return numbers, torch.where(usable, most * (1 / INT8_MAX), 0.0)


def top_heads(statistic: Tensor, heads: int) -> Tensor:
    """Ids int64 [N, T, h], ascending, of the largest of [N, T, H]; ties go to the lower head, NaN never wins."""
    ranked = torch.nan_to_num(statistic, nan=-torch.inf, posinf=torch.inf, neginf=LOWEST)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    return order[..., :heads].sort(dim=-1).values


def best_blocks(block_scores: Tensor, complete: Tensor, blocks: int) -> Tensor:
    """Ids int64 [N, T, min(blocks, M)] of the blocks to keep: the first, the newest complete one, then the best.

    block_scores [N, T, M], complete [N, T]. Blocks that are not complete come last. Ties go to the earlier block, NaN
    never wins.
    """
    index = torch.arange(block_scores.shape[-1], device=block_scores.device)
    newest = complete.unsqueeze(-1) - 1
    ranked = torch.nan_to_num(block_scores, nan=LOWEST, posinf=torch.finfo(torch.float32).max, neginf=LOWEST)
    ranked = ranked.masked_fill((index == 0) | (index == newest), torch.inf).masked_fill(index > newest, -torch.inf)
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :blocks]


def keep_blocks(block_scores: Tensor, complete: Tensor, blocks: int) -> Tensor:
    """Mask [N, T, M] of the complete blocks that `best_blocks` keeps. Arguments as there."""
    visible = torch.arange(block_scores.shape[-1], device=block_scores.device) < complete.unsqueeze(-1)
    best = best_blocks(block_scores, complete, blocks)
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible


def policy_scores(
    policy: SelectionPolicy,
    index_q: Tensor,
    head_gates: Tensor,
    keys: Tensor,
    k_scale: Tensor,
    means: Tensor,
    row_lens: Tensor,
    sketched: Tensor | None = None,
) -> Tensor:
    """Scores fp32 [N, T, L] whose top k is the policy's selection; -inf where a token is out of it.

    index_q [N, T, H, 128], head_gates [N, T, H], keys [N, L, 128] and their k_scale [N, L], means [N, P, 128] of the
    complete pages, row_lens [N, T]: keys row t sees; sketched [N, L, 128], for a policy with a sketch: keys × scales as
    their pages' sketches say. A visible token whose score is NaN or -inf gets the lowest finite score, so that a row
    never has fewer than min(k, row_len) tokens to choose from.
    """
    k_scale = k_scale.unsqueeze(1)
    position = torch.arange(keys.shape[1], device=keys.device)
    visible = position < row_lens.unsqueeze(-1)  # [N, T, L]
    if not policy.active or policy.exact:
        return finite(index_scores(index_q, head_gates, keys) * k_scale, visible)

    known = row_lens
    if policy.sketch is not None:  # a step may have completed the newest page, whose statistics come at its end
        known = (row_lens // PAGE - 1).clamp_min(0) * PAGE
    complete = known // policy.block_size
    k_tilde = block_means(means, policy.block_size // PAGE)
    statistics = block_statistics(index_q, head_gates, k_tilde, complete, RouterView.of(policy, complete))
    ids = None if policy.heads is None else top_heads(statistics.heads, policy.heads)
    queries, gates, residual = columns(policy, index_q, head_gates, ids, statistics.positive)
    if policy.sketch is None:
        scores = index_scores(queries, gates, keys, residual) * k_scale
    else:
        assert sketched is not None, "a policy with a sketch selects from sketched keys"
        scores = index_scores(queries, gates, sketched, residual)

    kept = visible
    if policy.blocks is not None and statistics.blocks.shape[-1] > 0:
        block = (position // policy.block_size).clamp_max(statistics.blocks.shape[-1] - 1)
        tail = position >= (complete * policy.block_size).unsqueeze(-1)
        kept = visible & (tail | keep_blocks(statistics.blocks, complete, policy.blocks)[..., block])
    scores = finite(scores, kept)
    if policy.candidates is None:
        return scores
    if policy.sketch is not None:  # what has no sketch yet is always among the candidates
        scores = scores.masked_fill_(kept & (position >= known.unsqueeze(-1)), torch.inf)
    if policy.candidates < keys.shape[1]:
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., : policy.candidates]
        kept = kept & torch.zeros_like(kept).scatter_(-1, best, True)
    return finite(index_scores(index_q, head_gates, keys) * k_scale, kept)


def columns(
    policy: SelectionPolicy, index_q: Tensor, head_gates: Tensor, head_ids: Tensor | None, positive: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """The columns that a policy scores keys by, as `index_scores` takes them: queries, gates and the residual, if any.

    index_q […, H, 128], head_gates […, H], head_ids int64 […, h], the routed heads, or None: all, without a residual;
    positive φ […, H]. Over sketches a column is int8, and its unit part of the gate.
    """
    queries, gates, residual = index_q.float(), head_gates.float(), None
    if head_ids is not None:
        queries = queries.gather(-2, head_ids.unsqueeze(-1).expand(*head_ids.shape, HEAD_DIM))
        gates = gates.gather(-1, head_ids)
        if policy.residual:
            residual = residual_query(index_q, head_gates, head_ids, positive, int8=policy.sketch is not None)
    if policy.sketch is not None:
        queries, units = to_int8(queries)
        gates = gates * units
    return queries, gates, residual


def row_chunks(rows: int, length: int) -> Iterator[tuple[int, int]]:
    """Row ranges whose fp32 [rows, length] scores stay within the chunk budget."""
    step = max(1, _CHUNK_ELEMENTS // max(1, length))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def finite(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores with NaN and -inf raised to the lowest finite value where kept, and -inf elsewhere."""
    scores = torch.nan_to_num(scores, nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
    return scores.masked_fill_(~kept, -torch.inf)


def top_tokens(scores: Tensor, k: int) -> Tensor:
    """Positions int64 [T, k] of the largest scores [T, L] over -inf, then -1; among equals the earlier wins."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    positions = best.indices[:, :k].masked_fill(best.values[:, :k] == -torch.inf, -1)
    return torch.nn.functional.pad(positions, (0, k - positions.shape[1]), value=-1)


def decode_scores(
    policy: SelectionPolicy,
    index_q: Tensor,
    head_gates: Tensor,
    index_k_pages: Tensor,
    page_means: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """`policy_scores` fp32 [R, 64 W] of decode rows, on the pages that a table names.

    index_q [R, H, 128], head_gates [R, H], index_k_pages uint8 [P, 8448], page_means [P, 128], page_table [R, W], stale
    past a row's end, seq_lens [R]. Sketches are made of what is stored.
    """
    rows, width = page_table.shape
    scores = torch.empty(rows, width * PAGE, dtype=torch.float32, device=page_table.device)
    page = torch.arange(width, device=page_table.device)
    for row in range(rows):
        length = seq_lens[row : row + 1]
        ids = page_table[row].long().masked_fill(page * PAGE >= length, 0)
        pages, means, sketched = index_k_pages[ids], page_means[ids], None
        if policy.sketch is not None:
            sketch = quantize_pages(pages, means, policy.sketch)
            sketched = sketched_keys(*sketch, means, policy.sketch).reshape(1, -1, HEAD_DIM)
        queries = index_q[None, row, None], head_gates[None, row, None]
        keys, k_scale = (part[None] for part in unpack_pages(pages))
        scores[row] = policy_scores(policy, *queries, keys, k_scale, means[None], length[None], sketched).flatten()
    return scores
