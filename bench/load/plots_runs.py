"""Plots of single requests and of seconds: the distribution of latencies, and the course of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sglang_misa.bench.load.figures import latencies
from sglang_misa.bench.load.plots import COLOURS, INK, MS, dress
from sglang_misa.bench.load.records import TITLES, Unit
from sglang_misa.bench.load.verdict import Outcome

SHOWN = ("ttft", "tpot", "itl")
MAX_CELLS = 8  # whose distributions are drawn
WIDE_SPREAD = 20.0  # of the greatest over the smallest value, from which on an axis is logarithmic
PANELS = {
    "ttft": "TTFT, s",
    "in_flight": "in flight",
    "tokens_s": "tokens/s",
    "queued": "queued",
    "kv_used_share": "KV used",
    "cache_hit_share": "cache hits",
    "gpu_power_w": "GPU W",
}


def draw_runs(outcome: Outcome, units: Sequence[Unit]) -> dict[str, Figure]:
    """Plots by file name; none where nothing was answered."""
    if not any(r.good for u in units for r in u.records):
        return {}
    return {"distributions": _distributions(outcome, units), "timeline": _timeline(outcome, units)}


def _distributions(outcome: Outcome, units: Sequence[Unit]) -> Figure:
    """Empirical distribution of each latency, a row for each cell: two humps are two steps."""
    labels = list(dict.fromkeys(u.label for u in units))[:MAX_CELLS]
    figure = Figure(figsize=(10.5, 0.6 + 2.1 * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), len(SHOWN), squeeze=False)
    for row, label in zip(grid, labels, strict=True):
        for axes, latency in zip(row, SHOWN, strict=True):
            dress(axes)
            low, high = np.inf, 0.0
            for number, name in enumerate(outcome.names):
                records = [r for u in units if u.label == label and u.arm == name for r in u.records]
                values, weights = latencies(records, latency)
                if not values:
                    continue
                order = np.argsort(values)
                x, y = MS * np.array(values)[order], np.cumsum(np.array(weights)[order])
                axes.step(x, y / y[-1], where="post", color=COLOURS[number % len(COLOURS)], linewidth=1.6, label=name)
                low, high = min(low, x[0]), max(high, x[-1])
            if low > 0 and high / low > WIDE_SPREAD:
                axes.set_xscale("log")
            axes.set_ylim(0, 1.02)
            axes.set_xlabel(f"{TITLES[latency]}, ms", color=INK, fontsize=9)
        row[0].set_ylabel(label.replace(" · ", "\n"), color=INK, fontsize=9)
    if len(outcome.names) > 1:
        grid[0][0].legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _timeline(outcome: Outcome, units: Sequence[Unit]) -> Figure:
    """What the client and the servers saw over the whole run, one panel a quantity, each arm in its colour."""
    begin = min(u.started for u in units)
    shown = [p for p in PANELS if p == "ttft" or any(p in u.timeline for u in units)]
    figure = Figure(figsize=(10.5, 0.6 + 1.15 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    for axes, panel in zip(rows[:, 0], shown, strict=True):
        dress(axes)
        named: set[str] = set()
        for unit in units:
            colour = COLOURS[outcome.names.index(unit.arm) % len(COLOURS)]
            label = unit.arm if unit.arm not in named else None
            named.add(unit.arm)
            shift = unit.started - begin
            if panel == "ttft":
                good = [r for r in unit.records if r.good]
                axes.plot(
                    [shift + r.dispatched for r in good], [r.ttft for r in good], ".", ms=3, color=colour, label=label
                )
                failed = [shift + r.dispatched for r in unit.records if not r.good]
                axes.plot(failed, [0.0] * len(failed), "x", ms=4, color="#c0392b")
            else:
                points = unit.timeline.get(panel, ())
                style = "steps-post" if panel == "in_flight" else "default"
                axes.plot(
                    [shift + t for t, _ in points], [v for _, v in points], color=colour, linewidth=1, drawstyle=style
                )
        axes.set_ylim(bottom=0)
        axes.set_ylabel(PANELS[panel], color=INK, fontsize=9)
    rows[-1, 0].set_xlabel("seconds after the start; × is a failed request", color=INK, fontsize=9)
    if len(outcome.names) > 1:
        rows[0, 0].legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2)
    return figure
