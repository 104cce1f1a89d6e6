"""What a policy's indexer costs over stock DSA's: measured, from a table of `bench.kernels`, or by a model of its work.

The two are never mixed: a table knows few shapes exactly, the model all of them roughly. A table tells columns,
candidates, blocks and bits apart, and neither routers nor block sizes, which differ by a few percent of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch

from sglang_misa.bench.report import Record, newest, read
from sglang_misa.bench.work import work_of
from sglang_misa.config import PHASES, ConfigError, Phase, SelectionPolicy
from sglang_misa.policy import STOCK

SHIPPED = Path(str(resources.files("sglang_misa"))) / "bench" / "results" / "kernels.csv"
PREFILL_ROWS = 8192  # of a whole chunk


class Costs(Protocol):
    """What policies cost, over stock's."""

    @property
    def source(self) -> str:
        """Where they come from, for the report."""

    def of(self, phase: Phase, policy: SelectionPolicy) -> float | None:
        """The cost of a policy; 1 for stock DSA, None where it is not known."""


@dataclass(frozen=True)
class Modelled:
    """Arithmetic in prefill and bytes in decode over stock's (`bench.work`): a floor, not a measurement."""

    heads: int
    length: int

    @property
    def source(self) -> str:
        return "a model: arithmetic in prefill, bytes in decode (not measured)"

    def of(self, phase: Phase, policy: SelectionPolicy) -> float | None:
        if policy.exact:
            return None
        lens = torch.tensor([self.length])
        ours, stock = (work_of(each, phase, self.heads, lens) for each in (policy, STOCK))
        if phase == "decode":
            return ours.bytes / stock.bytes
        return ours.fp8_time / stock.fp8_time


@dataclass(frozen=True)
class Measured:
    """The slowest measured ratio of each shape, of all shapes of a phase at one length: the nearest to `length`.

    What was measured at other lengths alone has no cost: against stock's, a selection gets cheaper with every token.
    """

    rows: Sequence[Record]
    length: int
    decode_rows: int

    @classmethod
    def read(cls, path: Path, heads: int, length: int, decode_rows: int) -> Measured:
        """A table of `bench.kernels`. Raises ConfigError where it lacks `heads` index heads, or `decode_rows`."""
        rows = by_heads(path).get(heads)
        if not rows:
            raise ConfigError(
                [
                    f"--costs: expected measurements with {heads} index heads in {path}, got none; measure them with "
                    "python -m sglang_misa.bench.kernels, or ask for --costs model"
                ]
            )
        batches = sorted({int(row["rows"]) for row in rows if row["phase"] == "decode"})
        if batches and decode_rows not in batches:
            raise ConfigError(
                [
                    f"--batch: expected requests of a decode step that {path} has, {', '.join(map(str, batches))}, got "
                    f"{decode_rows}; choose one, measure it with python -m sglang_misa.bench.kernels, or ask for "
                    "--costs model"
                ]
            )
        return cls(rows, length, decode_rows)

    @property
    def source(self) -> str:
        gpus = ", ".join(sorted({row["gpu"] for row in self.rows}))
        told = [f"{phase} {f'at {self._at(phase)} keys' if self._of(phase) else 'not'}" for phase in PHASES]
        return f"measured on {gpus}, {', '.join(told)}"

    def of(self, phase: Phase, policy: SelectionPolicy) -> float | None:
        if not policy.active:
            return 1.0
        rows = (row for row in self._of(phase) if int(row["length"]) == self._at(phase))
        return max((1 / float(row["ratio"]) for row in rows if _shape(row) == _shape_of(policy)), default=None)

    def _of(self, phase: Phase) -> list[Record]:
        """The rows of a phase: whole chunks, or decode steps of as many requests."""
        batch = PREFILL_ROWS if phase == "prefill" else self.decode_rows
        return [row for row in self.rows if row["phase"] == phase and int(row["rows"]) == batch]

    def _at(self, phase: Phase) -> int:
        """The length nearest to the one asked for at which a phase was measured, of two the shorter."""
        lengths = {int(row["length"]) for row in self._of(phase)}
        return min(lengths, key=lambda n: (abs(math.log(n / self.length)), n))


def by_heads(path: Path) -> dict[int, list[Record]]:
    """Rows of a table of `bench.kernels`, but for hostile inputs, by index heads. Raises ConfigError for no table."""
    found: dict[int, list[Record]] = {}
    try:
        path.stat()  # raises where there is no file, of which `read` makes an empty table
        for row in newest(read(path)):
            if not row["inputs"].startswith("hostile"):
                found.setdefault(int(row["index_heads"]), []).append(row)
    except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError([f"--costs: expected a CSV of bench.kernels, got {path} ({error!r}); correct it"]) from None
    return found


Shape = tuple[bool, int | None, int | None, int | None, int | None]


def _shape_of(policy: SelectionPolicy) -> Shape:
    return policy.exact, policy.columns, policy.candidates, policy.blocks, policy.sketch


def _shape(row: Record) -> Shape:
    columns = int(row["routed_heads"]) + int(row["residual"]) if row["routed_heads"] else None
    rest = (int(row[name]) if row[name] else None for name in ("candidates", "blocks", "sketch"))
    return (row["policy"] == "exact", columns, *rest)  # type: ignore[return-value]
