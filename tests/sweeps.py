"""The order in which the scorer visits a row block's tiles, and how often private buffers change hands: items.cuh."""

from __future__ import annotations

import numpy as np

SWEEPS, TURN = (13, 17, 19, 23), 4  # in tiles


def sweeps_of(tiles: int) -> int:
    """As `Item::sweeps_of`, which the tests of the kernels on the CPU hold to it."""

    def off(sweeps: int) -> int:
        turns = tiles * 16 // (sweeps * TURN) % 128
        return min(abs(turns - 3 * 16), abs(turns - 5 * 16))

    return min(SWEEPS, key=off)


def in_sweeps(tiles: int) -> np.ndarray:
    """Tiles in the order of visits."""
    sweeps = sweeps_of(tiles)
    return np.concatenate([np.arange(sweep, tiles, sweeps) for sweep in range(sweeps)])
