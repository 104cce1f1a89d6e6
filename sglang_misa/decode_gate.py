"""Which selection a decode step gets: stock DSA while its longest request is short, the decode policy from there on.

The choice is one for all rows of a step, made on the host: a CUDA graph cannot choose by length. So each decode shape
is captured twice, once with each selection, and `patches/cuda_graph.py` replays the one that this gate names. Shapes of
fewer rows than pay have stock's graph alone. A recall under the floor closes the gate too (`ladder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Capture:
    """One capture of a graph: the selection it records, and whether anything in it asked."""

    stock: bool
    asked: bool = False
    taps: list[Any] = field(default_factory=list)  # what the auditors of the captured layers leave


_capture: Capture | None = None


@contextmanager
def capturing(stock: bool) -> Iterator[Capture]:
    """Answer `stock` to every step until the end of the block: warm-up and capture of one variant."""
    global _capture
    assert _capture is None, "captures do not nest"
    _capture = Capture(stock)
    try:
        yield _capture
    finally:
        _capture = None


def capture() -> Capture | None:
    """The capture under way, if there is one."""
    return _capture


_suspended = False


def suspend(suspended: bool) -> None:
    """Leave every decode step to stock DSA, or no longer: `ladder` calls this, in all ranks in the same step."""
    global _suspended
    _suspended = suspended


def why_stock(gate: int, longest: int | None, *, few_rows: bool = False) -> str | None:
    """The reason for which stock DSA selects in a step, or None.

    few_rows: whether the step has fewer rows than pay; gate: tokens of the longest request up to which stock selects;
    longest: the tokens that it has, and where they are unknown (None), the policy selects. Drafted tokens of the step
    itself may be counted or not, as SGLang counts them.
    """
    if few_rows:
        return "few-rows"
    if _capture is not None:
        _capture.asked = True
        return "captured" if _capture.stock else None
    if _suspended:
        return "recall-floor"
    return "under-min-len" if longest is not None and longest <= gate else None
