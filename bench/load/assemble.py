"""From the raw records of a block to a unit: its figures, why they may be invalid, and notes for the reader."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sglang_misa.bench.load import selection
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.drive import Ledger
from sglang_misa.bench.load.environment import facts
from sglang_misa.bench.load.figures import error_classes, server_figures, summarize
from sglang_misa.bench.load.plan import Arm, Cell, Slo
from sglang_misa.bench.load.records import NO_SUCCESS, Record, Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Bounds
from sglang_misa.bench.load.watch import Series
from sglang_misa.bench.load.workload import LEAD

MAX_POINTS = 240  # of one series of a block's timeline
STILL = 10.0  # times the lag that is allowed at the p99, from which on a single one is told
FEW_WAVES = 5  # requests for each client under which the start and the end of the load weigh too much
Metrics = dict[str, float]


@dataclass(frozen=True)
class Snapshot:
    """A server's counters at one moment."""

    at: float  # Unix time
    info: Mapping[str, Any]
    calls: dict[str, int]
    metrics: Metrics

    @classmethod
    def of(cls, control: Control) -> Snapshot:
        info = control.refresh()
        return cls(time.time(), info, selection.calls(info), control.metrics())


@dataclass(frozen=True)
class Measured:
    """Everything that one block brought."""

    block: int
    ledger: Ledger
    before: Snapshot
    after: Snapshot
    gpu: dict[str, float]
    series: dict[str, Series]  # of the server and the GPUs
    notes: list[str]

    @property
    def went_away(self) -> bool:
        """Whether the server was down or another process at some time of the block."""
        before, after = self.before, self.after
        refused = any(r.error == "refused" for r in self.ledger.records)
        new_calls = bool(after.info) and any(after.calls.get(path, 0) < n for path, n in before.calls.items())
        counters = ((k, n) for k, n in before.metrics.items() if k.split("{")[0].endswith("_total"))
        return refused or new_calls or any(after.metrics.get(k, n) < n for k, n in counters)


