"""Which selection a decode step gets: stock DSA while its rows see few tokens, the decode policy from there on.

The choice is one for all rows of a step, made on the host: a CUDA graph cannot choose by length. So each decode shape
is captured twice, once with each selection, and `patches/cuda_graph.py` replays the one that this gate names. Shapes of
so few rows that they stay under the gate at any length have stock's graph alone. A recall under the floor closes the
gate too (`ladder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sglang_misa.policy import SelectionPolicy


@dataclass(frozen=True)
class Step:
    """The requests of a step, as the host knows them. Padding is not among them, or has a token each.

    Drafted tokens of the step itself may be in the lengths or not, as SGLang counts them.
    """

    lengths: Sequence[int]  # tokens of each request
    width: int = 1  # rows of each: the tokens that a step verifies

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.width

    @cached_property  # as every layer of a step without graphs asks
    def longest(self) -> int:
        """Tokens of the longest request, 0 without any."""
        return max(self.lengths, default=0)

    @cached_property
    def _seen(self) -> tuple[int, int]:
        """(rows, the tokens that they see together), without padding."""
        real = [length for length in self.lengths if length > 1]
        return self.width * len(real), self.width * sum(real)

    def why_under_gate(self, policy: SelectionPolicy) -> str | None:
        """The reason for which the step is under the gate of `policy`, or None."""
        if self.rows < policy.min_rows:
            return "few-rows"
        if self.longest <= policy.min_len:
            return "under-min-len"
        if policy.min_tokens == 0:
            return None
        rows, tokens = self._seen
        beyond = tokens - rows * policy.min_len  # what short rows lack counts against what long ones have
        return "few-tokens" if beyond < policy.min_tokens else None


@dataclass
class Capture:
    """One capture of a graph: the selection it records, and whether anything in it asked."""

    stock: bool
    asked: bool = False
    layers: int = 0  # of the step that select by policy, so far
    taps: list[Any] = field(default_factory=list)  # what the auditors of the captured layers leave
    rows: dict[int, Any] = field(default_factory=dict)  # by rows of a call: those that its taps copy, on the device


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


def why_stock(policy: SelectionPolicy, step: Step | None, *, always: str | None = None) -> str | None:
    """The reason for which stock DSA selects in a step instead of `policy`, or None.

    always: the reason, if there is one, against every step of so many rows, padding among them: no graph of such steps
    has a choice. Where the host does not know the step (None), the policy selects.
    """
    if always is not None:
        return always
    if _capture is not None:
        _capture.asked = True
        return "captured" if _capture.stock else None
    if _suspended:
        return "recall-floor"
    return None if step is None else step.why_under_gate(policy)
