"""The artefacts that people read: one self-contained HTML file, PNG plots, a JSON of every figure, two CSV files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from string import Template

from sglang_misa import __version__
from sglang_misa.bench.load import plots
from sglang_misa.bench.load.plan import Plan
from sglang_misa.bench.load.records import Ratio, Unit, title
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.stats import wilson
from sglang_misa.bench.load.store import Store, requests_csv, units_csv
from sglang_misa.bench.load.verdict import Outcome

MS, PERCENT, PLAIN = (1e3, 1), (100.0, 1), (1.0, 1)
# column → (figure, factor and digits)
COLUMNS = {
    "requests": ("requests", (1.0, 0)),
    "errors %": ("error_rate", PERCENT),
    "TTFT p50 ms": ("ttft_p50", MS),
    "TTFT p99 ms": ("ttft_p99", MS),
    "TPOT p50 ms": ("tpot_p50", (1e3, 2)),
    "ITL p99 ms": ("itl_p99", (1e3, 2)),
    "E2E p50 s": ("e2e_p50", (1.0, 2)),
    "out tok/s": ("output_throughput", PLAIN),
    "req/s": ("request_throughput", (1.0, 3)),
    "goodput req/s": ("goodput", (1.0, 3)),
    "SLO kept %": ("slo_share", PERCENT),
    "needles wrong %": ("needle_wrong", PERCENT),
    "cached %": ("cached_share", PERCENT),
    "cached, planned %": ("cached_wanted_share", PERCENT),
    "queue ms": ("queue_s_mean", MS),
    "prefill ms": ("prefill_s_mean", MS),
    "queue (metrics) ms": ("server_queue_s_mean", MS),
    "prefill (metrics) ms": ("server_prefill_s_mean", MS),
    "GPU GiB": ("gpu_memory_gib_max", PLAIN),
    "GPU W": ("gpu_power_w_mean", (1.0, 0)),
    "loop lag p99 ms": ("loop_lag_p99", MS),
    "dispatch delay p99 ms": ("dispatch_delay_p99", (1e3, 2)),
    "client CPU %": ("client_cpu_share", (100.0, 0)),
}
CAPTIONS = {
    "ratios": "Ratio of the two arms",
    "ttft_by_context": "Time to first token by context",
    "tpot_by_context": "Time for each output token by context",
    "throughput_by_load": "Throughput against load",
}
SLO_KEPT = 0.99  # share of requests that must keep the SLO for a load to count as carried


def write(plan: Plan, units: Sequence[Unit], outcome: Outcome, store: Store, keys: Keys) -> Path:
    """Write every artefact; returns the path of the HTML report."""
    figures = plots.draw(plan, outcome)
    for name, figure in figures.items():
        store.write(f"plots/{name}.png", plots.png(figure))
    store.write("results.json", outcome.model_dump_json(indent=1))
    store.write("results.csv", units_csv(units))
    store.write("requests.csv", requests_csv(units))
    svgs = {name: plots.svg(figure) for name, figure in figures.items()}
    return store.write("report.html", page(plan, outcome, svgs, keys))


def page(plan: Plan, outcome: Outcome, svgs: dict[str, str], keys: Keys) -> str:
    """The report as one HTML document that loads nothing."""
    template = Template(files("sglang_misa.bench.load").joinpath("template.html").read_text(encoding="utf-8"))
    tone = "bad" if any(g.failed for g in outcome.gates) else outcome.tone
    heading = " against ".join(reversed(outcome.names)) if len(outcome.names) == 2 else outcome.names[0]
    sections = [
        _table("Gates", ["gate", "cell", "value", ""], _gates(outcome)),
        _list("Problems", (f"{a.arm} at {a.label}: {p}" for a in outcome.arms for p in a.problems)),
        _plots(svgs),
        _table(f"{outcome.names[-1]} / {outcome.names[0]}", *_ratio_rows(outcome, plan)) if outcome.ratios else "",
        _table("Figures", *_figure_rows(outcome)),
        _table("Errors", ["arm", "cell", "class", "requests", "the first one was told"], _errors(outcome)),
        _table(
            f"Highest load with {plan.search.target if plan.search else SLO_KEPT:.0%} of requests inside the SLO",
            ["arm", "context", "load", "first load beyond", "requests inside, by load"],
            _capacity(plan, outcome),
        ),
        _list("Notes", (f"{a.arm} at {a.label}: {n}" for a in outcome.arms for n in a.notes)),
    ]
    return template.substitute(
        title=html.escape(f"Load test: {heading}"),
        meta=html.escape(
            f"sglang-misa {__version__} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {len(plan.cells)} cells × "
            f"{plan.blocks} blocks × {len(plan.arms)} arms · servers {plan.mode if len(plan.arms) > 1 else 'single'} · "
            f"seed {plan.cells[0].workload.seed} · {plan.protocol.api}"
        ),
        tone=tone,
        verdict=html.escape(outcome.verdict),
        sections="\n".join(s for s in sections if s),
        plan=html.escape(_plan_text(plan, keys)),
    )


def _plan_text(plan: Plan, keys: Keys) -> str:
    arms = tuple(a.model_copy(update={"server": keys.erase(a.server)}) for a in plan.arms)
    return plan.model_copy(update={"arms": arms}).model_dump_json(indent=1)


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are escaped already; a row whose first cell differs from the last one's starts a group."""
    if not rows:
        return ""
    body, last = [], rows[0][0]
    for row in rows:
        body.append(f"<tr{'' if row[0] == last else ' class=split'}>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>")
        last = row[0]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    return f'<h2>{html.escape(heading)}</h2><div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _list(heading: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{heading}</h2><ul>{items}</ul>" if items else ""


