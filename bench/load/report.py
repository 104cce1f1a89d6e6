"""Artefacts for readers: one self-contained HTML file, PNG plots, a JSON file of every figure, two CSV files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from sglang_misa import __version__
from sglang_misa.bench.load import plots, tables
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Plan
from sglang_misa.bench.load.plots_runs import draw_runs
from sglang_misa.bench.load.records import Unit
from sglang_misa.bench.load.results import Results
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.store import Store, requests_csv, units_csv
from sglang_misa.bench.load.verdict import Outcome

CAPTIONS = {
    "ratios": "Ratio of the two arms, t-interval over blocks: green = the second is better, red = worse, grey = unsure",
    "ttft_by_context": "Time to first token by context",
    "tpot_by_context": "Time for each output token by context",
    "throughput_by_load": "Throughput against load",
    "distributions": "Distributions: the share of requests (tokens, for ITL) that took at most so long",
    "timeline": "Timeline of the run",
}
WIDE = {"ratios", "distributions", "timeline"}


def write(
    plan: Plan, units: Sequence[Unit], outcome: Outcome, store: Store, keys: Keys, environment: Environment | None
) -> Path:
    """Write every artefact; returns the path of the HTML report."""
    drawn = plots.draw(plan, outcome) | draw_runs(outcome, units)
    figures = {name: plots.take_literally(figure) for name, figure in drawn.items()}
    for name, figure in figures.items():
        store.write(f"plots/{name}.png", plots.png(figure))
    arms = tuple(a.model_copy(update={"server": keys.erase(a.server)}) for a in plan.arms)
    results = Results(
        **dict(outcome),
        environment=environment,
        servers={u.arm: u.server for u in units},
        plan=plan.model_copy(update={"arms": arms}),
    )
    store.write("results.json", results.model_dump_json(indent=1))
    store.write("results.csv", units_csv(units))
    store.write("requests.csv", requests_csv(units))
    return store.write("report.html", page(results, {name: plots.svg(figure) for name, figure in figures.items()}))


def page(results: Results, svgs: dict[str, str]) -> str:
    """The report as one HTML document that loads nothing."""
    template = Template(files("sglang_misa.bench.load").joinpath("template.html").read_text(encoding="utf-8"))
    plan, environment = results.plan, results.environment
    failed = any(g.failed for g in results.gates)
    heading = " against ".join(reversed(results.names)) if len(results.names) == 2 else results.names[0]
    order = f"A B B A, servers {plan.mode} · " if len(plan.arms) == 2 else ""
    sections = [
        tables.bullets("Invalid, and why", (f"{a.arm} at {a.label}: {p}" for a in results.arms for p in a.problems)),
        tables.main_table(plan, results),
        tables.capacity(plan, results),
        _plots(svgs),
        tables.gates(results),
        tables.errors(results),
        tables.bullets("Notes", (f"{a.arm} at {a.label}: {n}" for a in results.arms for n in a.notes)),
        tables.cell_tables(results),
        _environment(results),
    ]
    return template.substitute(
        title=html.escape(f"Load test: {heading}"),
        meta=html.escape(
            f"sglang-misa {__version__} · {environment.started if environment else '–'} UTC · "
            f"{len(plan.cells)} cells × {plan.blocks} blocks × {len(plan.arms)} arms · {order}"
            f"seed {plan.cells[0].workload.seed} · {plan.protocol.api}"
        ),
        tone="bad" if failed else results.tone,
        verdict=html.escape(results.verdict + (" A gate failed." if failed else "")),
        sections="\n".join(s for s in sections if s),
        plan=html.escape(plan.model_dump_json(indent=1)),
    )


def _plots(svgs: dict[str, str]) -> str:
    made = "".join(
        f"<figure{' class=wide' if name in WIDE else ''}><figcaption>{CAPTIONS[name]}</figcaption>{svg}</figure>"
        for name, svg in svgs.items()
    )
    return f'<h2>Plots</h2><div class="plots">{made}</div>' if made else ""


def _environment(results: Results) -> str:
    environment = results.environment
    parts = []
    if environment is not None:
        parts += [
            f"<h3>The command that repeats it</h3><pre>{html.escape(environment.command)}</pre>",
            tables.facts("This client", {**environment.client, **environment.gpus}),
        ]
    for arm in results.plan.arms:
        parts.append(
            tables.facts(f"Server {arm.name}", {"started by": arm.server, **results.servers.get(arm.name, {})})
        )
    return "<h2>Environment</h2>" + "".join(parts)
