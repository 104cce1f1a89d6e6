"""What the measured units say: figures by arm and cell, paired ratios, one sentence, and the gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sglang_misa.bench.load.measure import RATES, Gate, Ratio, paired_ratios, rate_ratio, summarize
from sglang_misa.bench.load.runner import Unit
from sglang_misa.bench.load.settings import Plan, Slo

COMPARED = ("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "itl_p50", "itl_p99", "e2e_p50", "e2e_p99")
Tone = Literal["good", "bad", "neutral"]
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


class ArmCell(BaseModel):
    """All blocks of one arm in one cell, taken together."""

    model_config = ConfigDict(frozen=True)

    arm: str
    cell: str
    label: str
    figures: dict[str, float]
    errors: dict[str, int]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class CellRatios(BaseModel):
    """B over A in one cell."""

    model_config = ConfigDict(frozen=True)

    label: str
    ratios: tuple[Ratio, ...]

    def of(self, metric: str) -> Ratio | None:
        return next((r for r in self.ratios if r.metric == metric), None)


class GateResult(BaseModel):
    """One gate in one cell. A figure that was not measured fails its gate."""

    model_config = ConfigDict(frozen=True)

    gate: str
    label: str
    value: float | None
    failed: bool


class Outcome(BaseModel):
    """Everything that a report says."""

    model_config = ConfigDict(frozen=True)

    names: tuple[str, ...]
    arms: tuple[ArmCell, ...]
    ratios: tuple[CellRatios, ...]
    verdict: str
    tone: Tone
    valid: bool
    gates: tuple[GateResult, ...]


def judge(plan: Plan, units: Sequence[Unit]) -> Outcome:
    """Pool the units of `plan`, compare its two arms where there are two, and apply its gates."""
    names = tuple(arm.name for arm in plan.arms)
    arms = tuple(
        _pool([u for u in units if u.arm == name and u.cell == cell.digest()], plan.slo)
        for cell in plan.cells
        for name in names
    )
    ratios = tuple(_compare(plan, units, cell.digest(), cell.label) for cell in plan.cells) if len(names) == 2 else ()
    problems = sorted({f"{a.arm} at {a.label}: {p}" for a in arms for p in a.problems})
    verdict, tone = _verdict(plan, arms, ratios, problems)
    gates = tuple(_gate(Gate(text), cell.label, arms, ratios) for text in plan.fail_if for cell in plan.cells)
    return Outcome(names=names, arms=arms, ratios=ratios, verdict=verdict, tone=tone, valid=not problems, gates=gates)


def _pool(units: Sequence[Unit], slo: Slo | None) -> ArmCell:
    records = [r for u in units for r in u.records]
    window = sum(u.figures["window_s"] for u in units)
    streamed = sum(u.figures["output_throughput"] * u.figures["window_s"] for u in units)
    figures = summarize(records, window, round(streamed), slo)
    for name in sorted({n for u in units for n in (*u.figures, *u.client, *u.gpu)} - set(figures)):
        seen = [v for u in units for v in [{**u.figures, **u.client, **u.gpu}.get(name)] if v is not None]
        figures[name] = max(seen) if name.endswith(("_max", "_p99", "_share")) else sum(seen) / len(seen)
    errors: dict[str, int] = {}
    for unit in units:
        for kind, count in unit.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return ArmCell(
        arm=units[0].arm,
        cell=units[0].cell,
        label=units[0].label,
        figures=figures,
        errors=errors,
        problems=tuple(dict.fromkeys(p for u in units for p in u.problems)),
        notes=tuple(dict.fromkeys(n for u in units for n in u.notes)),
    )


def _compare(plan: Plan, units: Sequence[Unit], cell: str, label: str) -> CellRatios:
    sides = [
        sorted((u for u in units if u.arm == arm.name and u.cell == cell), key=lambda u: u.block) for arm in plan.arms
    ]
    wanted = dict.fromkeys([*COMPARED, *([plan.primary] if plan.primary.split("_")[0] in TITLES else [])])
    a, b = ([u.records for u in side] for side in sides)
    ratios = paired_ratios(a, b, list(wanted), plan.confidence)
    for rate in RATES:
        left, right = ([u.figures[rate] for u in side if rate in u.figures] for side in sides)
        if left and len(left) == len(right):
            ratios.append(rate_ratio(rate, left, right, plan.confidence))
    return CellRatios(label=label, ratios=tuple(ratios))


def title(metric: str) -> str:
    """`ttft_p50` → TTFT p50."""
    head, _, tail = metric.partition("_")
    return f"{TITLES[head]} {tail}" if head in TITLES else metric.replace("_", " ")


def _faster(ratio: Ratio) -> float:
    """How many times as fast B is: the ratio's inverse for latencies, itself for rates."""
    return ratio.value if ratio.metric in RATES else 1 / ratio.value if ratio.value > 0 else math.nan


