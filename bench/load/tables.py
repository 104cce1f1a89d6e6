"""The report's tables and lists as HTML. Every text is escaped here, once."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from sglang_misa.bench.load.gates import Gate
from sglang_misa.bench.load.plan import Plan
from sglang_misa.bench.load.plots import context_of, level_of
from sglang_misa.bench.load.records import LATENCIES, RATES, Ratio, title
from sglang_misa.bench.load.stats import wilson
from sglang_misa.bench.load.verdict import ArmCell, Outcome, tail_of

SLO_KEPT = 0.99  # share of requests that must keep the SLO for a load of a sweep to count as carried
# figure → (its name in a report, factor, digits)
FIGURES = {
    "requests": ("requests", 1.0, 0),
    "error_rate": ("errors, %", 100.0, 1),
    **{f"{name}_{s}": (f"{title(f'{name}_{s}')}, ms", 1e3, 2) for name in LATENCIES for s in ("p50", "p90", "p99")},
    "first_turn_ttft_p50": ("TTFT p50 of first turns, ms", 1e3, 1),
    "later_turns_ttft_p50": ("TTFT p50 of later turns, ms", 1e3, 1),
    "output_throughput": ("output tokens/s", 1.0, 1),
    "request_throughput": ("requests/s", 1.0, 3),
    "goodput": ("goodput, requests/s", 1.0, 3),
    "slo_share": ("inside the SLO, %", 100.0, 1),
    "needle_wrong": ("needles wrong, %", 100.0, 1),
    "cached_share": ("prompt tokens cached, %", 100.0, 1),
    "cached_wanted_share": ("planned, %", 100.0, 1),
    "queue_s_mean": ("mean queue, ms", 1e3, 1),
    "prefill_s_mean": ("mean prefill, ms", 1e3, 1),
    "ttft_rest_s_mean": ("mean rest of TTFT, ms", 1e3, 1),
    "server_queue_s_mean": ("mean queue by the server's metrics, ms", 1e3, 1),
    "server_prefill_s_mean": ("mean prefill by the server's metrics, ms", 1e3, 1),
    "server_cached_share": ("cached by the server's metrics, %", 100.0, 1),
    "server_retractions": ("retractions", 1.0, 0),
    "gpu_memory_gib_max": ("GPU memory, GiB", 1.0, 1),
    "gpu_power_w_mean": ("GPU power, W", 1.0, 0),
    "tokens_per_joule": ("output tokens per joule", 1.0, 3),
    "cost_million_output_tokens": ("cost of a million output tokens", 1.0, 4),
    "cost_million_tokens": ("cost of a million tokens, prompts included", 1.0, 4),
    "loop_lag_p99": ("client: loop lag p99, ms", 1e3, 1),
    "dispatch_delay_p99": ("client: dispatch delay p99, ms", 1e3, 2),
    "client_cpu_share": ("client: CPU, %", 100.0, 0),
}


def table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]], level: int = 2) -> str:
    """A table; on a narrow screen each row becomes a card. A new value in the first column starts a group."""
    if not rows:
        return ""
    body, last = [], rows[0][0]
    for row in rows:
        cells = "".join(
            f'<td data-label="{html.escape(c)}">{html.escape(text)}</td>' for c, text in zip(columns, row, strict=True)
        )
        body.append(f"<tr{'' if row[0] == last else ' class=split'}>{cells}</tr>")
        last = row[0]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    title = f"<h{level}>{html.escape(heading)}</h{level}>" if heading else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def bullets(heading: str, lines: Iterable[str]) -> str:
    """A list; nothing where there are no lines."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>{html.escape(heading)}</h2><ul>{items}</ul>" if items else ""


def facts(heading: str, rows: Mapping[str, str]) -> str:
    """Names and values, which may be long."""
    body = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items())
    return f"<h3>{html.escape(heading)}</h3><dl>{body}</dl>" if body else ""


def main_table(plan: Plan, outcome: Outcome) -> str:
    """Context by load: both arms and their ratio side by side, or one arm with the interval of its figures."""
    rows = []
    for cell in sorted(plan.cells, key=lambda c: (context_of(c), level_of(c))):
        arms = [a for name in outcome.names for a in outcome.arms if a.cell == cell.digest() and a.arm == name]
        if not arms:
            continue
        answered = round(min(a.figures["requests"] - a.figures["errors"] for a in arms))
        latency = plan.primary.split("_")[0] if plan.primary not in RATES else "ttft"
        wanted = [plan.primary, tail_of(latency, answered), "tpot_p50", "output_throughput"]
        for metric in dict.fromkeys(wanted):
            if not any(metric in a.figures for a in arms):
                continue
            values = [amount(metric, a.figures.get(metric)) for a in arms]
            ratio = next((r for c in outcome.ratios if c.label == cell.label and (r := c.of(metric))), None)
            last = between(ratio) if outcome.ratios else _spread(metric, arms[0])
            rows.append([cell.workload.label, cell.level, title(metric), *values, last])
    level = f"{plan.confidence:.0%}"
    last = f"{outcome.names[-1]} / {outcome.names[0]} ({level} CI)" if outcome.ratios else f"{level} CI over blocks"
    if len(outcome.names) == 2 and not outcome.ratios:  # a search: the arms tried different loads
        return ""
    return table("By context and load", ["context", "load", "figure", *outcome.names, last], rows)


