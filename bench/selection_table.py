"""The table of `bench.selection` and its picture: a row a policy, what it keeps and costs, and each phase's front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sglang_misa.bench.work import work_of
from sglang_misa.config import Phase, SelectionPolicy
from sglang_misa.policy import STOCK

FIELDS = (
    *("length", "phase", "heads", "router", "residual", "block_size", "blocks", "sketch", "candidates"),
    *("recall", "p10", "worst_layer", "columns", "flop", "bytes", "front"),
)

Shares = dict[tuple[Phase, SelectionPolicy], Tensor]  # [rows] of what a policy keeps


def together(files: Sequence[Shares]) -> Shares:
    """What one layer's files hold of it, as if they were one."""
    return {key: torch.cat([shares[key] for shares in files]) for key in files[0]}


def table(layers: Sequence[Shares], length: int, index_heads: int) -> list[dict[str, object]]:
    """One row a policy, over all rows of all layers, best first; `front` marks the Pareto front of its phase."""
    lens = torch.tensor([length])
    rows: list[dict[str, object]] = []
    for phase, policy in layers[0]:
        parts = [layer[phase, policy] for layer in layers]
        every = torch.cat(parts)
        ours, dsa = ([work_of(p, kind, index_heads, lens) for kind in ("prefill", "decode")] for p in (policy, STOCK))
        rows.append(
            {
                "length": length,
                "phase": phase,
                "heads": policy.heads or "",
                "router": policy.router if policy.heads else "",
                "residual": int(policy.residual),
                "block_size": policy.block_size if policy.pooled else "",
                "blocks": policy.blocks or "",
                "sketch": policy.sketch or "",
                "candidates": policy.candidates or "",
                "recall": round(float(every.mean()), 4),
                "p10": round(float(every.quantile(0.1)), 4),
                "worst_layer": round(min(float(part.mean()) for part in parts), 4),
                "columns": policy.columns or index_heads,
                "flop": round(ours[0].fp8_time / dsa[0].fp8_time, 4),
                "bytes": round(ours[1].bytes / dsa[1].bytes, 4),
            }
        )
    for row in rows:
        cost = "flop" if row["phase"] == "prefill" else "bytes"
        rivals = [other for other in rows if other["phase"] == row["phase"] and other is not row]
        row["front"] = int(not any(_beats(other, row, cost) for other in rivals))
    return sorted(rows, key=lambda row: (str(row["phase"]), -float(str(row["recall"]))))


def _beats(other: dict[str, object], row: dict[str, object], cost: str) -> bool:
    pairs = [(float(str(other[x])), float(str(row[x]))) for x in (cost, "recall")]
    (their_cost, cost_), (their_recall, recall) = pairs
    return their_cost <= cost_ and their_recall >= recall and (their_cost, their_recall) != (cost_, recall)


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Recall against cost, a point a policy, the front as a line; one panel a phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, (phase, cost, label) in zip(
        panels, (("prefill", "flop", "arithmetic / stock's"), ("decode", "bytes", "bytes / stock's")), strict=True
    ):
        points = [(float(str(r[cost])), float(str(r["recall"])), r["front"]) for r in rows if r["phase"] == phase]
        axes.scatter([p[0] for p in points], [p[1] for p in points], s=12, color="tab:grey", label="policies")
        front = sorted(p[:2] for p in points if p[2])
        axes.plot([p[0] for p in front], [p[1] for p in front], marker="o", color="tab:blue", label="front")
        axes.set(xlabel=label, ylabel="share of DSA's tokens", title=phase, xscale="log")
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
