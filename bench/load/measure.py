"""From records to figures: percentiles, goodput, throughput, and paired ratios with bootstrap intervals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import bootstrap

from sglang_misa.bench.load.settings import LoadError, Slo

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
RATES = ("output_throughput", "input_throughput", "request_throughput", "goodput")
RESAMPLES = 2000
Floats = NDArray[np.float64]


class Record(BaseModel):
    """One request as measured. Times in seconds after the start of its block; latencies derive from them."""

    model_config = ConfigDict(frozen=True)

    pair: int  # the same prompt in both arms of a block has the same number
    turn: int = 0
    due: float
    dispatched: float
    first: float | None = None
    last: float | None = None
    done: float | None = None
    gaps: tuple[float, ...] = ()  # seconds a token, one entry a chunk
    gap_tokens: tuple[int, ...] = ()  # tokens in that chunk
    exact: bool = True
    prompt_wanted: int
    prompt_tokens: int | None = None
    output_wanted: int
    output_tokens: int = 0
    cached_wanted: int = 0
    cached_tokens: int | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    needle_depth: float | None = None
    needle_right: bool | None = None
    error: str | None = None
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.error is None and self.first is not None

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.dispatched

    @property
    def e2e(self) -> float:
        assert self.done is not None
        return self.done - self.dispatched

    @property
    def tpot(self) -> float | None:
        """Seconds for each output token after the first; None for an answer of one token."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    def keeps(self, slo: Slo) -> bool:
        """Whether this request is good service under `slo`."""
        if not self.good:
            return False
        seen = {"ttft": self.ttft, "tpot": self.tpot, "itl_max": max(self.gaps, default=None), "e2e": self.e2e}
        limits = slo.model_dump()
        return all(value is None or limits[name] is None or value <= limits[name] for name, value in seen.items())


