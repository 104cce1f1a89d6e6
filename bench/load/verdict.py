"""Verdict over the measured units: figures by arm and cell, ratios by block, one sentence, and the gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sglang_misa.bench.load import gates
from sglang_misa.bench.load.figures import figure, latencies, server_figures, summarize
from sglang_misa.bench.load.gates import GateResult
from sglang_misa.bench.load.plan import Plan, Slo
from sglang_misa.bench.load.records import (
    ENOUGH_FOR_P99,
    RATES,
    Ratio,
    Record,
    Unit,
    split_metric,
    title,
)
from sglang_misa.bench.load.search import Capacity, CapacityRatio
from sglang_misa.bench.load.stats import Estimate, block_ratio, geometric_mean, holm, percentile_interval

COMPARED = ("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "itl_p50", "itl_p99", "e2e_p50", "e2e_p99")
MIN_BLOCKS = 5  # under which no verdict is given: a t-interval of fewer is too wide to say anything, or too lucky
SEQUENTIAL_BLOCKS = 8  # before a narrow interval may stop a run: with five, narrowness is often luck (8 % false alarms)
ERRORS_ALIKE = 0.01  # difference of two arms' error rates up to which their survivors are comparable
WORK_ALIKE = 0.01  # relative difference of tokens up to which two arms did the same work
Tone = Literal["good", "bad", "neutral"]


class ArmCell(BaseModel):
    """All blocks of one arm in one cell, taken together."""

    model_config = ConfigDict(frozen=True)

    arm: str
    cell: str
    label: str
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of the figures that can tell one
    errors: dict[str, int]
    reasons: dict[str, str]  # class of error → what the first request of that class was told
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class CellRatios(BaseModel):
    """B over A in one cell."""

    model_config = ConfigDict(frozen=True)

    label: str
    ratios: tuple[Ratio, ...]

    def of(self, metric: str) -> Ratio | None:
        return next((r for r in self.ratios if r.metric == metric), None)


class Outcome(BaseModel):
    """Everything that a report says."""

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...]
    arms: tuple[ArmCell, ...]
    ratios: tuple[CellRatios, ...]
    mean: Ratio | None  # of the primary figure over all cells
    verdict: str
    tone: Tone
    valid: bool
    gates: tuple[GateResult, ...]
    capacities: tuple[Capacity, ...] = ()  # of a search
    capacity_ratios: tuple[CapacityRatio, ...] = ()


def judge(plan: Plan, units: Sequence[Unit]) -> Outcome:
    """Pool the units of `plan`, compare its two arms where there are two, and apply its gates."""
    names = tuple(arm.name for arm in plan.arms)
    cells = {c.digest(): c for c in plan.cells}
    sides = {
        (name, digest): sorted((u for u in units if u.arm == name and u.cell == digest), key=lambda u: u.block)
        for digest in cells
        for name in names
    }
    arms = tuple(pool(side, plan) for side in sides.values())
    chosen = gates.gates_of(plan.fail_if)
    ratios: tuple[CellRatios, ...] = ()
    mean = None
    if len(names) == 2:
        ratios = tuple(
            CellRatios(label=cell.label, ratios=_compare(sides[names[0], digest], sides[names[1], digest], plan))
            for digest, cell in cells.items()
        )
        mean = _mean([(sides[names[0], digest], sides[names[1], digest]) for digest in cells], plan)
    problems = sorted({f"{a.arm} at {a.label}: {p}" for a in arms for p in a.problems})
    verdict, tone = _verdict(plan, arms, ratios, mean, problems)
    results = tuple(
        gate.apply(
            cell.label,
            next(a for a in reversed(arms) if a.cell == digest).figures,
            next((r for c in ratios if c.label == cell.label and (r := c.of(gate.metric))), None),
        )
        for gate in chosen
        for digest, cell in cells.items()
    )
    return Outcome(
        names=names,
        arms=arms,
        ratios=ratios,
        mean=mean,
        verdict=verdict,
        tone=tone,
        valid=not problems,
        gates=results,
    )


def pool(units: Sequence[Unit], plan: Plan) -> ArmCell:
    answered = sum(r.good for u in units for r in u.records)
    figures = pooled(units, plan.slo)
    out = figures.get("output_throughput", 0.0)
    costs = {"output_tokens": out, "tokens": out and out + figures["input_throughput"]}
    figures |= {f"cost_million_{n}": c for n, rate in costs.items() if (c := plan.price.of_a_million(rate)) is not None}
    if answered < ENOUGH_FOR_P99:
        kept = {*units[0].client, plan.primary, *gates.compared(gates.gates_of(plan.fail_if))}
        figures = {name: value for name, value in figures.items() if not name.endswith("_p99") or name in kept}
    intervals = {
        name: found
        for name in (*COMPARED, *RATES, plan.primary)
        if name in figures and (found := interval(units, name, plan.confidence)) is not None
    }
    errors: dict[str, int] = {}
    for unit in units:
        for kind, count in unit.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return ArmCell(
        arm=units[0].arm,
        cell=units[0].cell,
        label=units[0].label,
        figures=figures,
        intervals=intervals,
        errors=errors,
        reasons={kind: why for u in reversed(units) for kind, why in u.reasons.items()},
        problems=tuple(dict.fromkeys(p for u in units for p in u.problems)),
        notes=tuple(dict.fromkeys(n for u in units for n in u.notes)),
    )


def pooled(units: Sequence[Unit], slo: Slo | None) -> dict[str, float]:
    """Figures of several blocks of one arm as of one: latencies over all requests, rates over all seconds."""
    figures = summarize([r for u in units for r in u.records], (0.0, math.inf), None, slo)
    seconds = sum(u.figures["window_s"] for u in units)
    figures["window_s"] = seconds
    for rate in RATES:
        figures.pop(rate, None)
        if all(rate in u.figures for u in units):
            figures[rate] = sum(u.figures[rate] * u.figures["window_s"] for u in units) / seconds
    grown = {n: sum(u.metrics.get(n, 0.0) for u in units) for n in {n for u in units for n in u.metrics}}
    figures |= server_figures(grown)
    joules = sum(u.gpu.get("gpu_energy_j", math.nan) for u in units)
    if joules > 0:
        figures["tokens_per_joule"] = sum(r.output_tokens or 0 for u in units for r in u.records if r.good) / joules
    for name in sorted({n for u in units for n in (*u.figures, *u.client, *u.gpu)} - set(figures) - set(RATES)):
        seen = [v for u in units for v in [{**u.figures, **u.client, **u.gpu}.get(name)] if v is not None]
        figures[name] = max(seen) if name.endswith(("_max", "_p99", "_share")) else sum(seen) / len(seen)
    return figures


def interval(units: Sequence[Unit], metric: str, confidence: float) -> tuple[float, float] | None:
    """Of one arm's figure over its blocks; None where they, or the requests of a tail, are too few to tell."""
    latency, _, statistic = metric.partition("_")
    if metric not in RATES and statistic not in ("mean", "p50"):
        return percentile_interval([latencies(u.records, latency) for u in units], float(statistic[1:]), confidence)
    seen = [u.figures.get(metric, 0.0) for u in units]
    if min(seen) <= 0:
        return None
    _, low, high, _ = geometric_mean(seen, confidence)
    return None if low is None or high is None else (low, high)


