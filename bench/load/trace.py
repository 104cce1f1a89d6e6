"""Replay of a recorded trace: arrival times, lengths, and which blocks of tokens requests shared.

One JSON object a line, as Mooncake published its traces: `timestamp` (milliseconds), `input_length`, `output_length`
(tokens) and `hash_ids`, one for each 512 tokens of the prompt; equal ids are equal tokens. The tokens themselves are
drawn anew, so a replay has the trace's lengths, times and prefix hits, and nobody's text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sglang_misa import text_files
from sglang_misa.bench.load.prompts import Ids, Source
from sglang_misa.bench.load.settings import LoadError, Workload, problem_of
from sglang_misa.bench.load.workload import MEASURED_STREAM, Conversation, Turn

HASHED = 512  # tokens behind one hash id
TRACE_STREAM = 0x7ACE
LONGEST = 1 << 27  # tokens, more than any context; a wrong number would be drawn through
LATEST = 1e14  # milliseconds; now, since 1970, are 2e12
MS = 1e-3
MOST_SEED = 2**64 - 1  # a hash id may be negative, a seed not


class Row(BaseModel):
    """One recorded request."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    timestamp: float = Field(ge=0, le=LATEST)  # milliseconds
    input_length: int = Field(ge=1, le=LONGEST)
    output_length: int = Field(ge=1, le=LONGEST)
    hash_ids: tuple[int, ...] = ()


def read(workload: Workload) -> list[Row]:
    """The trace of `workload` in the order of time, without prompts over its --max-len. Raises LoadError."""
    path = Path(workload.trace or "")
    rows = [_row(*line) for line in text_files.json_lines(path, _refused)]
    limit = workload.max_len
    kept = [r for r in rows if limit is None or r.input_length + r.output_length <= limit]
    if not kept:
        of = "" if limit is None else f" of at most {limit} tokens"
        raise LoadError(f"trace: expected requests{of}, got none in the {len(rows)} lines of {path}; see --max-len")
    return sorted(kept, key=lambda r: r.timestamp)


def _row(where: str, line: dict[str, Any]) -> Row:
    try:
        return Row.model_validate(line)
    except ValidationError as error:
        raise _refused(f"{where}: {problem_of(error)}") from None


def _refused(problem: str) -> LoadError:
    return LoadError(f"trace: {problem}")


def dues(workload: Workload) -> list[float]:
    """Seconds after the start at which each request is due, by the trace's own clock times --time-scale."""
    rows = read(workload)
    return [(r.timestamp - rows[0].timestamp) * MS * workload.time_scale for r in rows]


class TraceBuilder:
    """Conversations of one turn with the lengths and shared blocks of a trace."""

    def __init__(self, workload: Workload, source: Source):
        self._seed, self._source = workload.seed, source
        self._rows = read(workload)

    def prefixes(self, block: int) -> list[Ids]:
        """None: a trace's own requests fill the cache."""
        return []

    def conversations(
        self, block: int, count: int, stream: int = MEASURED_STREAM, batch: int = 0
    ) -> list[Conversation]:
        """The first `count` requests of the trace, with tokens of their own in each block and stream."""
        seen: set[tuple[int, ...]] = set()
        made = []
        for i, row in enumerate(self._rows[:count]):
            whole = row.hash_ids[: row.input_length // HASHED]
            known = next((n for n in range(len(whole), 0, -1) if whole[:n] in seen), 0)
            seen.update(whole[:n] for n in range(known + 1, len(whole) + 1))
            shared = min(known * HASHED, row.input_length - 1)
            made.append(Conversation(i, (Turn(self._ids(row, i, block, stream), row.output_length),), 0, shared))
        return made

    def _ids(self, row: Row, number: int, block: int, stream: int) -> Ids:
        """Tokens of each hash id, and of this request alone where the ids end before the prompt does."""
        pieces = [self._draw(HASHED, block, stream, 0, h & MOST_SEED) for h in row.hash_ids]
        missing = row.input_length - HASHED * len(pieces)
        if missing > 0:
            pieces.append(self._draw(missing, block, stream, 1, number))
        return np.concatenate(pieces)[: row.input_length].astype(np.int32)

    def _draw(self, count: int, *where: int) -> Ids:
        return self._source.draw(np.random.default_rng([self._seed, TRACE_STREAM, *where]), count)
