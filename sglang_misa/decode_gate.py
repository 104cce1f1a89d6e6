"""Which selection a decode step gets: stock DSA while its longest request is short, the decode policy from there on.

The choice is one for all rows of a step, made on the host: a CUDA graph cannot choose by length. So each decode shape
is captured twice, once with each selection, and `patches/cuda_graph.py` replays the one that this gate names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sglang_misa.config import SelectionPolicy


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


def is_stock(policy: SelectionPolicy, longest: int | None) -> bool:
    """Whether stock DSA selects in a step whose longest request has `longest` tokens; unknown (None), the policy does.

    Drafted tokens of the step itself may be counted or not, as SGLang counts them.
    """
    if _capture is not None:
        _capture.asked = True
        return _capture.stock
    return longest is not None and longest <= policy.min_len
