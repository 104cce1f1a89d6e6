"""Data types of the load test: one request, one block of one arm, one ratio of two arms."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from sglang_misa.bench.load.plan import Slo
from sglang_misa.bench.load.settings import LoadError

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
LATENCIES = tuple(TITLES)
RATES = ("output_throughput", "input_throughput", "request_throughput", "goodput")
PLAIN = (  # figures that an arm has of its own, without a ratio
    *("error_rate", "slo_share", "needle_wrong", "cached_share", "cached_error_max", "prompt_error_max"),
    *("short_outputs", "long_outputs"),
    *("queue_s_mean", "prefill_s_mean", "gpu_memory_gib_max", "gpu_power_w_mean", "tokens_per_joule"),
    *("cost_million_tokens", "cost_million_output_tokens"),
)
PERCENTILES = (50, 90, 95, 99)
NO_SUCCESS = "no request succeeded"  # the one problem that is a result: too high a load
ENOUGH_FOR_P99 = 100  # requests under which the 99th percentile is hardly more than the maximum


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
    gaps: tuple[float, ...] = ()  # seconds a token, one entry a read
    gap_tokens: tuple[int, ...] = ()  # tokens in that read
    exact: bool = True
    prompt_wanted: int
    prompt_tokens: int | None = None
    output_wanted: int
    output_tokens: int | None = None  # None where the server does not count them
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
        """Seconds for each output token after the first; None for one token, one read, or an unknown length."""
        if self.first is None or self.last is None or (self.output_tokens or 0) < 2 or not self.gaps:
            return None
        assert self.output_tokens is not None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def at_once(self) -> bool:
        """Whether several tokens came, all in one read: nothing can be told of the time between them."""
        return self.good and (self.output_tokens or 0) > 1 and not self.gaps

    def keeps(self, slo: Slo) -> bool:
        """Whether this request is good service under `slo`; a limit on what cannot be told counts as missed."""
        if not self.good:
            return False
        seen = {"ttft": self.ttft, "tpot": self.tpot, "itl_max": max(self.gaps, default=None), "e2e": self.e2e}
        if self.at_once and self.last is not None:  # no token can have taken longer than the answer
            whole = self.last - self.dispatched
            seen |= {"tpot": whole / ((self.output_tokens or 0) - 1), "itl_max": whole}
        limits, counted = slo.of(self.prompt_wanted).items(), self.output_tokens is not None
        return all(limit is None or (counted if (v := seen[name]) is None else v <= limit) for name, limit in limits)


class Unit(BaseModel):
    """What one arm did in one block of one cell."""

    model_config = ConfigDict(frozen=True)

    arm: str
    cell: str  # digest
    label: str
    block: int
    started: float  # Unix time
    figures: dict[str, float]
    errors: dict[str, int]
    client: dict[str, float]
    gpu: dict[str, float]
    metrics: dict[str, float]  # what changed in the server's counters
    misa: dict[str, float]  # indexer calls by path in this block
    problems: tuple[str, ...]  # why these figures must not be used
    notes: tuple[str, ...]  # what to know when reading them
    records: tuple[Record, ...]
    server: dict[str, str] = Field({})  # what the server said of itself
    timeline: dict[str, tuple[tuple[float, float], ...]] = Field({})  # name → (seconds after the start, value)

    @property
    def reasons(self) -> dict[str, str]:
        """Class of error → what the first request of that class was told."""
        told: dict[str, str] = {}
        for record in self.records:
            if record.error is not None:
                told.setdefault(record.error, record.detail)
        return told


class Ratio(BaseModel):
    """B over A for one figure: the geometric mean of the blocks' ratios, and its confidence interval.

    `a` and `b` are the figures of all blocks together; `pairs` requests in `blocks` blocks stand behind the ratio.
    Without at least two blocks there is neither an interval nor a p-value.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    a: float
    b: float
    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of "no difference"
    pairs: int
    blocks: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)

    @property
    def better(self) -> bool:
        """Whether B is the faster one."""
        return (self.value > 1) == (self.metric in RATES)


def split_metric(metric: str) -> tuple[str, str]:
    """`ttft_p99` → (ttft, p99). Raises LoadError for what is no latency and statistic."""
    latency, _, statistic = metric.partition("_")
    percentile = re.fullmatch(r"p(\d{1,3})", statistic)
    if latency not in LATENCIES or not (statistic == "mean" or (percentile and int(percentile[1]) <= 100)):
        raise LoadError(
            f"figure: expected {', '.join(LATENCIES)} with _mean or _p0 to _p100, such as ttft_p50, or one of "
            f"{', '.join(RATES)}; got {metric!r}; rewrite it"
        )
    return latency, statistic


def check_compared(metric: str) -> str:
    """`metric`, where two arms can be compared by it. Raises LoadError."""
    if metric not in RATES:
        split_metric(metric)
    return metric


def title(metric: str) -> str:
    """`ttft_p50` → TTFT p50."""
    head, _, tail = metric.partition("_")
    return f"{TITLES[head]} {tail}" if head in TITLES else metric.replace("_", " ")