def percentile(values: ArrayLike, q: float, weights: ArrayLike | None = None) -> float:
    """The q-th percentile (0–100) of `values` repeated `weights` times each, as numpy's linear interpolation gives it.

    Whole weights keep a chunk of k tokens, or a request drawn k times by the bootstrap, without copies. NaN when empty.
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


def _mean(values: Floats, weights: NDArray[np.int64]) -> float:
    return float(np.average(values, weights=weights)) if weights.sum() else float("nan")


@dataclass(frozen=True)
class Sample:
    """One latency of one arm, ready for resampling: values, tokens they stand for, and the request each came from."""

    values: Floats
    weights: NDArray[np.int64]
    owner: NDArray[np.int64]

    @classmethod
    def of(cls, records: Sequence[Record], latency: str) -> Sample:
        """Values of `latency` over good records; owners are positions in `records`."""
        values: list[float] = []
        weights: list[int] = []
        owner: list[int] = []
        for i, record in enumerate(records):
            if not record.good:
                continue
            if latency == "itl":
                values += record.gaps
                weights += record.gap_tokens
                owner += [i] * len(record.gaps)
            elif (value := getattr(record, latency)) is not None:
                values.append(value)
                weights.append(1)
                owner.append(i)
        return cls(np.array(values, np.float64), np.array(weights, np.int64), np.array(owner, np.int64))

    def figure(self, statistic: str, times: NDArray[np.int64] | None = None) -> float:
        """`p50`, `p99`, `mean` …; `times` says how often each request counts (int64 [requests])."""
        weights = self.weights if times is None else self.weights * times[self.owner]
        return (
            _mean(self.values, weights)
            if statistic == "mean"
            else percentile(self.values, float(statistic[1:]), weights)
        )


def summarize(records: Sequence[Record], window_s: float, streamed: int, slo: Slo | None) -> dict[str, float]:
    """Figures of one block by name: `ttft_p50` in seconds, `output_throughput` in tokens a second, `error_rate` …

    Errors are out of the latencies and in every denominator. `streamed` counts all tokens that came inside the window.
    """
    good = [r for r in records if r.good]
    figures: dict[str, float] = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_rate": 1 - len(good) / len(records) if records else 0.0,
        "window_s": window_s,
        "output_throughput": streamed / window_s,
        "input_throughput": sum(r.prompt_tokens or r.prompt_wanted for r in good) / window_s,
        "request_throughput": len(good) / window_s,
    }
    for latency in LATENCIES:
        sample = Sample.of(records, latency)
        if len(sample.values):
            figures |= {f"{latency}_{s}": sample.figure(s) for s in ("mean", *(f"p{q}" for q in PERCENTILES))}
            figures[f"{latency}_max"] = float(sample.values.max())
    if slo is not None:
        kept = sum(r.keeps(slo) for r in records)
        figures |= {"goodput": kept / window_s, "slo_share": kept / len(records) if records else 0.0}
    for name in ("queue_s", "prefill_s"):
        split = [getattr(r, name) for r in good if getattr(r, name) is not None]
        if split:
            figures |= {f"{name}_mean": float(np.mean(split)), f"{name}_p50": percentile(split, 50)}
    asked = [r for r in good if r.needle_right is not None]
    if asked:
        figures |= {"needles": len(asked), "needle_wrong": sum(not r.needle_right for r in asked) / len(asked)}
    figures |= _cache_figures(good)
    figures["inexact_itl"] = sum(not r.exact for r in good) / len(good) if good else 0.0
    figures["short_outputs"] = sum(r.output_tokens < r.output_wanted for r in good)
    return figures


def _cache_figures(good: Sequence[Record]) -> dict[str, float]:
    """Lengths and prefix hits as the server counted them, against what was asked for."""
    figures: dict[str, float] = {}
    known = [r for r in good if r.prompt_tokens is not None]
    if known:
        figures["prompt_error_max"] = max(abs((r.prompt_tokens or 0) - r.prompt_wanted) for r in known)
    cached = [r for r in known if r.cached_tokens is not None]
    if cached:
        prompt = sum(r.prompt_tokens or 0 for r in cached)
        figures["cached_share"] = sum(r.cached_tokens or 0 for r in cached) / max(1, prompt)
        figures["cached_wanted_share"] = sum(r.cached_wanted for r in cached) / max(1, prompt)
        figures["cached_error_max"] = max(abs((r.cached_tokens or 0) - r.cached_wanted) for r in cached)
    return figures


def error_classes(records: Sequence[Record]) -> dict[str, int]:
    """How many requests failed in each way."""
    return dict(Counter(r.error for r in records if r.error is not None).most_common())


class Ratio(BaseModel):
    """B over A for one figure, with its confidence interval; `pairs` requests in `blocks` blocks stand behind it."""

    model_config = ConfigDict(frozen=True)

    metric: str
    a: float
    b: float
    value: float
    low: float
    high: float
    pairs: int
    blocks: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low > 1 or self.high < 1


Blocks = Sequence[Sequence[Record]]  # records of one arm and cell, block by block


def paired_ratios(a: Blocks, b: Blocks, metrics: Sequence[str], confidence: float, seed: int = 0) -> list[Ratio]:
    """Ratios B/A of latency figures over requests that both arms answered, paired by block, prompt and turn.

    The interval is a percentile bootstrap (scipy) over blocks, and over the pairs inside each drawn block, so that
    what a whole block shares (a warm machine, a noisy neighbour) counts as one draw. One block: pairs alone.
    """
    both: list[tuple[Record, Record, int]] = []
    for block, (left, right) in enumerate(zip(a, b, strict=True)):
        others = {(r.pair, r.turn): r for r in right if r.good}
        both += [(r, others[r.pair, r.turn], block) for r in left if r.good and (r.pair, r.turn) in others]
    if not both:
        return []
    block_of = np.array([block for _, _, block in both])
    ratios = []
    for metric in metrics:
        latency, statistic = metric.rsplit("_", 1)
        first = Sample.of([x for x, _, _ in both], latency)
        second = Sample.of([y for _, y, _ in both], latency)
        if not len(first.values) or not len(second.values):
            continue

        def ratio(times: NDArray[np.int64], x: Sample = first, y: Sample = second, s: str = statistic) -> float:
            below = x.figure(s, times)
            return y.figure(s, times) / below if below > 0 else float("nan")

        low, high = _interval(block_of, ratio, confidence, np.random.default_rng(seed))
        all_once = np.ones(len(both), np.int64)
        ratios.append(
            Ratio(
                metric=metric,
                a=first.figure(statistic),
                b=second.figure(statistic),
                value=ratio(all_once),
                low=low,
                high=high,
                pairs=len(both),
                blocks=len(np.unique(block_of)),
            )
        )
    return ratios


def _interval(
    block_of: NDArray[np.int64],
    ratio: Callable[[NDArray[np.int64]], float],
    confidence: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    members = [np.flatnonzero(block_of == block) for block in np.unique(block_of)]
    size = len(block_of)

    def of_pairs(picked: NDArray[np.int64]) -> float:
        return ratio(np.bincount(picked.astype(np.int64), minlength=size))

    def of_blocks(picked: NDArray[np.int64]) -> float:
        drawn = [rng.choice(members[int(i)], len(members[int(i)])) for i in picked]
        return of_pairs(np.concatenate(drawn))

    units, statistic = (len(members), of_blocks) if len(members) > 1 else (size, of_pairs)
    if units < 2:
        return float("-inf"), float("inf")
    result = bootstrap(
        (np.arange(units),),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def rate_ratio(metric: str, a: Sequence[float], b: Sequence[float], confidence: float, seed: int = 0) -> Ratio:
    """Ratio B/A of a figure that each block has once (throughput), its interval over the paired blocks."""
    left, right = np.array(a), np.array(b)

    def ratio(times: NDArray[np.int64]) -> float:
        return float((right * times).sum() / max((left * times).sum(), 1e-12))

    low, high = _interval(np.zeros(len(left), np.int64), ratio, confidence, np.random.default_rng(seed))
    return Ratio(
        metric=metric,
        a=float(left.mean()),
        b=float(right.mean()),
        value=ratio(np.ones(len(left), np.int64)),
        low=low,
        high=high,
        pairs=len(left),
        blocks=len(left),
    )


class Gate:
    """`ttft_p50 > 1.02`: fails when it holds. In an A/B the figure is a ratio B/A; `.low`, `.high` its interval."""

    PATTERN = re.compile(r"\s*([a-z0-9_]+)(?:\.(low|high))?\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*")

    def __init__(self, text: str):
        match = self.PATTERN.fullmatch(text)
        if match is None:
            raise LoadError(f'fail_if: expected something like "ttft_p50 > 1.02", got {text!r}; rewrite it')
        self.text = text.strip()
        self.metric, self.bound, self.sign = match[1], match[2], match[3]
        self.limit = float(match[4])

    def fails(self, value: float) -> bool:
        """Whether the condition holds for `value`."""
        limit = self.limit
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[self.sign]
