"""Report of a quality run: one self-contained HTML page, and its plots as PNG."""

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

    refusal: why it says nothing. grid: what a page shows instead of the rows.
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


def heatmaps(rows: Sequence[Row]) -> Figure:
    """Share of needles found, a panel for each arm, length across and depth down."""
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    shares = {(row["arm"], row["depth"], row["length"]): row["found"] / row["asked"] for row in rows}
    size = (1.2 + len(arms) * (1.2 + 0.5 * len(lengths)), 1.6 + 0.3 * len(depths))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, arm in zip(panels, arms, strict=True):
        grid = np.array([[shares.get((arm, depth, length), np.nan) for length in lengths] for depth in depths])
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.6, aspect="auto")  # pale enough for ink
        axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_title(arm)
        for (row, column), share in np.ndenumerate(grid):
            told = "–" if np.isnan(share) else f"{100 * share:.3g}"  # 199 of 200 are not 100
            axes.text(column, row, told, ha="center", va="center", fontsize=8, color=plots.INK)
    panels[0].set_ylabel("depth (0 % = start)")
    figure.supxlabel("prompt tokens", fontsize="medium")
    figure.suptitle("Needles found, %", fontsize="medium")
    return figure


def write(
    store: Store,
    plan: Plan,
    environment: Environment,
    title: str,
    found: Sequence[Section],
    servers: Mapping[str, dict[str, str]],
    refusals: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> Path:
    """Write the rows of each section as JSON, its figures as PNG, and report.html; the report's path.

    refusals: why the answers say nothing, told instead of a verdict. remarks: told behind it.
    """
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
    told = refusals or [section.verdict for section in found]
    tones = [] if refusals else [section.tone for section in found]
    text = template.substitute(
        title=html.escape(title),
        meta=html.escape(f"{environment.started} UTC · {plan.protocol.api} · {environment.client['sglang-misa']}"),
        tone="bad" if "bad" in tones else "good" if "good" in tones else "",
        verdict=html.escape(" ".join([*told, *remarks])),
        sections="\n".join(part for part in parts if part),
        plan=html.escape(plan.model_dump_json(indent=1)),
    )
    return store.write("report.html", text)