def compare(a: Sequence[Unit], b: Sequence[Unit], metrics: Sequence[str], confidence: float) -> tuple[Ratio, ...]:
    """Ratios B/A. Latencies are compared over requests that both arms answered: the same prompts in each block."""
    pairs = [_paired(x, y) for x, y in zip(a, b, strict=True)]
    answered = [[r for pair in pairs for r in pair[side]] for side in (0, 1)]
    rates = [pooled(side, None) for side in (a, b)]
    found = []
    for metric in metrics:
        if blocks := _blocks(a, b, metric):
            left, right = (
                rates[i][metric] if metric in RATES else figure(answered[i], metric) or math.nan for i in (0, 1)
            )
            of_a, of_b, orders = ([row[i] for row in blocks] for i in range(3))
            estimate = block_ratio(of_a, of_b, [bool(order) for order in orders], confidence)
            found.append(_ratio(metric, left, right, estimate, len(answered[0]), len(blocks)))
    return tuple(found)


def _compare(a: Sequence[Unit], b: Sequence[Unit], plan: Plan) -> tuple[Ratio, ...]:
    """The figures that a report shows, and those that the user asks for; no p99 of few requests unless it is asked."""
    asked = [plan.primary, *gates.compared(gates.gates_of(plan.fail_if))]
    enough = min(sum(r.good for u in side for r in u.records) for side in (a, b)) >= ENOUGH_FOR_P99
    shown = [metric for metric in COMPARED if enough or not metric.endswith("_p99")]
    return compare(a, b, list(dict.fromkeys([*shown, *RATES, *asked])), plan.confidence)


