"""Times at which the requests of an open loop are due: pure functions of a load and a seeded generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_misa.bench.load.settings import Load


def arrivals(load: Load, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds after the start, ascending, float64 [n]: at most the asked number, and all of them under the duration.

    The rate grows linearly over `ramp_s` and is `load.rate` afterwards: unit-rate arrivals are put through the inverse
    of the integrated rate, so a ramped Poisson process is still Poisson. A burst spends its requests at one instant.
    """
    count = load.asked if load.asked is not None else _enough(load)
    if load.arrival == "poisson":
        expected = np.cumsum(rng.exponential(1.0, count))
    elif load.arrival == "burst":
        expected = (np.arange(count) // load.burst * load.burst).astype(np.float64)
    else:
        expected = np.arange(count, dtype=np.float64)
    due = _invert(expected, load.rate, load.ramp_s or 0.0)
    return due[due < load.seconds]


def _enough(load: Load) -> int:
    """More arrivals than the duration can hold: the mean, seven deviations of a Poisson process, and a burst."""
    mean = load.rate * load.seconds
    return int(mean + 7 * mean**0.5 + 10 + load.burst)


def _invert(expected: NDArray[np.float64], rate: float, ramp_s: float) -> NDArray[np.float64]:
    """The time at which `expected` arrivals are due: rate·t²/(2·ramp) inside the ramp, rate·(t − ramp/2) after it."""
    in_ramp = rate * ramp_s / 2
    inside = np.sqrt(2 * ramp_s * np.minimum(expected, in_ramp) / rate)
    return np.where(expected < in_ramp, inside, expected / rate + ramp_s / 2)


def client_starts(load: Load, spread_s: float = 0.0) -> list[float]:
    """Seconds at which each client of a closed loop starts: over the ramp that is asked for, else over `spread_s`."""
    over = spread_s if load.ramp_s is None else load.ramp_s
    return [over * i / load.concurrency for i in range(load.concurrency)]
