"""Pictures of kernels.csv: the ratio to stock by context length, one a GPU and phase.

python -m sglang_misa.bench.plot [FILE]
"""

from __future__ import annotations

import csv
import itertools
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LINES = pyplot.cycler(linestyle=["-", "--"], marker=["o", "s"])  # the second where a series has no colour of its own
RESULTS = pathlib.Path(__file__).parent / "results" / "kernels.csv"


def method(row: dict[str, str]) -> str:
    """The policy and its numbers."""
    numbers = (("h", "routed_heads"), ("C", "candidates"), ("blocks", "blocks"))
    return " ".join([row["policy"], *(f"{name}={row[column]}" for name, column in numbers if row[column])])


def plot(path: pathlib.Path) -> list[pathlib.Path]:
    """Draw the ratio to stock by context length, one picture a GPU and phase, beside the CSV; returns the files."""
    with path.open() as file:
        rows = [r for r in csv.DictReader(file) if r["correct"] == "True"]
    written = []
    for (gpu, phase), group in itertools.groupby(
        sorted(rows, key=lambda r: (r["gpu"], r["phase"])), key=lambda r: (r["gpu"], r["phase"])
    ):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        axes.set_prop_cycle(LINES * pyplot.rcParams["axes.prop_cycle"])
        series: dict[str, dict[int, float]] = {}
        for r in group:
            label = f"{method(r)}, H={r['index_heads']}, {'rows' if phase == 'prefill' else 'batch'} {r['rows']}"
            series.setdefault(label, {})[int(r["length"])] = float(r["ratio"])  # the newest row of a case wins
        for label, points in sorted(series.items()):
            axes.plot(*zip(*sorted(points.items()), strict=True), label=label)
        axes.axhline(1.0, color="grey", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for points in series.values() for length in points})
        axes.set_xticks(ticks, [f"{t // 1024}K" for t in ticks])
        axes.set(
            xlabel="context length (tokens)", ylabel="stock time / ours", title=f"Indexer of a layer, {phase}, {gpu}"
        )
        axes.legend(fontsize="small")
        target = path.with_name(f"kernels-{phase}-{gpu.replace(' ', '-')}.png")
        figure.savefig(target, dpi=130)
        pyplot.close(figure)
        written.append(target)
    return written


if __name__ == "__main__":
    print("\n".join(map(str, plot(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))))
