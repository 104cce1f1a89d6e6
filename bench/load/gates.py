"""Gates: conditions such as `ttft_p50 > 1.02` that end the program with code 1 when they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sglang_misa.bench.load.fields import NUMBER
from sglang_misa.bench.load.records import LATENCIES, PLAIN, RATES, Ratio, split_metric
from sglang_misa.bench.load.settings import LoadError

DEFAULT = "error_rate > 0.01"  # added unless a gate names the error rate


class GateResult(BaseModel):
    """One gate in one cell. A figure that was not measured fails its gate."""

    model_config = ConfigDict(frozen=True)

    gate: str
    label: str
    value: float | None
    failed: bool


class Gate:
    """`ttft_p50 > 1.02`: fails when it holds. In an A/B the figure is a ratio B/A; `.low`, `.high` its interval.

    Raises LoadError for what is no condition on a known figure.
    """

    PATTERN = re.compile(rf"\s*([a-z0-9_]+)(?:\.(low|high))?\s*(<=|>=|<|>)\s*({NUMBER})\s*")

    def __init__(self, text: str):
        match = self.PATTERN.fullmatch(text)
        if match is None:
            raise LoadError(f'fail_if: expected something like "ttft_p50 > 1.02", got {text!r}; rewrite it')
        self.text = text.strip()
        self.metric, self.bound, self.sign = match[1], match[2], match[3]
        self.limit = float(match[4])
        if self.metric not in (*RATES, *PLAIN) and not _maximum(self.metric):
            try:
                split_metric(self.metric)
            except LoadError as error:
                raise LoadError(f"fail_if: {error} ({', '.join(PLAIN)} are known too)") from None

    @property
    def compared(self) -> bool:
        """Whether two arms give a ratio of its figure."""
        return self.metric not in PLAIN and not _maximum(self.metric)

    def fails(self, value: float) -> bool:
        """Whether the condition holds for `value`."""
        limit = self.limit
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[self.sign]

    def apply(self, label: str, figures: Mapping[str, float], ratio: Ratio | None) -> GateResult:
        """Its result in the cell `label`: over `ratio` where there is one, else over the arm's own figures."""
        value = figures.get(self.metric) if ratio is None else getattr(ratio, self.bound or "value")
        failed = value is None or math.isnan(value) or self.fails(value)
        return GateResult(gate=self.text, label=label, value=value, failed=failed)


def check(texts: Sequence[str], *, ratios: bool) -> None:
    """Raise LoadError for what is no gate, or asks for the interval of a figure that has none: nothing would tell.

    ratios: whether two arms are compared.
    """
    for gate in map(Gate, texts):
        if gate.bound and not (ratios and gate.compared):
            raise LoadError(
                f"fail_if: expected .{gate.bound} of a ratio of two servers, got it of {gate.metric}, which has none "
                f"here; write {gate.metric}"
            )


def gates_of(texts: Sequence[str], *, default: bool = True) -> list[Gate]:
    """The gates that the user gave, and the default one on errors unless he gave one. Raises LoadError."""
    gates = [Gate(text) for text in texts]
    return gates if not default or any(g.metric == "error_rate" for g in gates) else [*gates, Gate(DEFAULT)]


def compared(gates: Iterable[Gate]) -> list[str]:
    """Figures that need a ratio."""
    return [g.metric for g in gates if g.compared]


def _maximum(metric: str) -> bool:
    return metric in {f"{latency}_max" for latency in LATENCIES}
