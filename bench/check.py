"""Checks of a kernel's selection against its policy, before any time is reported.

Scores are intervals. Tensor cores keep about 13 fraction bits of a sum of fp8 products, so a kernel may rank two keys
either way whose intervals meet, and no others. What an interval is relative to is the size of the products and not of
the score, which cancels where gates are negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE

PRECISION = 2.0**-13  # of |q|·|k|: how exact a product of a head and a key is on tensor cores
NEAR = 2.0**-7  # relative gap under which two head statistics or block scores count as tied: pooled keys are bf16
RESIDUAL = 2.0**-8  # of |q̄|·|k|: a coordinate or two of q̄ may round to the neighbouring fp8 number
SKETCH = 2.0**-8  # relative: sketched scores are ranked by nine bits of their fraction
MOST_TIES = 32  # sets of routed heads that are tried, where heads tie at the cut
FAINT = 2.0**-118  # means that nowhere reach it have lost bits: 2^-126 is the smallest normal number of bf16
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Row:
    """What one query row sees."""

    index_q: Tensor  # [H, 128] fp8 or float
    head_gates: Tensor  # [H] fp32
    index_k: Tensor  # [L, 128] fp8 or float
    k_scale: Tensor  # [L] fp32
    means: Tensor  # [L // 64, 128] float, the means of its complete pages
    sketched: Tensor | None = None  # [L, 128] fp32: the keys as the sketches of their pages say

    def __len__(self) -> int:
        return len(self.k_scale)


@dataclass(frozen=True)
class Scores:
    """Bounds fp32 [L] of the scores that a right kernel may find."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, value: Tensor, slack: Tensor) -> Scores:
        """NaN and -inf are the lowest number, as the kernels rank them."""
        slack = torch.where(torch.isfinite(value), slack + torch.finfo(torch.float32).tiny, 0)
        value = torch.nan_to_num(value, nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
        return cls(value - slack, value + slack)

    def best(self, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Masks bool [L]: the keys that are surely, and those that may be, among the best `count` of `among` [L]."""
        if int(among.sum()) <= count:
            return among, among
        return among & (self.low > kth(self.high, among, count)), among & (self.high >= kth(self.low, among, count))

    def numbers(self, k_scale: Tensor) -> Scores:
        """Any number that has a score may have any, and the others stay the lowest; any may a key of infinite scale."""
        there, infinite = self.high > LOWEST, k_scale.isinf()
        low = torch.where(there & ~infinite, LOWEST / 2, LOWEST)
        return Scores(low, torch.where(there | infinite, -LOWEST, LOWEST))

    def anything(self) -> Scores:
        """Any key may have any score."""
        return Scores(torch.full_like(self.low, LOWEST), torch.full_like(self.high, -LOWEST))


def kth(values: Tensor, among: Tensor, k: int) -> Tensor:
    """The k-th largest of `values` [L] where `among` [L]; -inf where there are fewer, inf for k = 0."""
    if k == 0 or int(among.sum()) < k:
        return values.new_tensor(torch.inf if k == 0 else -torch.inf)
    return values.masked_fill(~among, -torch.inf).topk(k).values[-1]


def row_scores(
    index_q: Tensor,
    head_gates: Tensor,
    index_k: Tensor,
    k_scale: Tensor,
    residual: tuple[Tensor, Tensor] | None = None,
    *,
    precision: float = PRECISION,
) -> Scores:
    """I[s] = k_scale[s] · (Σ_j w[j] · ReLU(q[j]·k[s]) + scale · q̄·k[s]) over the heads of index_q [h, 128].

    head_gates [h], index_k [L, 128], k_scale [L]; residual: q̄ [128] and its scale.
    """
    q, k = index_q.float(), index_k.float()
    dots, size = q @ k.T, k.norm(dim=1)
    margin = precision * q.norm(dim=1, keepdim=True) * size
    value, slack = head_gates @ dots.relu(), head_gates.abs() @ (margin * (dots > -margin))
    if residual is not None:
        query, scale = residual
        value += scale * (k @ query)
        slack += scale * RESIDUAL * query.norm() * size
    return Scores.around(value * k_scale, slack * k_scale.abs())


def flaw(chosen: Tensor, surely: Tensor, maybe: Tensor, scores: Scores, k: int) -> str | None:
    """What is wrong with positions `chosen` [n] as the best k of some candidates; None where it may be right.

    surely and maybe: masks bool [L] of the keys that are, and that may be, candidates.
    """
    expected = min(k, int(maybe.sum()))
    if len(chosen) != expected or len(chosen.unique()) != expected:
        return f"expected {expected} different positions, got {len(chosen.unique())} in {len(chosen)}"
    if expected and (int(chosen.min()) < 0 or int(chosen.max()) >= len(maybe)):
        return f"expected positions under {len(maybe)}, got {int(chosen.min())} to {int(chosen.max())}"
    taken = torch.zeros_like(maybe)
    taken[chosen] = True
    for problem, wrong in (
        ("are no candidates", taken & ~maybe),
        ("are clearly below the cut", taken & (scores.high < kth(scores.low, surely, k))),
        ("are missing, clearly above the cut", ~taken & surely & (scores.low > kth(scores.high, maybe, k))),
    ):
        if wrong.any():
            return f"{int(wrong.sum())} positions {problem}, the first {wrong.nonzero()[:4, 0].tolist()}"
    return None


def selection_flaw(policy: SelectionPolicy, row: Row, chosen: Tensor, topk: int) -> str | None:
    """What is wrong with `chosen` [topk] int (-1 behind the last) as the policy's top k; None if it may be right.

    Where heads tie at the cut, the selection by any of them is right; raises Undecided where too many do. Where a mean
    of a page is not finite, or all are too small for bf16, nothing says which heads and blocks are best: any positions
    are right, but for keys of no finite score in the place of others.
    """
    if (chosen >= 0).sum() != min(topk, len(row)):
        return f"expected {min(topk, len(row))} positions, got {int((chosen >= 0).sum())}"
    positions = chosen[chosen >= 0].long()
    if len(positions) and int(positions.max()) >= len(row):
        return f"expected positions under {len(row)}, got {int(positions.max())}"
    full = row_scores(*_tensors(row))
    every = torch.ones(len(row), dtype=torch.bool, device=chosen.device)
    if len(row) <= topk or not policy.active or policy.exact:
        return flaw(positions, every, every, full, topk)
    problems = []
    for complete in _complete(policy, len(row)):
        blocks = torch.tensor([[complete]], device=chosen.device)
        k_tilde = reference.block_means(row.means[None], policy.block_size // PAGE)
        rows = row.index_q[None, None], row.head_gates[None, None]
        view = reference.RouterView.of(policy, blocks)
        statistics = reference.block_statistics(*rows, k_tilde, blocks, view)
        looked_at = statistics.blocks[..., : complete : 1 if view.stride is None else int(view.stride)]
        finite = statistics.heads.isfinite().all() and looked_at.isfinite().all()
        faint = bool(complete) and 0 < float(row.means.abs().max()) < FAINT
        if faint or not finite:
            bounds = full.numbers(row.k_scale) if policy.blocks is None else full.anything()
            return flaw(positions, every, every, bounds, topk)
        allowed, problem = _allowed(policy, statistics.blocks.flatten(), positions, len(row))
        if problem is not None:
            return problem
        for heads in _routed(policy, statistics.heads.flatten()):
            cheap = _cheap(policy, row, heads, statistics.positive.flatten())
            if policy.candidates is None:
                found = flaw(positions, allowed, allowed, cheap, topk)
            else:
                found = flaw(positions, *cheap.best(allowed, policy.candidates), full, topk)
            if found is None:
                return None
            problems.append(found)
    return problems[0]


def _complete(policy: SelectionPolicy, length: int) -> list[int]:
    """Complete blocks that a right router may look at: in a decode step the newest may have been completed just now."""
    complete = length // policy.block_size
    return [complete, max(complete - 1, 0)] if policy.sketch else [complete]


class Undecided(Exception):
    """So many heads tie at the cut that nothing can be said of a row."""


def _tensors(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return row.index_q, row.head_gates, row.index_k, row.k_scale


def _cheap(policy: SelectionPolicy, row: Row, heads: Tensor | None, positive: Tensor) -> Scores:
    """Bounds of the scores by `heads` [h] (None: all), the residual of the others, and the sketched keys if any."""
    queries, gates, residual = reference.columns(policy, row.index_q, row.head_gates, heads, positive)
    if policy.sketch is None:
        return row_scores(queries, gates, row.index_k, row.k_scale, residual)
    assert row.sketched is not None, "a policy with a sketch selects from sketched keys"
    scores = row_scores(queries, gates, row.sketched, torch.ones_like(row.k_scale), residual)
    # Always among the candidates: the page that is not complete and, as this step may have completed it, the newest
    # that is.
    position, complete = torch.arange(len(row), device=gates.device), len(row) // PAGE
    low, high = scores.low - SKETCH * scores.low.abs(), scores.high + SKETCH * scores.high.abs()
    return Scores(
        low.masked_fill(position >= complete * PAGE, torch.inf),
        high.masked_fill(position >= (complete - 1) * PAGE, torch.inf),
    )


def _routed(policy: SelectionPolicy, statistic: Tensor) -> Iterator[Tensor | None]:
    """The sets of heads that a right router may take, the likeliest first; None: all heads."""
    if policy.heads is None or policy.heads >= len(statistic):
        yield None
        return
    ranked = torch.nan_to_num(statistic, nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=LOWEST)
    order = ranked.sort(descending=True, stable=True).indices
    cut = ranked[order[policy.heads - 1]]
    tied = (ranked[order] - cut).abs() <= NEAR * cut.abs()
    sure = [int(j) for j in order[: policy.heads] if not tied[(order == j).nonzero()[0, 0]]]
    open_ = order[tied].tolist()
    for count, others in enumerate(itertools.combinations(open_, policy.heads - len(sure))):
        if count == MOST_TIES:
            raise Undecided
        yield torch.tensor(sorted([*sure, *others]), device=statistic.device)


def _allowed(policy: SelectionPolicy, block_scores: Tensor, chosen: Tensor, length: int) -> tuple[Tensor, str | None]:
    """The tokens of the kept blocks, bool [length], as `chosen` shows which of the tied blocks were kept."""
    complete = length // policy.block_size
    position = torch.arange(length, device=chosen.device)
    if policy.blocks is None or complete <= policy.blocks:
        return torch.ones_like(position, dtype=torch.bool), None
    block = torch.arange(complete, device=chosen.device)
    forced = (block == 0) | (block == complete - 1)
    count = torch.tensor([[complete]], device=chosen.device)
    kept = reference.keep_blocks(block_scores[None, None, :complete], count, policy.blocks).flatten()
    contested = block_scores[:complete][kept & ~forced]
    cut = contested.min() if contested.numel() else block_scores.new_tensor(torch.inf)
    tied = ~forced & ((block_scores[:complete] - cut).abs() <= NEAR * block_scores[:complete].abs().max())
    used = torch.zeros_like(kept)
    inside = chosen[chosen < complete * policy.block_size]
    used[inside // policy.block_size] = True
    tail = position >= complete * policy.block_size
    of_block = (position // policy.block_size).clamp_max(complete - 1)
    if (used & ~kept & ~tied).any():
        return tail, f"block {int((used & ~kept & ~tied).nonzero()[0, 0])} is not among the best {policy.blocks}"
    if int((used | forced).sum()) > policy.blocks:
        return tail, f"expected tokens of {policy.blocks} blocks, got {int((used | forced).sum())}"
    return tail | torch.where(tied, used, kept)[of_block], None


def recall(row: Row, chosen: Tensor, topk: int) -> float:
    """Share of DSA's fp32 top k among `chosen` [topk] int (-1 behind the last); NaN never wins."""
    wanted = row_scores(*_tensors(row), precision=0).high.topk(min(topk, len(row))).indices
    return float(torch.isin(wanted, chosen).float().mean())
