"""The report of a quality run, in the load test's look: one HTML page that loads nothing, and its plots as PNG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sglang_misa.bench.load import plots, tables
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Plan
from sglang_misa.bench.load.store import Store

Rows = Sequence[Sequence[str]]


def heatmap(arm: str, results: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of needles found by one arm, length across and depth down."""
    lengths = sorted({row["length"] for row in results})
    depths = sorted({row["depth"] for row in results})
    cells = {(row["depth"], row["length"]): row["found"] / row["asked"] for row in results if row["arm"] == arm}
    grid = np.array([[cells[depth, length] for length in lengths] for depth in depths])
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.36 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set(title=f"Needles found, {arm}", xlabel="prompt tokens", ylabel="depth (0 % = start)")
    for (row, column), share in np.ndenumerate(grid):
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=plots.INK)
    return figure


def write(
    store: Store,
    plan: Plan,
    environment: Environment,
    *,
    title: str,
    verdict: str,
    tone: str,
    shown: Sequence[tuple[str, Sequence[str], Rows]],
    figures: Mapping[str, Figure],
    servers: Mapping[str, dict[str, str]],
) -> Path:
    """Write plots and report.html; the report's path. shown: (heading, columns, rows) of each table."""
    for name, figure in figures.items():
        store.write(f"plots/{name}.png", plots.png(figure))
    drawn = "".join(f"<figure>{plots.svg(figure)}</figure>" for figure in figures.values())
    sections = [f'<div class="plots">{drawn}</div>' if drawn else ""]
    sections += [tables.table(heading, columns, rows) for heading, columns, rows in shown]
    sections += [tables.facts(f"Server {arm}", facts) for arm, facts in servers.items()]
    sections.append(f"<h3>The command that repeats it</h3><pre>{html.escape(environment.command)}</pre>")
    template = Template(files("sglang_misa.bench.load").joinpath("template.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=html.escape(title),
        meta=html.escape(f"{environment.started} UTC · {plan.protocol.api} · {environment.client['sglang-misa']}"),
        tone=tone,
        verdict=html.escape(verdict),
        sections="\n".join(section for section in sections if section),
        plan=html.escape(plan.model_dump_json(indent=1)),
    )
    return store.write("report.html", text)
