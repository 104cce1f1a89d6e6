"""Recall against cost of every policy, a panel a layer and phase, the chosen one marked.

A line goes down from each recall by its standard error: a policy is chosen where the end of it reaches the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_misa.calibrate.choice import Point
from sglang_misa.config import PHASES, Phase

COLUMNS = 4


def draw(
    found: Mapping[int, Mapping[Phase, Sequence[Point]]],
    chosen: Mapping[int, Mapping[Phase, Point]],
    target: float,
    source: str,
    path: Path,
) -> None:
    """Write a picture in the format that its ending names; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [(phase, layer) for phase in PHASES for layer in sorted(found)]
    columns = min(COLUMNS, len(found))
    height = math.ceil(len(cells) / columns)
    figure, panels = pyplot.subplots(height, columns, figsize=(3.2 * columns, 2.8 * height), squeeze=False)
    for axes in panels.flat[len(cells) :]:
        axes.axis("off")
    for axes, (phase, layer) in zip(panels.flat, cells, strict=False):
        points = found[layer][phase]
        axes.scatter([p.cost for p in points], [p.recall for p in points], s=10, color="tab:grey")
        axes.vlines([p.cost for p in points], [p.bound for p in points], [p.recall for p in points], "tab:grey", lw=0.5)
        best = chosen[layer][phase]
        axes.scatter([best.cost], [best.recall], s=60, color="tab:red", marker="*", zorder=3)
        axes.axhline(target, color="tab:blue", linewidth=0.8)
        axes.set_title(f"layer {layer}, {phase}: {best.policy.label}", fontsize=6)
        axes.set(xlabel="cost / stock's", ylabel="recall")
    figure.suptitle(f"Cost: {source}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
