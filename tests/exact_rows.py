"""Rows of an extend call with exact scores, for the CUDA sources on the CPU, and the scratch of their sample."""

from collections.abc import Sequence

import numpy as np
from on_cpu import aligned, ints

TOPK = 96  # k of these rows
Requests = Sequence[tuple[int, int]]  # rows of each, and the keys that its last one sees
THREE = ((70, 1500), (40, 300), (2, 2))
THRESHOLD = np.dtype([("above", np.float32), ("tied", np.float32), ("end", np.int32)])


def scratch_of_sample(rows: int, keys: int, stride: int) -> tuple[np.ndarray, ...]:
    """Thresholds, and sampled keys and their scales."""
    count = -(-keys // stride)
    sampled = aligned(np.full((count, 128), 0x7F), np.uint8), aligned(np.full(count, np.nan), np.float32)
    return np.full(rows, np.nan, THRESHOLD), *sampled


class ExtendCase:
    """Small integers, whose scores no order of summation rounds; rows of `requests` and some that see nothing.

    `columns` a row: routed heads and, with `residual`, that one.
    """

    def __init__(self, seed: int, all_heads: int, columns: int = 8, residual: bool = False, requests: Requests = THREE):
        random = np.random.default_rng(seed)
        starts, ends, first = [], [], 0
        for count, seen in requests:
            starts += [first] * count
            ends += [first + max(1, seen - t) for t in reversed(range(count))]
            first += seen
        self.starts, self.ends, self.keys = ints([*starts, 0, 0, 0]), ints([*ends, 0, 0, 0]), first + 8
        self.longest = int((self.ends - self.starts).max())
        self.rows = count = len(self.starts)
        self.q, self.k = random.integers(-1, 2, (count, all_heads, 128)), random.integers(-1, 2, (self.keys, 128))
        self.gates = random.choice([1.0, 2.0, -1.0], (count, all_heads), p=[0.5, 0.3, 0.2])
        self.ids = np.sort(np.argsort(random.random((count, all_heads)), axis=1)[:, : columns - residual], axis=1)
        self.linear = random.integers(-1, 2, (count, 128)) if residual else np.zeros((count, 128), int)
        self.linear_scale = random.choice([1.0, 0.5, 4.0], count)
        self.scale = 1 + random.integers(0, 64, self.keys) / 64
        e4m3 = np.array([0x00, 0x38, 0xB8], np.uint8)  # 0, 1 and -1
        self.keys_held = (aligned(e4m3[self.k], np.uint8), aligned(self.scale, np.float32))
        self.queries = (aligned(e4m3[self.q], np.uint8), aligned(self.gates, np.float32))
        column = (aligned(e4m3[self.linear], np.uint8), aligned(self.linear_scale, np.float32))
        self.inputs = (
            *self.queries,
            all_heads,
            ints(self.ids),
            *(column if residual else (None, None)),
            *self.keys_held,
        )
        self.spoiled = np.zeros(self.keys, bool)
        self.windows = (self.starts, self.ends, count, self.keys)

    def scores(self, row: int, heads) -> np.ndarray:
        window = slice(self.starts[row], self.ends[row])
        return self.gates[row, heads] @ np.maximum(self.q[row, heads] @ self.k[window].T, 0) * self.scale[window]

    def routed(self, row: int) -> np.ndarray:
        """Scores by the routed heads and the residual."""
        window = slice(self.starts[row], self.ends[row])
        linear = self.linear_scale[row] * (self.linear[row] @ self.k[window].T)
        score = self.scores(row, self.ids[row]) + linear * self.scale[window]
        return np.where(self.spoiled[window], -np.inf, score)

    def spoil(self, every: int) -> None:
        """Make NaN of every so many keys."""
        self.spoiled[::every] = True
        self.keys_held[0][::every] = 0x7F

    def repeat(self, distinct: int, scale: np.ndarray) -> None:
        """Leave so many different keys, one after another, with `scale` [keys]."""
        self.k[:] = self.k[np.arange(self.keys) % distinct]
        self.keys_held[0][:] = self.keys_held[0][np.arange(self.keys) % distinct]
        self.scale[:] = self.keys_held[1][:] = scale

    def check_rows(self, out, rows, best) -> None:
        """These rows hold best(row), -1 behind."""
        for row in rows:
            wanted = best(row).tolist()
            assert sorted(out[row].tolist()) == sorted([*wanted, *[-1] * (TOPK - len(wanted))])