def _verdict(
    plan: Plan, arms: Sequence[ArmCell], ratios: Sequence[CellRatios], problems: Sequence[str]
) -> tuple[str, Tone]:
    """One sentence. No speed is claimed over an invalid run, over a single block, or where B fails more than A."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problems:
        return f"No verdict: {problems[0]}{more}.", "bad"
    if not ratios:
        failed = sum(a.figures["errors"] for a in arms)
        asked = sum(a.figures["requests"] for a in arms)
        told = (
            f"{plan.arms[0].name} answered {asked - failed:.0f} of {asked:.0f} requests in {len(plan.cells)} cell(s)."
        )
        return told, "bad" if failed else "neutral"
    name_a, name_b = (arm.name for arm in plan.arms)
    for first, second in zip(arms[::2], arms[1::2], strict=True):
        for figure, what in (("error_rate", "failed"), ("needle_wrong", "answered wrongly")):
            left, right = first.figures.get(figure, 0.0), second.figures.get(figure, 0.0)
            if right > left:
                told = f"at {first.label} {name_b} {what} {right:.1%} of its requests, {name_a} {left:.1%}"
                return f"No verdict: {told}.", "bad"
    found = [(cell.label, r) for cell in ratios if (r := cell.of(plan.primary)) is not None]
    metric, level = title(plan.primary), f"{plan.confidence:.0%}"
    if not found:
        return f"No verdict: no pair of requests gives {metric} in both arms.", "bad"
    if plan.blocks < 2:
        seen = ", ".join(f"{r.value:.3f} at {label}" for label, r in found)
        told = f"one block cannot tell a difference from drift (ratios {name_b}/{name_a} of {metric}: {seen})"
        return f"No verdict: {told}; use --blocks 5.", "neutral"
    faster = [(label, r) for label, r in found if r.certain and _faster(r) > 1]
    slower = [(label, r) for label, r in found if r.certain and _faster(r) < 1]
    tone: Tone = "bad" if slower else "good" if faster else "neutral"
    if len(found) == 1:
        label, r = found[0]
        interval = (
            f"ratio {name_b}/{name_a} {r.value:.3f}, {level} CI {r.low:.3f}–{r.high:.3f}, "
            f"{r.pairs} pairs in {r.blocks} blocks"
        )
        if not r.certain:
            return f"No difference shown between {name_a} and {name_b} in {metric} at {label} ({interval}).", tone
        return f"{name_b} is {_faster(r):.2f}× as fast as {name_a} in {metric} at {label} ({interval}).", tone
    mean = math.exp(sum(math.log(_faster(r)) for _, r in found) / len(found))
    best, worst = max(found, key=lambda f: _faster(f[1])), min(found, key=lambda f: _faster(f[1]))
    told = (
        f"{name_b} is faster than {name_a} in {metric} in {len(faster)} of {len(found)} cells and slower in "
        f"{len(slower)} ({level} CIs): {mean:.2f}× as fast in the geometric mean, from {_faster(worst[1]):.2f}× at "
        f"{worst[0]} to {_faster(best[1]):.2f}× at {best[0]}."
    )
    return told, tone


def _gate(gate: Gate, label: str, arms: Sequence[ArmCell], ratios: Sequence[CellRatios]) -> GateResult:
    ratio = next((r for cell in ratios if cell.label == label and (r := cell.of(gate.metric)) is not None), None)
    if ratio is not None:
        value: float | None = float(getattr(ratio, gate.bound or "value"))
    else:  # a figure without a ratio, such as error_rate: the last arm's own
        value = [a for a in arms if a.label == label][-1].figures.get(gate.metric)
    failed = value is None or math.isnan(value) or gate.fails(value)
    return GateResult(gate=gate.text, label=label, value=value, failed=failed)
