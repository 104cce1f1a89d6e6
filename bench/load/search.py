"""Search for the highest load inside the service limits: doubling until one fails, then halving the gap.

A load is carried when enough of its requests keep every limit. Each step is measured block by block until Wilson's
interval of that share leaves the target out, or `step_blocks` are spent; then the share decides, and the step says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sglang_misa.bench.load.plan import Cell
from sglang_misa.bench.load.records import NO_SUCCESS, Unit
from sglang_misa.bench.load.settings import LoadError, changed
from sglang_misa.bench.load.stats import Estimate, block_ratio, wilson

STEP_CONFIDENCE = 0.8  # of the two-sided interval: a step is decided with a chance of 10 % to be wrong on its side
RATE_STEP = 1.05  # rates closer than that are one load
Over = Literal["concurrency", "rate"]


class Step(BaseModel):
    """One load that was tried."""

    model_config = ConfigDict(frozen=True)

    level: float
    kept: int
    asked: int
    carried: bool
    decided: bool  # by the interval, not by the share alone


class Capacity(BaseModel):
    """What one arm carried in one context and one search: `level` inside the limits, `beyond` the first outside.

    `level` is 0 where not even the lowest load carried; `beyond` is None where the highest one did.
    """

    model_config = ConfigDict(frozen=True)

    arm: str
    context: str
    search: int
    level: float
    beyond: float | None
    steps: tuple[Step, ...]


class CapacityRatio(BaseModel):
    """B's capacity over A's; the interval holds the spread of the searches and the gap between the loads tried."""

    model_config = ConfigDict(frozen=True)

    context: str
    value: float
    low: float | None
    high: float | None
    searches: int


def find(
    carries: Callable[[float], Step], over: Over, start: float, highest: float
) -> tuple[float, float | None, list[Step]]:
    """(highest load that carried, lowest beyond it that did not, steps) by calls of `carries` at growing cost.

    start: where to begin; every load above a failed one counts as failed, every load under a carried one as carried.
    """
    steps: list[Step] = []

    def tried(level: float) -> bool:
        steps.append(carries(level))
        return steps[-1].carried

    lowest = 1.0 if over == "concurrency" else start / 64
    level = max(lowest, min(_round(start, over), highest))
    if tried(level):
        good, bad = level, None
        while good < highest and bad is None:
            level = min(_round(2 * good, over), highest)
            good, bad = (level, None) if tried(level) else (good, level)
    else:
        good, bad = 0.0, level
        while bad > lowest and not good:
            level = max(lowest, _round(bad / 2, over))
            good, bad = (level, bad) if tried(level) else (0.0, level)
    while bad is not None and good and _apart(good, bad, over):
        level = _round((good + bad) / 2 if over == "concurrency" else math.sqrt(good * bad), over)
        good, bad = (level, bad) if tried(level) else (good, level)
    return good, bad, steps


def judge_step(level: float, units: Sequence[Unit], target: float, last: bool) -> Step | None:
    """The step's result after these blocks; None where another block is needed. The `last` block decides anyhow."""
    if any("slo_kept" not in u.figures for u in units):
        raise LoadError("max: expected service limits, got none; give --slo")
    if problem := next((p for u in units for p in u.problems if not p.startswith(NO_SUCCESS)), None):
        raise LoadError(f"max: expected valid blocks, got one in which {problem}")
    kept = round(sum(u.figures["slo_kept"] for u in units))
    asked = round(sum(u.figures["requests"] for u in units))
    low, high = wilson(kept, asked, STEP_CONFIDENCE)
    if low <= target <= high and not last:
        return None
    decided = not low <= target <= high
    return Step(level=level, kept=kept, asked=asked, carried=kept >= target * asked, decided=decided)


def at_level(cell: Cell, over: Over, level: float) -> Cell:
    """`cell` under another load."""
    load = changed(cell.load, concurrency=int(level)) if over == "concurrency" else changed(cell.load, rate=level)
    return Cell.of(cell.workload, load)


def capacity_ratio(
    a: Sequence[Capacity], b: Sequence[Capacity], b_first: Sequence[bool], confidence: float
) -> CapacityRatio | None:
    """B over A from their searches in one context; None where an arm carried nothing or was never brought to fail."""
    if not a or any(not c.level or c.beyond is None for c in (*a, *b)):
        return None
    estimate: Estimate = block_ratio([c.level for c in a], [c.level for c in b], b_first, confidence)
    gap = max(math.log((c.beyond or c.level) / c.level) for c in (*a, *b))
    low = None if estimate.low is None else estimate.low * math.exp(-gap)
    high = None if estimate.high is None else estimate.high * math.exp(gap)
    return CapacityRatio(context=a[0].context, value=estimate.value, low=low, high=high, searches=len(a))


def _round(level: float, over: Over) -> float:
    return float(max(1, round(level))) if over == "concurrency" else float(f"{level:.3g}")


def _apart(good: float, bad: float, over: Over) -> bool:
    return bad - good > 1 if over == "concurrency" else bad / good > RATE_STEP
