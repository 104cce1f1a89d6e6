"""From records to figures: percentiles, goodput, throughput, prefix hits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from sglang_misa.bench.load.plan import Slo
from sglang_misa.bench.load.records import LATENCIES, PERCENTILES, Record, Unit, split_metric
from sglang_misa.bench.load.stats import percentile

SERVICE = ("goodput", "slo_kept", "slo_share")  # figures of the service limits


def latencies(records: Sequence[Record], latency: str) -> tuple[list[float], list[int]]:
    """Values of `latency` over good records, in seconds, and how many tokens each stands for."""
    good = [r for r in records if r.good]
    if latency == "itl":
        return [gap for r in good for gap in r.gaps], [count for r in good for count in r.gap_tokens]
    values = [value for r in good if (value := getattr(r, latency)) is not None]
    return values, [1] * len(values)


def figure(records: Sequence[Record], metric: str) -> float | None:
    """`ttft_p50`, `itl_mean` … over good records, in seconds; None where nothing was measured."""
    latency, statistic = split_metric(metric)
    values, weights = latencies(records, latency)
    if not values:
        return None
    if statistic == "mean":
        return float(np.average(values, weights=weights))
    return percentile(values, float(statistic[1:]), weights)


def summarize(
    records: Sequence[Record], window: tuple[float, float], streamed: int | None, slo: Slo | None
) -> dict[str, float]:
    """Figures of one block by name: `ttft_p50` in seconds, `output_throughput` in tokens a second, `error_rate` …

    Errors are out of the latencies and in every denominator. Rates are of what ended inside `window` (seconds after the
    start of the block); `streamed` counts the tokens that came in it, None where the server does not count tokens.
    """
    good = [r for r in records if r.good]
    start, end = window
    seconds = max(end - start, 1e-9)
    inside = [r for r in good if r.done is not None and start <= r.done <= end]
    figures: dict[str, float] = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "error_rate": 1 - len(good) / len(records) if records else 0.0,
        "window_s": seconds,
        "input_throughput": sum(r.prompt_tokens or r.prompt_wanted for r in inside) / seconds,
        "request_throughput": len(inside) / seconds,
    }
    if streamed is not None:
        figures["output_throughput"] = streamed / seconds
    for latency in LATENCIES:
        figures |= _spread(records, latency)
    if len({r.turn for r in records}) > 1:
        figures |= {f"first_turn_{k}": v for k, v in _spread([r for r in good if not r.turn], "ttft").items()}
        figures |= {f"later_turns_{k}": v for k, v in _spread([r for r in good if r.turn], "ttft").items()}
    figures |= _service(records, window, slo)
    for name in ("queue_s", "prefill_s"):
        split = [getattr(r, name) for r in good if getattr(r, name) is not None]
        if split:
            figures |= {f"{name}_mean": float(np.mean(split)), f"{name}_p50": percentile(split, 50)}
    rest = [r.ttft - r.queue_s - r.prefill_s for r in good if r.queue_s is not None and r.prefill_s is not None]
    if rest:
        figures["ttft_rest_s_mean"] = float(np.mean(rest))
    asked = [r for r in good if r.needle_right is not None]
    if asked:
        figures |= {"needles": len(asked), "needle_wrong": sum(not r.needle_right for r in asked) / len(asked)}
    figures |= _cache(good)
    figures["inexact_itl"] = sum(not r.exact for r in good) / len(good) if good else 0.0
    told = [(r.output_tokens, r.output_wanted) for r in good if r.output_tokens is not None]
    figures["short_outputs"] = sum(came < wanted for came, wanted in told)
    figures["long_outputs"] = sum(came > wanted for came, wanted in told)
    if told:
        figures["output_tokens_mean"] = float(np.mean([came for came, _ in told]))
    return figures


def under(unit: Unit, slo: Slo | None) -> Unit:
    """`unit`, which may have been measured under other service limits, judged by these."""
    end = max((r.done or r.dispatched for r in unit.records), default=0.0)
    service = _service(unit.records, (end - unit.figures["window_s"], end), slo)
    others = {name: value for name, value in unit.figures.items() if name not in SERVICE}
    return unit.model_copy(update={"figures": others | service})


def _service(records: Sequence[Record], window: tuple[float, float], slo: Slo | None) -> dict[str, float]:
    """How many requests kept the limits, of all and of those that ended inside `window`."""
    if slo is None:
        return {}
    kept = [r for r in records if r.keeps(slo)]
    inside = sum(r.done is not None and window[0] <= r.done <= window[1] for r in kept)
    share = len(kept) / len(records) if records else 0.0
    figures = (inside / max(window[1] - window[0], 1e-9), float(len(kept)), share)
    return dict(zip(SERVICE, figures, strict=True))


def _spread(records: Sequence[Record], latency: str) -> dict[str, float]:
    values, _ = latencies(records, latency)
    if not values:
        return {}
    names = [f"{latency}_{s}" for s in ("mean", *(f"p{q}" for q in PERCENTILES))]
    found = {name: value for name in names if (value := figure(records, name)) is not None}
    return {**found, f"{latency}_max": max(values)}


def _cache(good: Sequence[Record]) -> dict[str, float]:
    """Lengths and prefix hits as the server counted them, against what was asked for."""
    figures: dict[str, float] = {}
    known = [r for r in good if r.prompt_tokens is not None]
    if known:
        figures["prompt_tokens_mean"] = float(np.mean([r.prompt_tokens for r in known]))
        figures["prompt_error_max"] = max(abs((r.prompt_tokens or 0) - r.prompt_wanted) for r in known)
    cached = [r for r in known if r.cached_tokens is not None]
    if cached:
        prompt = sum(r.prompt_tokens or 0 for r in cached)
        figures["cached_share"] = sum(r.cached_tokens or 0 for r in cached) / max(1, prompt)
        figures["cached_wanted_share"] = sum(r.cached_wanted for r in cached) / max(1, prompt)
        figures["cached_error_max"] = max(abs((r.cached_tokens or 0) - r.cached_wanted) for r in cached)
    return figures


def server_figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """The queue's and the prefill's part of the latency, hit rate and retractions, by the growth of counters."""

    def total(name: str, **labels: str) -> float:
        wanted = [f'{k}="{v}"' for k, v in labels.items()]
        return sum(v for k, v in metrics.items() if k.split("{")[0] == name and all(w in k for w in wanted))

    figures = {}
    if queued := total("sglang:queue_time_seconds_count"):
        figures["server_queue_s_mean"] = total("sglang:queue_time_seconds_sum") / queued
    stage = "sglang:per_stage_req_latency_seconds"
    if count := total(f"{stage}_count", stage="prefill_forward"):
        figures["server_prefill_s_mean"] = total(f"{stage}_sum", stage="prefill_forward") / count
    if prompt := total("sglang:prompt_tokens_total"):
        figures["server_cached_share"] = total("sglang:cached_tokens_total") / prompt
    if retracted := total("sglang:num_retracted_requests_total"):
        figures["server_retractions"] = retracted
    return figures


def error_classes(records: Sequence[Record]) -> dict[str, int]:
    """How many requests failed in each way."""
    return dict(Counter(r.error for r in records if r.error is not None).most_common())
