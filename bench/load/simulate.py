"""Simulation of A/B runs: how often intervals are wrong on equal servers, and find a real difference.

`python -m sglang_misa.bench.load.simulate` prints the tables of the README. A simulated request takes
TTFT × block noise × request noise × drift; all noise is log-normal, drift grows with each block that is measured, and
some requests are ten times as slow. The figures of a block go through the same `block_ratio` and `holm` as real ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sglang_misa.arguments import at_least
from sglang_misa.bench.load.stats import Estimate, block_ratio, holm
from sglang_misa.bench.load.verdict import SEQUENTIAL_BLOCKS

CONFIDENCE = 0.95
OUTLIER = 10.0
RUNS = 2000
MOST_BLOCKS = 40
POWER_BLOCKS = (5, 6, 10, 20)
Pair = tuple[tuple[float, ...], tuple[float, ...]]  # figures of one block, A and B
FIGURES = ("TTFT p50", "TTFT p90", "throughput")


@dataclass(frozen=True)
class Scene:
    """One kind of machine, and how it is measured."""

    name: str
    request: float = 0.05  # deviation of the logarithm, request by request
    block: float = 0.02  # of a whole block of one arm
    drift: float = 0.0  # relative slowdown with each block of an arm
    outliers: float = 0.0  # share of requests that are ten times as slow
    slower: float = 1.0  # B's time over A's
    blocks: int = 6
    requests: int = 16
    cells: int = 1
    until_ci: float | None = None  # go on until the interval of TTFT p50 is so narrow, at most MOST_BLOCKS


def simulate(scene: Scene, rng: np.random.Generator) -> list[list[Estimate]]:
    """One A/B: for each cell, the ratios of FIGURES."""
    found = []
    for _ in range(scene.cells):
        blocks: list[Pair] = []
        for block in range(scene.blocks if scene.until_ci is None else MOST_BLOCKS):
            if block >= scene.blocks and _narrow(blocks, scene.until_ci):
                break
            first = _block(scene, rng, 2 * block, b=block % 2 == 1)
            second = _block(scene, rng, 2 * block + 1, b=block % 2 == 0)
            blocks.append((first, second) if block % 2 == 0 else (second, first))
        found.append([_ratio(blocks, i) for i in range(len(FIGURES))])
    return found


def _ratio(blocks: Sequence[Pair], figure: int) -> Estimate:
    b_first = [block % 2 == 1 for block in range(len(blocks))]
    return block_ratio([a[figure] for a, _ in blocks], [b[figure] for _, b in blocks], b_first, CONFIDENCE)


def _narrow(blocks: Sequence[Pair], until_ci: float | None) -> bool:
    _, low, high, _ = _ratio(blocks, 0)
    return until_ci is None or (low is not None and high is not None and math.log(high / low) / 2 <= until_ci)


def _block(scene: Scene, rng: np.random.Generator, place: int, *, b: bool) -> tuple[float, ...]:
    """(p50, p90, throughput) of one block of one arm."""
    times = np.exp(rng.normal(0, scene.request, scene.requests) + rng.normal(0, scene.block))
    times *= np.where(rng.random(scene.requests) < scene.outliers, OUTLIER, 1.0)
    times *= (1 + scene.drift * place) * (scene.slower if b else 1.0)
    p50, p90 = np.percentile(times, [50, 90])
    return float(p50), float(p90), scene.requests / float(times.sum())


def shares(scene: Scene, runs: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """(called different, interval holds the truth): shares of `runs` for each of FIGURES, in any cell and in all cells.

    In several cells "different" is Holm's word.
    """
    rng = np.random.default_rng([seed, scene.blocks, scene.requests])
    called = np.zeros(len(FIGURES))
    held = np.zeros(len(FIGURES))
    for _ in range(runs):
        cells = simulate(scene, rng)
        for i in range(len(FIGURES)):
            truth = 1 / scene.slower if FIGURES[i] == "throughput" else scene.slower
            estimates = [cell[i] for cell in cells]
            adjusted = holm([1.0 if e.p is None else e.p for e in estimates])
            called[i] += min(adjusted) < 1 - CONFIDENCE
            held[i] += all(e.low is not None and e.high is not None and e.low <= truth <= e.high for e in estimates)
    return (called / runs).tolist(), (held / runs).tolist()


EQUAL = (
    Scene("requests vary by 10 %, blocks do not", request=0.10, block=0.0),
    Scene("requests 5 %, blocks 2 %"),
    Scene("requests 10 %, blocks 5 %", request=0.10, block=0.05),
    Scene("the same, 1 % drift a block", request=0.10, block=0.05, drift=0.01),
    Scene("requests 2 %, 2 % drift a block", request=0.02, block=0.005, drift=0.02),
    Scene("3 % of the requests ten times as slow", outliers=0.03),
    Scene("six cells, requests 5 %, blocks 2 %", cells=6),
)
NOISE = Scene("requests 5 %, blocks 2 %")


def _rows(runs: int) -> Iterator[str]:
    yield "| equal servers: called different, % | blocks | " + " | ".join(FIGURES) + " |"
    yield "|---|---|" + "---|" * len(FIGURES)
    for scene in EQUAL:
        for blocks in (5, 6, 10):
            called, _ = shares(replace(scene, blocks=blocks), runs)
            yield f"| {scene.name} | {blocks} | " + " | ".join(f"{100 * c:.1f}" for c in called) + " |"
    for scene in (NOISE, replace(NOISE, name="requests 10 %, blocks 5 %", request=0.10, block=0.05)):
        called, _ = shares(replace(scene, blocks=SEQUENTIAL_BLOCKS, until_ci=0.02), runs)
        yield (
            f"| {scene.name} | from {SEQUENTIAL_BLOCKS} until ±2 % | "
            + " | ".join(f"{100 * c:.1f}" for c in called)
            + " |"
        )
    yield ""
    yield "| B slower by | blocks | TTFT p50 found, % | interval holds the truth, % |"
    yield "|---|---|---|---|"
    for slower in (1.02, 1.05, 1.10):
        found = [shares(replace(NOISE, slower=slower, blocks=blocks), runs) for blocks in POWER_BLOCKS]
        columns = (
            POWER_BLOCKS,
            (f"{100 * called[0]:.0f}" for called, _ in found),
            (f"{100 * held[0]:.1f}" for _, held in found),
        )
        yield f"| {100 * (slower - 1):.0f} % | " + " | ".join(" / ".join(map(str, each)) for each in columns) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sglang_misa.bench.load.simulate", description=__doc__)
    parser.add_argument("runs", nargs="?", type=at_least(1), default=RUNS, help="simulated runs a line")
    for row in _rows(parser.parse_args().runs):
        print(row, flush=True)
