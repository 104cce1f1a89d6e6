"""Rows that stand for many: one drawn of each of equal parts.

Evenly spaced ones would all lie at the same place of a page or of a kernel's row block.
"""

from __future__ import annotations

import itertools
import random


def one_of_each_part(rows: range, parts: int, numbers: random.Random) -> list[int]:
    """A row of each of `parts` equal parts of `rows`, ascending; 1 <= parts <= len(rows)."""
    ends = [rows.start + len(rows) * part // parts for part in range(parts + 1)]
    return [numbers.randrange(*part) for part in itertools.pairwise(ends)]