def cell_tables(outcome: Outcome) -> str:
    """All figures of each cell, folded away."""
    parts = []
    for label in dict.fromkeys(a.label for a in outcome.arms):
        arms = [a for a in outcome.arms if a.label == label]
        shown = {n: how for n, how in FIGURES.items() if any(n in a.figures for a in arms)}
        rows = [[how[0], *(_plain(a.figures.get(n), how[1], how[2]) for a in arms)] for n, how in shown.items()]
        ratios = next((c.ratios for c in outcome.ratios if c.label == label), ())
        extra = [
            [title(r.metric), amount(r.metric, r.a), amount(r.metric, r.b), between(r), f"{r.pairs} in {r.blocks}"]
            for r in ratios
        ]
        names = [a.arm for a in arms]
        inner = table("", ["figure", *names], rows) + table(
            "Ratios", ["figure", *names, f"{names[-1]} / {names[0]}", "pairs in blocks"], extra, 3
        )
        parts.append(f"<details><summary>All figures: {html.escape(label)}</summary>{inner}</details>")
    return "<h2>Figures</h2>" + "".join(parts)


def gates(outcome: Outcome) -> str:
    rows = [
        [
            "failed" if g.failed else "passed",
            f"fails if {g.gate}",
            g.label,
            "not measured"
            if g.value is None
            else f"{g.value:.4g}{'×' if outcome.ratios and Gate(g.gate).compared else ''}",
        ]
        for g in sorted(outcome.gates, key=lambda g: not g.failed)
    ]
    return table("Gates", ["result", "gate (times in seconds)", "cell", "value"], rows)


def errors(outcome: Outcome) -> str:
    rows = [
        [a.arm, a.label, kind, str(count), a.reasons.get(kind, "")]
        for a in outcome.arms
        for kind, count in a.errors.items()
    ]
    return table("Errors", ["arm", "cell", "class", "requests", "the first one was told"], rows)


def capacity(plan: Plan, outcome: Outcome) -> str:
    """For each arm and context the highest load inside the SLO, no lower one having failed."""
    target = plan.search.target if plan.search else SLO_KEPT
    columns = ["arm", "context", "carried", "first beyond", "requests inside the limits, by load"]
    rows = [
        [
            c.arm,
            c.context,
            f"{c.level:g}" if c.level else "none",
            "not reached" if c.beyond is None else f"{c.beyond:g}",
            " · ".join(f"{s.level:g}: {s.kept}/{s.asked}{'' if s.decided else ' (undecided)'}" for s in c.steps),
        ]
        for c in outcome.capacities
    ] or (_swept(plan, outcome) if plan.slo is not None else [])
    ratios = [[r.context, f"{r.value:.3f}", _interval(r.low, r.high), str(r.searches)] for r in outcome.capacity_ratios]
    return table(f"Highest load with {target:.0%} of the requests inside the SLO", columns, rows) + table(
        "Capacity ratio", ["context", f"{outcome.names[-1]} / {outcome.names[0]}", "interval", "searches"], ratios, 3
    )


def _swept(plan: Plan, outcome: Outcome) -> list[list[str]]:
    rows = []
    for name in outcome.names:
        for context in dict.fromkeys(c.workload.label for c in plan.cells):
            cells = sorted((c for c in plan.cells if c.workload.label == context), key=level_of)
            carried, beyond, told = "none", "not reached", []
            for cell in cells:
                arm = next(a for a in outcome.arms if (a.arm, a.cell) == (name, cell.digest()))
                share = arm.figures.get("slo_share", 0.0)
                low, high = wilson(
                    round(arm.figures.get("slo_kept", 0)), round(arm.figures["requests"]), plan.confidence
                )
                told.append(f"{level_of(cell):g}: {share:.0%} ({low:.0%}–{high:.0%})")
                if beyond != "not reached":
                    continue
                carried, beyond = (cell.level, beyond) if share >= SLO_KEPT else (carried, cell.level)
            rows.append([name, context, carried, beyond, " · ".join(told)])
    return rows


def amount(metric: str, value: float | None) -> str:
    """A latency in ms, a rate in a second."""
    if value is None:
        return "–"
    return f"{value:,.2f} /s" if metric in RATES else f"{1e3 * value:,.2f} ms"


def between(ratio: Ratio | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return "not defined"
    return f"{ratio.value:.3f}" + (f" ({ratio.low:.3f}–{ratio.high:.3f})" if ratio.low is not None else " (one block)")


def _spread(metric: str, arm: ArmCell) -> str:
    low, high = arm.intervals.get(metric, (None, None))
    return "–" if low is None or high is None else f"{amount(metric, low)} – {amount(metric, high)}"


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def _plain(value: float | None, factor: float, digits: int) -> str:
    return "–" if value is None else f"{factor * value:,.{digits}f}"
