"""The report of a quality run, in the load test's look: one HTML page that loads nothing, and its plots as PNG."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

Row = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns, cells


@dataclass(frozen=True)
class Section:
    """One measurement. name: of its JSON file, which holds `rows`. tone: good, bad or none.

    refusal: why it says nothing. grid: what a page shows in the place of the rows.
    """

    name: str
    verdict: str
    rows: Sequence[Row]
    tone: str = ""
    refusal: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    grid: Table | None = None

    @property
    def table(self) -> Table:
        """What a page shows."""
        if self.grid is not None:
            return self.grid
        columns = tuple(self.rows[0]) if self.rows else ()
        return columns, [[_told(row[column]) for column in columns] for row in self.rows]


def _told(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def heatmap(arm: str, results: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of needles found by one arm, length across and depth down."""
    lengths = sorted({row["length"] for row in results})
    depths = sorted({row["depth"] for row in results})
    cells = {(row["depth"], row["length"]): row["found"] / row["asked"] for row in results if row["arm"] == arm}
    grid = np.array([[cells.get((depth, length), np.nan) for length in lengths] for depth in depths])
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 1.4 + 0.36 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set(title=f"Needles found, {arm}", xlabel="prompt tokens", ylabel="depth (0 % = start)")
    for (row, column), share in np.ndenumerate(grid):
        axes.text(
            column,
            row,
            "–" if np.isnan(share) else f"{100 * share:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color=plots.INK,
        )
    return figure


def write(
    store: Store,
    plan: Plan,
    environment: Environment,
    title: str,
    found: Sequence[Section],
    servers: Mapping[str, dict[str, str]],
) -> Path:
    """Write the rows of each section as JSON, its figures as PNG, and report.html; the report's path."""
    figures = {name: figure for section in found for name, figure in section.figures.items()}
    for section in found:
        store.write(f"{section.name}.json", json.dumps(section.rows, indent=1) + "\n")
    for name, figure in figures.items():
        store.write(f"plots/{name}.png", plots.png(figure))
    drawn = "".join(f"<figure>{plots.svg(figure)}</figure>" for figure in figures.values())
    parts = [f'<div class="plots">{drawn}</div>' if drawn else ""]
    parts += [tables.table(section.name.capitalize(), *section.table) for section in found]
    parts += [tables.facts(f"Server {arm}", facts) for arm, facts in servers.items()]
    parts.append(f"<h3>The command that repeats it</h3><pre>{html.escape(environment.command)}</pre>")
    template = Template(files("sglang_misa.bench.load").joinpath("template.html").read_text(encoding="utf-8"))
    tones = [section.tone for section in found]
    text = template.substitute(
        title=html.escape(title),
        meta=html.escape(f"{environment.started} UTC · {plan.protocol.api} · {environment.client['sglang-misa']}"),
        tone="bad" if "bad" in tones else "good" if "good" in tones else "",
        verdict=html.escape(" ".join(section.verdict for section in found)),
        sections="\n".join(part for part in parts if part),
        plan=html.escape(plan.model_dump_json(indent=1)),
    )
    return store.write("report.html", text)