def half_width(plan: Plan, units: Sequence[Unit]) -> float | None:
    """Relative half-width of the primary figure's interval in one cell: of the ratio, or of the one arm's figure."""
    sides = [sorted((u for u in units if u.arm == arm.name), key=lambda u: u.block) for arm in plan.arms]
    if len(sides) == 2:
        ratio = next(iter(compare(sides[0], sides[1], [plan.primary], plan.confidence)), None)
        low, high = (None, None) if ratio is None else (ratio.low, ratio.high)
    else:
        low, high = interval(sides[0], plan.primary, plan.confidence) or (None, None)
    return math.log(high / low) / 2 if low and high else None


def _ratio(metric: str, a: float, b: float, estimate: Estimate, pairs: int, blocks: int) -> Ratio:
    value, low, high, p = estimate
    return Ratio(metric=metric, a=a, b=b, value=value, low=low, high=high, p=p, pairs=pairs, blocks=blocks)


def _paired(a: Unit, b: Unit) -> tuple[list[Record], list[Record]]:
    """Records of the requests that both answered, in the same order."""
    others = {(r.pair, r.turn): r for r in b.records if r.good}
    both = [(r, others[r.pair, r.turn]) for r in a.records if r.good and (r.pair, r.turn) in others]
    return [x for x, _ in both], [y for _, y in both]


def _blocks(a: Sequence[Unit], b: Sequence[Unit], metric: str) -> list[tuple[float, float, bool]]:
    """One positive figure of each arm in each block, and whether B came first; empty unless every block has both."""
    found = []
    for x, y in zip(a, b, strict=True):
        if metric in RATES:
            left, right = x.figures.get(metric), y.figures.get(metric)
        else:
            first, second = _paired(x, y)
            left, right = figure(first, metric), figure(second, metric)
        if not left or not right:
            return []
        found.append((left, right, y.started < x.started))
    return found


def _mean(cells: Sequence[tuple[Sequence[Unit], Sequence[Unit]]], plan: Plan) -> Ratio | None:
    """The primary figure's ratio over all cells: blocks are averaged over the cells, then they give the interval."""
    tables = [_blocks(a, b, plan.primary) for a, b in cells]
    if not all(tables):
        return None
    blocks = list(zip(*tables, strict=False))  # of each block that all cells have, its row in every cell
    left, right = ([math.exp(sum(math.log(row[k]) for row in rows) / len(rows)) for rows in blocks] for k in (0, 1))
    orders = [[row[2] for row in rows] for rows in blocks]
    alike = all(len(set(order)) == 1 for order in orders)
    estimate = block_ratio(left, right, [alike and order[0] for order in orders], plan.confidence)
    pairs = sum(len(_paired(x, y)[0]) for a, b in cells for x, y in zip(a, b, strict=True))
    whole = [math.exp(sum(map(math.log, side)) / len(side)) for side in (left, right)]
    return _ratio(plan.primary, whole[0], whole[1], estimate, pairs, len(left))


