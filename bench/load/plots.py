"""The report's plots, as matplotlib figures: one question each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from sglang_misa.bench.load.plan import Cell, Plan
from sglang_misa.bench.load.records import TITLES, title
from sglang_misa.bench.load.settings import Lengths
from sglang_misa.bench.load.verdict import ArmCell, Outcome

COLOURS = ("#3b6ea5", "#d9722e", "#4f9d69", "#8a5fa8")  # by arm
STYLES = ("-", "--", ":", "-.")  # by concurrency or context inside an arm
MARKERS = ("o", "s", "^", "D")
SHOWN_RATIOS = ("ttft_p50", "ttft_p90", "tpot_p50", "itl_p50", "e2e_p50", "output_throughput")
INK, GRID = "#333a45", "#e4e7eb"
MS = 1e3


def draw(plan: Plan, outcome: Outcome) -> dict[str, Figure]:
    """Plots by file name; those that would hold a single point are left out."""
    figures = {}
    if outcome.ratios:
        figures["ratios"] = _ratios(outcome)
    contexts = sorted({context_of(c) for c in plan.cells})
    for metric in ("ttft", "tpot"):
        if len(contexts) > 1 and any(f"{metric}_p50" in a.figures for a in outcome.arms):
            figures[f"{metric}_by_context"] = _by_context(plan, outcome, metric, contexts)
    if len({level_of(c) for c in plan.cells}) > 1:
        figures["throughput_by_load"] = _by_load(plan, outcome, contexts)
    return figures


def take_literally(figure: Figure) -> Figure:
    """`figure`, whose texts are no formulas, whatever a user's names hold between two dollars; its axes' own may be."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in text.get_text():
            text.set_parse_math(False)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an inline `<svg>` element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """The common look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def context_of(cell: Cell) -> int:
    return Lengths.parse(cell.workload.input_len).longest


def level_of(cell: Cell) -> float:
    return float(cell.load.concurrency) if cell.load.arrival == "closed" else cell.load.rate


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 and count else str(count)


def _series(
    plan: Plan, outcome: Outcome, group: Callable[[Cell], float], at: Callable[[Cell], float], y: str
) -> dict[tuple[int, float], list[tuple[float, ArmCell]]]:
    """Points (x, figures) of each line, a line for each arm and group, ascending in x."""
    lines: dict[tuple[int, float], list[tuple[float, ArmCell]]] = {}
    for cell in plan.cells:
        for number, name in enumerate(outcome.names):
            point = next((a for a in outcome.arms if a.arm == name and a.cell == cell.digest()), None)
            if point is not None and y in point.figures:
                lines.setdefault((number, group(cell)), []).append((at(cell), point))
    return {key: sorted(points, key=lambda p: p[0]) for key, points in lines.items()}


def _legend(axes: Axes, lines: int) -> None:
    if lines > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2 if lines > 4 else 1)


def _by_context(plan: Plan, outcome: Outcome, metric: str, contexts: Sequence[int]) -> Figure:
    """Median with the p50–p90 span of a latency, over the prompt's length."""
    figure, axes = _canvas(6.4, 4.0)
    lines = _series(plan, outcome, level_of, lambda c: float(contexts.index(context_of(c))), f"{metric}_p50")
    levels = sorted({level for _, level in lines})
    for place, ((arm, level), points) in enumerate(sorted(lines.items())):
        shift = 0.05 * (place - (len(lines) - 1) / 2)
        x = [at + shift for at, _ in points]
        middle = [MS * p.figures[f"{metric}_p50"] for _, p in points]
        above = [max(0.0, MS * p.figures[f"{metric}_p90"] - m) for (_, p), m in zip(points, middle, strict=True)]
        style = levels.index(level)
        axes.errorbar(
            x,
            middle,
            yerr=[[0.0] * len(above), above],
            color=COLOURS[arm % len(COLOURS)],
            linestyle=STYLES[style % len(STYLES)],
            marker=MARKERS[style % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            elinewidth=1,
            capsize=2.5,
            label=outcome.names[arm] + (f", {_unit(plan)} {level:g}" if len(levels) > 1 else ""),
        )
    axes.set_xticks(range(len(contexts)), [tokens(c) for c in contexts])
    axes.set_xlim(-0.5, len(contexts) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt tokens", color=INK)
    axes.set_ylabel(f"{TITLES[metric]}: median, whisker to p90 (ms)", color=INK)
    _legend(axes, len(lines))
    return figure


def _by_load(plan: Plan, outcome: Outcome, contexts: Sequence[int]) -> Figure:
    """Output tokens a second over the load."""
    figure, axes = _canvas(6.4, 4.0)
    lines = _series(plan, outcome, lambda c: float(context_of(c)), level_of, "output_throughput")
    for (arm, context), points in sorted(lines.items()):
        style = contexts.index(int(context))
        axes.plot(
            [x for x, _ in points],
            [p.figures["output_throughput"] for _, p in points],
            color=COLOURS[arm % len(COLOURS)],
            linestyle=STYLES[style % len(STYLES)],
            marker=MARKERS[style % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            label=outcome.names[arm] + (f", {tokens(int(context))}" if len(contexts) > 1 else ""),
        )
    levels = sorted({level_of(c) for c in plan.cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_unit(plan), color=INK)
    axes.set_ylabel("output tokens a second", color=INK)
    _legend(axes, len(lines))
    return figure


def _unit(plan: Plan) -> str:
    return "concurrency" if plan.cells[0].load.arrival == "closed" else "requests a second"


def _ratios(outcome: Outcome) -> Figure:
    """B over A with its interval, a row for each figure and cell; the line at 1 is no difference."""
    rows = [(cell.label, r) for cell in outcome.ratios for m in SHOWN_RATIOS if (r := cell.of(m)) is not None]
    figure, axes = _canvas(10.5, 0.9 + 0.23 * len(rows) + 0.26 * len(outcome.ratios))
    place, ticks, names = 0.0, [], []
    last = ""
    for label, ratio in rows:
        if label != last:
            place += 1.2 if last else 0.0
            last = label
            ticks.append(place - 0.9)
            names.append(label)
        good = ratio.better
        colour = "#8b929c" if not ratio.certain else COLOURS[2] if good else "#c0392b"
        low, high = (ratio.value if end is None else end for end in (ratio.low, ratio.high))
        span = [[ratio.value - low], [high - ratio.value]]
        axes.errorbar(
            [ratio.value],
            [place],
            xerr=span,
            fmt="o",
            color=colour,
            capsize=3,
            linewidth=1.8,
        )
        axes.annotate(
            f"{ratio.value:.3f}", (1.01, place), xycoords=("axes fraction", "data"), fontsize=9, va="center", color=INK
        )
        ticks.append(place)
        names.append(title(ratio.metric))
        place += 1.0
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)  # twice and half are as far from 1
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(ticks, names)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in {label for label, _ in rows} else "normal")
    axes.grid(visible=False, axis="y")
    axes.set_ylim(place - 0.4, -1.3)
    axes.set_xlabel(f"{outcome.names[1]} / {outcome.names[0]}", color=INK)
    return figure
