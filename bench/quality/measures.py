"""Measures of two arms' answers: agreement of tokens, log-probabilities and selected positions, needles found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from sglang_misa.bench.quality.asking import Answer


class Agreement(NamedTuple):
    """Two answers: how many `units` the longer one has, the share of them before the first difference, and its place.

    unit: tokens, or characters where a server tells no token ids. kl: mean KL(first ‖ second) in nats over the tokens
    up to there, over the top log-probabilities that both servers tell and one rest; None where they tell none. paired:
    how many tokens that were.
    """

    equal: float
    differs: int | None
    units: int
    unit: str
    kl: float | None
    paired: int


def agreement(first: Answer, second: Answer) -> Agreement:
    """How far two greedy answers to one prompt agree."""
    told = bool(first.ids and second.ids)  # else places are of characters, and rows of log-probabilities have none
    a: Sequence[object] = first.ids if told else first.text
    b: Sequence[object] = second.ids if told else second.text
    least, most = sorted((len(a), len(b)))
    at = next((i for i in range(least) if a[i] != b[i]), None if least == most else least)
    shared = most if at is None else at
    rows = list(zip(first.top, second.top, strict=False))[: shared + 1] if told else []
    kls = [divergence(p, q) for p, q in rows if p and q]
    unit, kl = "tokens" if told else "characters", float(np.mean(kls)) if kls else None
    return Agreement(shared / most if most else 1.0, at, most, unit, kl, len(kls))


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """KL in nats of two lists token → log-probability; what one of them lacks is in the rest of both."""
    shared = sorted(p.keys() & q.keys())
    ours, theirs = ([math.exp(side[token]) for token in shared] for side in (p, q))
    total = 0.0
    for one, other in zip([*ours, max(0.0, 1 - sum(ours))], [*theirs, max(0.0, 1 - sum(theirs))], strict=True):
        total += one * math.log(one / max(other, 1e-9)) if one > 1e-9 else 0.0
    return max(0.0, total)


def recall(first: NDArray[np.int32], second: NDArray[np.int32]) -> NDArray[np.float64]:
    """[rows, layers] share of first's positions that second has too, both [rows, layers, topk]; NaN for the first topk
    rows, which see no more than that, and for rows that were not selected for."""
    shares = np.full(first.shape[:2], np.nan)
    for row, layer in np.ndindex(*shares.shape):
        wanted = first[row, layer]
        if row >= len(wanted) and (wanted >= 0).all():
            shares[row, layer] = np.isin(wanted, second[row, layer]).mean()
    return shares


Audit = dict[str, dict[str, dict[str, float]]]  # phase → layer → recall, p10, rows


def pooled(audits: Sequence[Mapping[str, Any]]) -> Audit:
    """What several audits tell of all their rows together; of their tenth percentiles the lowest."""
    parts: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for audit in audits:
        for phase, layers in audit.items():
            for layer, told in layers.items():
                parts.setdefault((phase, layer), []).append(told)
    found: Audit = {}
    for (phase, layer), told in parts.items():
        rows = [each["rows"] for each in told]
        mean = float(np.average([each["recall"] for each in told], weights=rows))
        low = min(each["p10"] for each in told)
        found.setdefault(phase, {})[layer] = {"recall": mean, "p10": low, "rows": sum(rows)}
    return found


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p-value of as many one-sided differences of pairs by chance (McNemar, exact)."""
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    won = sum(b and not a for a, b in zip(first, second, strict=True))
    return 1.0 if lost + won == 0 else float(binomtest(lost, lost + won).pvalue)