def _faster(ratio: Ratio) -> float:
    """How many times as fast B is: the ratio's inverse for latencies, itself for rates."""
    return ratio.value if ratio.metric in RATES else 1 / ratio.value


def _speed(ratio: Ratio, names: Sequence[str]) -> str:
    """Who is the faster one, in words."""
    if ratio.better:
        return f"{names[1]} is {_faster(ratio):.2f}× as fast as {names[0]}"
    return f"{names[1]} is slower than {names[0]}, {_faster(ratio):.2f}× as fast,"


def _told(ratio: Ratio, names: Sequence[str], level: str) -> str:
    interval = f", {level} CI {ratio.low:.3f}–{ratio.high:.3f}" if ratio.low is not None else ""
    return f"ratio {names[1]}/{names[0]} {ratio.value:.3f}{interval}, {ratio.pairs} pairs in {ratio.blocks} blocks"


def _verdict(
    plan: Plan,
    arms: Sequence[ArmCell],
    ratios: Sequence[CellRatios],
    mean: Ratio | None,
    problems: Sequence[str],
) -> tuple[str, Tone]:
    """One sentence. No speed is claimed over an invalid run, over few blocks, or where the arms fail differently."""
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"No verdict: {problems[0]}{more}.", "bad"
    if not ratios:
        return _single(plan, arms)
    names = [arm.name for arm in plan.arms]
    if (unlike := _unlike(plan, names, arms)) is not None:
        return f"No verdict: {unlike}.", "bad"
    found = [(cell, r) for cell in ratios if (r := cell.of(plan.primary)) is not None]
    metric, level = title(plan.primary), f"{plan.confidence:.0%}"
    if not found:
        return f"No verdict: no block gives {metric} in both arms.", "bad"
    blocks = min(r.blocks for _, r in found)
    if blocks < MIN_BLOCKS:
        seen = ", ".join(f"{r.value:.3f} at {cell.label}" for cell, r in found)
        told = (
            f"{blocks} block(s) cannot tell a difference from chance (ratios {names[1]}/{names[0]} of {metric}: {seen})"
        )
        return f"No verdict: {told}; use --blocks {MIN_BLOCKS + 1}.", "neutral"
    tail = _tails(plan, found)
    if len(found) == 1:
        cell, r = found[0]
        told = f"in {metric} at {cell.label} ({_told(r, names, level)})"
        if not r.certain:
            return f"No difference shown between {names[0]} and {names[1]} {told}{tail[0]}.", "neutral"
        tone: Tone = ("neutral" if tail[1] else "good") if r.better else "bad"
        return f"{_speed(r, names)} {told}{tail[0]}.", tone
    adjusted = holm([1.0 if r.p is None else r.p for _, r in found])
    sure = [(cell, r) for (cell, r), p in zip(found, adjusted, strict=True) if p < 1 - plan.confidence]
    faster, slower = [f for f in sure if f[1].better], [f for f in sure if not f[1].better]
    best, worst = max(found, key=lambda f: _faster(f[1])), min(found, key=lambda f: _faster(f[1]))
    span = f"from {_faster(worst[1]):.2f}× at {worst[0].label} to {_faster(best[1]):.2f}× at {best[0].label}"
    cells = f"faster in {len(faster)} and slower in {len(slower)} of {len(found)} cells (Holm, {level}), {span}"
    if mean is None or not mean.certain:
        lead = f"No difference shown between {names[0]} and {names[1]} in the mean of {metric} over the cells"
        tone = "bad" if slower else "neutral"
    else:
        lead = f"{_speed(mean, names)} in the geometric mean of {metric}"
        tone = "bad" if slower or not mean.better else "neutral" if tail[1] else "good"
    given = f" ({_told(mean, names, level)})" if mean is not None else ""
    return f"{lead}{given}; {cells}{tail[0]}.", tone