def _plots(svgs: dict[str, str]) -> str:
    made = "".join(
        f"<figure{' class=wide' if name == 'ratios' else ''}><figcaption>{CAPTIONS[name]}</figcaption>{svg}</figure>"
        for name, svg in svgs.items()
    )
    return f'<h2>Plots</h2><div class="plots">{made}</div>' if made else ""


def _gates(outcome: Outcome) -> list[list[str]]:
    return [
        [
            f"fails if {html.escape(g.gate)}",
            html.escape(g.label),
            "not measured" if g.value is None else f"{g.value:.4g}",
            '<span class="fail">failed</span>' if g.failed else '<span class="pass">passed</span>',
        ]
        for g in outcome.gates
    ]


def _ratio_rows(outcome: Outcome, plan: Plan) -> tuple[list[str], list[list[str]]]:
    columns = ["cell", "figure", *outcome.names, "ratio", f"{plan.confidence:.0%} CI", "pairs", "blocks"]
    return columns, [
        [
            html.escape(cell.label),
            html.escape(title(r.metric)),
            _amount(r, r.a),
            _amount(r, r.b),
            f"{r.value:.3f}",
            f"{r.low:.3f} – {r.high:.3f}" if r.low is not None else "one block only",
            str(r.pairs),
            str(r.blocks),
        ]
        for cell in outcome.ratios
        for r in cell.ratios
    ]


def _amount(ratio: Ratio, value: float) -> str:
    return f"{value:.2f} /s" if "throughput" in ratio.metric or ratio.metric == "goodput" else f"{1e3 * value:.2f} ms"


def _figure_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    used = {c: how for c, how in COLUMNS.items() if any(how[0] in a.figures for a in outcome.arms)}
    rows = []
    for arm in outcome.arms:
        row = [html.escape(arm.label), html.escape(arm.arm)]
        for figure, (factor, digits) in used.values():
            value = arm.figures.get(figure)
            row.append("–" if value is None else f"{factor * value:,.{digits}f}")
        rows.append(row)
    return ["cell", "arm", *used], rows


def _errors(outcome: Outcome) -> list[list[str]]:
    return [
        [html.escape(a.arm), html.escape(a.label), html.escape(kind), str(count), html.escape(a.reasons.get(kind, ""))]
        for a in outcome.arms
        for kind, count in a.errors.items()
    ]


def _capacity(plan: Plan, outcome: Outcome) -> list[list[str]]:
    """For each arm and context the highest load that the server carried inside the SLO, no lower one having failed."""
    if outcome.capacities:
        return [
            [
                html.escape(c.arm),
                html.escape(c.context),
                f"{c.level:g}" if c.level else "none",
                "not reached" if c.beyond is None else f"{c.beyond:g}",
                " ".join(f"{s.level:g}: {s.kept}/{s.asked}{'' if s.decided else '?'}" for s in c.steps),
            ]
            for c in outcome.capacities
        ]
    if plan.slo is None:
        return []
    rows = []
    for name in outcome.names:
        for context in dict.fromkeys(c.workload.label for c in plan.cells):
            cells = sorted((c for c in plan.cells if c.workload.label == context), key=plots.level_of)
            seen = [next(a for a in outcome.arms if (a.arm, a.cell) == (name, c.digest())) for c in cells]
            kept = list(takewhile(lambda a: a.figures.get("slo_share", 0.0) >= SLO_KEPT, seen))
            beyond = cells[len(kept)].level if len(kept) < len(cells) else "not reached"
            shares = []
            for a, c in zip(seen, cells, strict=True):
                low, high = wilson(round(a.figures.get("slo_kept", 0)), round(a.figures["requests"]), plan.confidence)
                shares.append(f"{plots.level_of(c):g}: {a.figures.get('slo_share', 0.0):.0%} ({low:.0%}–{high:.0%})")
            carried = cells[len(kept) - 1].level if kept else "none"
            rows.append([html.escape(word) for word in (name, context, carried, beyond, " · ".join(shares))])
    return rows