@dataclass(frozen=True)
class Assembler:
    """Units of one arm in one cell."""

    arm: Arm
    cell: Cell
    bounds: Bounds
    slo: Slo | None
    page: int
    keys: Keys

    def unit(self, measured: Measured) -> Unit:
        ledger = measured.ledger
        records = sorted(ledger.records, key=lambda r: (r.pair, r.turn))
        end = max((r.done or r.dispatched for r in records), default=0.0)
        start = max(ledger.steady, min((r.dispatched for r in records), default=0.0))
        start = start if start < end else min((r.dispatched for r in records), default=0.0)
        good = [r for r in records if r.good]
        counted = not good or any(r.output_tokens is not None for r in good)
        streamed = sum(count for at, count in ledger.tokens if start <= at <= end) if counted else None
        metrics = _changes(measured.before.metrics, measured.after.metrics)
        figures = summarize(records, (start, end), streamed, self.slo) | server_figures(metrics)
        answered = sum(r.output_tokens or 0 for r in good)
        if measured.gpu.get("gpu_energy_j") and answered:
            figures["tokens_per_joule"] = answered / measured.gpu["gpu_energy_j"]
        health = {name: max(worker[name] for worker in ledger.health) for name in ledger.health[0]}
        calls = {
            path: float(count - measured.before.calls.get(path, 0) * ("captured:" not in path))
            for path, count in measured.after.calls.items()
        }
        return Unit(
            arm=self.arm.name,
            cell=self.cell.digest(),
            label=self.cell.label,
            block=measured.block,
            started=measured.before.at,
            figures=figures,
            errors=error_classes(records),
            client=health,
            gpu=measured.gpu,
            metrics=metrics,
            misa=calls,
            problems=tuple(self._problems(records, measured)),
            notes=(*measured.notes, *self._remarks(records, figures, measured)),
            timeline=_timeline(measured),
            server=facts(measured.after.info),
            records=tuple(r.model_copy(update={"detail": self.keys.erase(r.detail)}) for r in records),
        )

    def _problems(self, records: list[Record], measured: Measured) -> Iterator[str]:
        for number, health in enumerate(measured.ledger.health, 1):
            of = len(measured.ledger.health)
            who = f"worker {number} of {of}" if of > 1 else "the client"
            for name in ("loop_lag_p99", "dispatch_delay_p99"):
                if health[name] > self.bounds.max_lag_s:
                    yield (
                        f"{who} was saturated: {name} was {1e3 * health[name]:.0f} ms, at most "
                        f"{1e3 * self.bounds.max_lag_s:.0f} ms may be (--max-lag-s)"
                    )
            if health["client_cpu_share"] > self.bounds.max_cpu_share:
                yield f"{who} was saturated: it used {health['client_cpu_share']:.0%} of one CPU (--max-cpu-share)"
        if out := next((r.detail for r in records if r.error == "client_limit"), None):
            yield f"the client had no room for another connection ({out}); raise `ulimit -n`, or use --workers"
        if not records:
            yield "no request was due in this block; raise --duration-s or the rate"
        elif not any(r.good for r in records):
            first = next((r for r in records if r.error), None)
            why = f" ({first.error}: {self.keys.erase(first.detail)})" if first else ""
            yield f"{NO_SUCCESS}{why}"
        expect = self.arm.expect
        if expect and expect not in selection.STOCK:
            routed = self._routed(expect, measured)
            if not any(routed.values()):
                yield (
                    f"{expect} did not run: the server counted no routed indexer call in this block "
                    "(prompts below its min_len get stock selection)"
                )

    def _routed(self, expect: str, measured: Measured) -> dict[str, int]:
        after = measured.after
        return selection.routed(expect, after.info, measured.before.calls, after.calls)

    def _remarks(self, records: list[Record], figures: dict[str, float], measured: Measured) -> Iterator[str]:
        expect = self.arm.expect
        if expect and expect not in selection.STOCK:
            routed = self._routed(expect, measured)
            for phase in (p for p, calls in routed.items() if not calls and any(routed.values())):
                yield f"{expect} did not run in {phase}: every call there took stock selection"
        if figures.get("cached_error_max", 0) > self.page + LEAD:
            yield (
                f"prefix hits differ from the plan: {figures['cached_share']:.1%} of the prompt tokens were cached, "
                f"{figures['cached_wanted_share']:.1%} were meant to be"
            )
        if any(r.cached_wanted for r in records) and "cached_share" not in figures:
            yield "prefix hits are not verified: the server reports no cached_tokens (SGLang: --enable-cache-report)"
        if figures.get("prompt_error_max", 0) > 0:
            yield f"the server counted up to {figures['prompt_error_max']:.0f} prompt tokens more or fewer than asked"
        if self.cell.workload.ignore_eos and figures.get("short_outputs"):
            yield f"{figures['short_outputs']:.0f} answers were shorter than asked"
        if figures.get("long_outputs"):
            yield f"{figures['long_outputs']:.0f} answers were longer than asked, by the server's count"
        if "output_throughput" not in figures:
            yield (
                "the server reports no usage: tokens cannot be counted, so there are no TPOT, ITL and token rates, and "
                "limits on them count as missed"
            )
        elif figures.get("inexact_itl"):
            yield "the stream does not count tokens: ITL spreads the final total evenly over the reads"
        if at_once := sum(r.at_once for r in records):
            yield (
                f"{at_once} answers of several tokens came in one read: they have no TPOT and ITL, and their TTFT is "
                "the whole answer's time (does a proxy on the way hold tokens back?)"
            )
        still = max(health["loop_lag_max"] for health in measured.ledger.health)
        if still > STILL * self.bounds.max_lag_s:
            yield f"the client stood still for up to {still:.1f} s: what came in that time looks late by as much"
        load = self.cell.load
        steady = measured.ledger.steady
        early = sum(r.dispatched < steady for r in records)
        if early > len(records) / 2:
            yield (
                f"{early} of {len(records)} requests were sent before all {load.concurrency} clients had started, "
                f"after {steady:.1f} s: latencies are mostly of a lower load, rates of what came later; "
                "lower --ramp-s, or raise --requests or --duration-s"
            )
        if load.arrival == "closed" and load.concurrency > 1 and len(records) < FEW_WAVES * load.concurrency:
            yield (
                f"{len(records)} requests for {load.concurrency} clients: under {FEW_WAVES} for each, the start and "
                "the end of the load weigh too much; raise --requests"
            )


def _timeline(measured: Measured) -> dict[str, tuple[tuple[float, float], ...]]:
    """Requests in flight and tokens a second by the client, beside what the server and the GPUs said."""
    ledger, series = measured.ledger, dict(measured.series)
    end = max((at for at, _ in [*ledger.tokens, *ledger.steps]), default=0.0)
    width = max(1.0, end / MAX_POINTS)
    bins = [0.0] * (int(end / width) + 1)
    for at, count in ledger.tokens:
        bins[int(at / width)] += count / width
    series["tokens_s"] = [((i + 0.5) * width, rate) for i, rate in enumerate(bins)]
    steps = sorted(ledger.steps)
    in_flight = [(at, float(n)) for (at, _), n in zip(steps, accumulate(change for _, change in steps), strict=True)]
    every = len(steps) // MAX_POINTS + 1
    series["in_flight"] = [*in_flight[:-1:every], *in_flight[-1:]]
    return {name: tuple((round(t, 3), round(v, 3)) for t, v in points) for name, points in series.items()}


def _changes(before: Metrics, after: Metrics) -> Metrics:
    """Counters that grew."""
    return {name: after[name] - before.get(name, 0.0) for name in after if after[name] - before.get(name, 0.0) > 0}
