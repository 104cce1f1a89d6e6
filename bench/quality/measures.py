"""Measures of two arms' answers: agreement of tokens, log-probabilities and selected positions, needles found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from sglang_misa.bench.quality.asking import Answer


class Agreement(NamedTuple):
    """Two answers. equal: share of the shorter one's tokens before the first difference, whose place is `differs`.

    kl: mean KL(first ‖ second) in nats over the tokens up to there, over the top log-probabilities that both servers
    tell and one rest; None where a server tells none.
    """

    equal: float
    differs: int | None
    kl: float | None


def agreement(first: Answer, second: Answer) -> Agreement:
    """How far two greedy answers to one prompt agree; by characters where a server tells no token ids."""
    a: Sequence[object] = first.ids or first.text
    b: Sequence[object] = second.ids or second.text
    most = min(len(a), len(b))
    at = next((i for i in range(most) if a[i] != b[i]), None if len(a) == len(b) else most)
    shared = most if at is None else at
    comparable = len(first.ids) > 0  # else `shared` counts characters, and rows of log-probabilities have no place
    rows = list(zip(first.top, second.top, strict=False))[: shared + 1] if comparable else []
    told = [divergence(p, q) for p, q in rows if p and q]
    return Agreement(shared / max(1, len(a), len(b)), at, float(np.mean(told)) if told else None)


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """KL in nats of two lists token → log-probability; what one of them lacks is in the rest of both."""
    shared = sorted(p.keys() & q.keys())
    ours, theirs = ([math.exp(side[token]) for token in shared] for side in (p, q))
    total = 0.0
    for one, other in zip([*ours, max(0.0, 1 - sum(ours))], [*theirs, max(0.0, 1 - sum(theirs))], strict=True):
        total += one * math.log(one / max(other, 1e-9)) if one > 1e-9 else 0.0
    return max(0.0, total)


def recall(first: NDArray[np.int32], second: NDArray[np.int32]) -> NDArray[np.float64]:
    """[rows, layers] share of first's positions that second has too, both [rows, layers, topk]; NaN for rows shorter
    than topk, which see everything."""
    shares = np.full(first.shape[:2], np.nan)
    for row, layer in np.ndindex(*shares.shape):
        wanted = first[row, layer]
        if (wanted >= 0).all():
            shares[row, layer] = np.isin(wanted, second[row, layer]).mean()
    return shares


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of as many one-sided differences of pairs by chance (McNemar, exact)."""
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    return 1.0 if lost + won == 0 else float(binomtest(lost, lost + won).pvalue)