def _single(plan: Plan, arms: Sequence[ArmCell]) -> tuple[str, Tone]:
    """What one arm did, in its worst and best cell."""
    failed = sum(a.figures["errors"] for a in arms)
    asked = sum(a.figures["requests"] for a in arms)
    level = f"{plan.confidence:.0%}"
    seen = [(a, a.figures[plan.primary]) for a in arms if plan.primary in a.figures]
    told = f"{plan.arms[0].name} answered {asked - failed:.0f} of {asked:.0f} requests"
    for a, value in seen[:1] + seen[1:][-1:]:
        interval = a.intervals.get(plan.primary)
        scale, unit = (1.0, "/s") if plan.primary in RATES else (1e3, " ms")
        around = f" ({level} CI {scale * interval[0]:.1f}–{scale * interval[1]:.1f})" if interval else ""
        rate = a.figures.get("output_throughput")
        more = f", {rate:.1f} tokens/s" if rate is not None else ""
        told += f"; {title(plan.primary)} {scale * value:.1f}{unit}{around}{more} at {a.label}"
    return f"{told}.", "bad" if failed else "neutral"


def _unlike(plan: Plan, names: Sequence[str], arms: Sequence[ArmCell]) -> str | None:
    """Why the requests that survived in the two arms must not be compared."""
    work = ["prompt_tokens_mean"]
    if plan.primary in RATES or plan.primary.startswith("e2e"):  # the other figures are of a token
        work.append("output_tokens_mean")
    for first, second in zip(arms[::2], arms[1::2], strict=True):
        for figure_name in work:
            left, right = (a.figures.get(figure_name, 0.0) for a in (first, second))
            if min(left, right) < (1 - WORK_ALIKE) * max(left, right):
                what = "read prompts" if figure_name.startswith("prompt") else "gave answers"
                return f"at {first.label} {names[0]} {what} of {left:.1f} tokens in the mean, {names[1]} of {right:.1f}"
        left, right = (_lucky(a) for a in (first, second))
        if max(left, right) > WORK_ALIKE and abs(left - right) > WORK_ALIKE:
            more, who = max((left, names[0]), (right, names[1]))
            return f"at {first.label} {who} found {more:.1%} more of its prompt tokens in the cache than was planned"
        left, right = (a.figures.get("error_rate", 0.0) for a in (first, second))
        if abs(left - right) > ERRORS_ALIKE:
            return f"at {first.label} {names[0]} failed {left:.1%} of its requests, {names[1]} {right:.1%}"
        left, right = (a.figures.get("needle_wrong", 0.0) for a in (first, second))
        if right > left:
            return f"at {first.label} {names[1]} answered wrongly {right:.1%} of its requests, {names[0]} {left:.1%}"
    return None


def _lucky(arm: ArmCell) -> float:
    """Share of the prompt tokens that a cache held though it was to be empty of them."""
    return arm.figures.get("cached_share", 0.0) - arm.figures.get("cached_wanted_share", 0.0)


def _tails(plan: Plan, found: Sequence[tuple[CellRatios, Ratio]]) -> tuple[str, bool]:
    """The worst tail of the primary latency in words, and whether a tail is certainly worse in some cell."""
    if plan.primary in RATES:
        return "", False
    latency, _ = split_metric(plan.primary)
    tails = [(cell, t) for cell, r in found if (t := cell.of(tail_of(latency, r.pairs))) and t.metric != plan.primary]
    if not tails:
        return "", False
    cell, worst = max(tails, key=lambda pair: pair[1].value)
    adjusted = holm([1.0 if t.p is None else t.p for _, t in tails])
    bad = any(p < 1 - plan.confidence and not t.better for (_, t), p in zip(tails, adjusted, strict=True))
    span = f" ({worst.low:.3f}–{worst.high:.3f})" if worst.low is not None else ""
    where = f" at {cell.label}" if len(found) > 1 else ""
    return f"; its tail{', certainly worse' if bad else ''}: {title(worst.metric)} {worst.value:.3f}{span}{where}", bad


def tail_of(latency: str, requests: int) -> str:
    """The tail figure that so many requests can show."""
    return f"{latency}_{'p99' if requests >= ENOUGH_FOR_P99 else 'p90'}"
