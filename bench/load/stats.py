"""Percentiles, and confidence intervals of means and ratios over blocks.

Requests of one block share a warm machine and noisy neighbours, so the block is the unit of every interval here:
intervals over single requests are too narrow wherever blocks differ (`simulate.py` measures by how much).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtr, stdtrit


class Estimate(NamedTuple):
    """A value with its confidence interval, and the two-sided p-value of "it is the neutral value"; None = unknown."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def percentile(values: ArrayLike, q: float, weights: ArrayLike | None = None) -> float:
    """The q-th percentile (0–100) of `values` repeated `weights` times each, as numpy's linear interpolation gives it.

    Whole weights keep a read of k tokens without copies. NaN when empty.
    """
    data = np.asarray(values, dtype=np.float64)
    counts = np.ones(len(data), np.int64) if weights is None else np.asarray(weights, dtype=np.int64)
    total = int(counts.sum())
    if total == 0:
        return float("nan")
    order = np.argsort(data, kind="stable")
    ends = np.cumsum(counts[order])
    rank = (total - 1) * q / 100
    low, high = int(np.floor(rank)), int(np.ceil(rank))
    below, above = data[order[np.searchsorted(ends, [low, high], side="right")]]
    # interpolate from the nearer side, as numpy does, so that equal neighbours give exactly themselves
    part = rank - low
    return float(below + (above - below) * part if part < 0.5 else above - (above - below) * (1 - part))


def geometric_mean(values: Sequence[float], confidence: float) -> Estimate:
    """Geometric mean of one positive figure a block, with its t-interval."""
    return _exp(_mean(np.log(np.asarray(values, np.float64)), confidence))


def percentile_interval(
    blocks: Sequence[tuple[ArrayLike, ArrayLike]], q: float, confidence: float
) -> tuple[float, float] | None:
    """Interval of the q-th percentile of all blocks together, each given by its values and their weights.

    A block's own p99 is lower than that of all, as it has fewer values: over blocks varies the share of the values that
    are at most the percentile. Student's interval of that share, no narrower than that of independent values, says
    between which percentiles the true one lies. None where one of them would be beyond all values, as that of p100 is.
    """
    values, weights = (np.concatenate([np.asarray(block[i], np.float64) for block in blocks]) for i in (0, 1))
    cut, total, part = percentile(values, q, weights), weights.sum(), q / 100
    if len(blocks) < 2 or not total or not 0 < q < 100:
        return None
    sizes = np.array([np.sum(w) for _, w in blocks], np.float64)
    under = np.array([np.sum(np.asarray(w)[np.asarray(v) <= cut]) for v, w in blocks], np.float64)
    shares = (under - sizes * under.sum() / total) * len(blocks) / total
    error = max(float(shares.std(ddof=1)) / math.sqrt(len(blocks)), math.sqrt(part * (1 - part) / total))
    _, low, high, _ = _student(part, error, len(blocks) - 1, confidence)
    if low is None or high is None or low < 0 or high > 1:
        return None
    return percentile(values, 100 * low, weights), percentile(values, 100 * high, weights)


def block_ratio(a: Sequence[float], b: Sequence[float], b_first: Sequence[bool], confidence: float) -> Estimate:
    """B over A from one positive figure a block and arm; `b_first` says in which blocks B was measured before A.

    The t-interval of the mean log ratio, as of a crossover: where both orders occur, what the order adds (a drift that
    is the same in each block) is estimated beside the ratio and taken out, at the cost of one degree of freedom.
    """
    logs = np.log(np.asarray(b, np.float64)) - np.log(np.asarray(a, np.float64))
    order = np.asarray(b_first, dtype=bool)
    first, second = logs[order], logs[~order]
    if not len(first) or not len(second) or len(logs) < 3:
        return _exp(_mean(logs, confidence))
    value = float(first.mean() + second.mean()) / 2
    freedom = len(logs) - 2
    spread = float(((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()) / freedom
    error = math.sqrt(spread * (1 / len(first) + 1 / len(second))) / 2
    return _exp(_student(value, error, freedom, confidence))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those under α keeps the chance of any false rejection under α."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def wilson(kept: int, asked: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    if not asked:
        return 0.0, 1.0
    z = float(ndtri((1 + confidence) / 2))
    share, scale = kept / asked, 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    half = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2) / scale
    return 0.0 if not kept else middle - half, 1.0 if kept == asked else middle + half


def _mean(values: np.ndarray, confidence: float) -> Estimate:
    if len(values) < 2:
        return Estimate(float(values.mean()))
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return _student(float(values.mean()), error, len(values) - 1, confidence)


def _student(value: float, error: float, freedom: int, confidence: float) -> Estimate:
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(value) / error)) if error > 0 else float(value == 0)
    return Estimate(value, value - half, value + half, p)


def _exp(estimate: Estimate) -> Estimate:
    value, low, high, p = estimate
    return Estimate(
        math.exp(value), None if low is None else math.exp(low), None if high is None else math.exp(high), p
    )
