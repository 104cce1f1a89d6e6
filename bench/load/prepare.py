"""Preparation of a block: warm-up, empty cache, shared prefixes, and request bodies ready to send."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sglang_misa.bench.load import schedule, trace
from sglang_misa.bench.load.dataset import DatasetBuilder
from sglang_misa.bench.load.dialogue import Dialogue, Encoder
from sglang_misa.bench.load.drive import Ledger, Notice, Route, Work, drive
from sglang_misa.bench.load.plan import Cell
from sglang_misa.bench.load.prompts import Source
from sglang_misa.bench.load.records import Record
from sglang_misa.bench.load.settings import Flush, Lengths, LoadError, Workload
from sglang_misa.bench.load.trace import TraceBuilder
from sglang_misa.bench.load.workload import (
    KEEP_STREAM,
    WARMUP_STREAM,
    Builder,
    Conversation,
    ConversationBuilder,
    Turn,
)

MAX_PREPARED = 4 * 1024**3  # bytes of request bodies held ready at once
BYTES_PER_TOKEN = 7  # of a token id in JSON
PRIME_GROUP = -1  # conversation number of a prefix that is only primed
SPARES = 4  # unmeasured conversations ready for each client, to hold the load up at the end
AHEAD = 2  # batches of an open number of conversations hold so many for each client
ARRIVAL_STREAM = 0xA221


def builder_of(workload: Workload, source: Source) -> ConversationBuilder:
    """What makes the conversations that `workload` names."""
    if workload.trace is not None:
        return TraceBuilder(workload, source)
    return DatasetBuilder(workload, source) if workload.dataset is not None else Builder(workload, source)


class ServerGoneError(Exception):
    """The server was not there, or another process, at some time of a block: its figures mean nothing."""


def check_size(cell: Cell) -> None:
    """Raise LoadError where not even the shortest prompts of a block could be held ready at once."""
    shape, load = cell.workload, cell.load
    if shape.recorded:
        return
    count = load.asked if load.arrival == "closed" or load.asked is not None else int(load.rate * load.seconds)
    _check_bytes((count or 0) * Lengths.parse(shape.input_len).shortest)


def _check_bytes(tokens: int) -> None:
    size = BYTES_PER_TOKEN * tokens
    if size > MAX_PREPARED:
        raise LoadError(
            f"requests: expected at most {MAX_PREPARED >> 30} GiB of prompts in a block, got {size >> 30}; lower it"
        )


@dataclass(frozen=True)
class Prepared:
    """What is ready to be sent."""

    batches: Iterator[list[Work]]
    dues: tuple[float, ...]  # of an open loop
    spare: list[Work]
    total: int | None  # requests that will be measured, None where the duration decides
    notes: list[str]


class Preparation:
    """Prepares blocks of one cell on one server."""

    def __init__(self, cell: Cell, encoder: Encoder, route: Route, flush: Flush):
        self._cell, self._encoder, self._route, self._flush = cell, encoder, route, flush

    def warm_up(self, source: Source, block: int, notice: Notice) -> float:
        """Send unmeasured requests of `block`, the last one alone; returns its seconds.

        Those before it may wait for kernels that are compiled for them: their time is not that of a request.
        Raises LoadError when one fails, and ServerGoneError.
        """
        builder, load = builder_of(self._cell.workload, source), self._cell.load
        conversations = builder.conversations(block, load.warmups, WARMUP_STREAM)
        records: list[Record] = []
        for part in (conversations[:-1], conversations[-1:]):
            if part:
                records = self._unmeasured(part, "warm-up", notice)
        return float(np.mean([r.e2e for r in records])) if records else 0.0

    def block(self, source: Source, block: int, notice: Notice) -> Prepared:
        """Empty the cache, prime what is shared, and make the requests of `block`. Raises as `warm_up` does."""
        builder, load = builder_of(self._cell.workload, source), self._cell.load
        notes = list(self._cleared())
        prefixes = [
            Conversation(PRIME_GROUP, (Turn(ids, 1),), group, 0) for group, ids in enumerate(builder.prefixes(block))
        ]
        if prefixes:
            self._unmeasured(prefixes, "priming", notice)
        dues: tuple[float, ...] = ()
        if load.arrival == "closed":
            count = load.asked
        elif load.arrival == "trace":
            dues = tuple(due for due in trace.dues(self._cell.workload)[: load.asked] if due < load.seconds)
            count = len(dues)
        else:
            rng = np.random.default_rng([self._cell.workload.seed, block, ARRIVAL_STREAM])
            dues = tuple(schedule.arrivals(load, rng).tolist())
            count = len(dues)
        spares = SPARES * load.concurrency if load.cooldown == "keep" else 0
        spare = self._ready(builder.conversations(block, spares, KEEP_STREAM)) if spares else []
        if count is None:
            size = max(AHEAD * load.concurrency, 8)
            batches = (self._ready(builder.conversations(block, size, batch=i)) for i in itertools.count())
            return Prepared(batches, dues, spare, None, notes)
        conversations = builder.conversations(block, count)
        _check_bytes(sum(len(c.turns[0].ids) for c in conversations))
        total = sum(len(c.turns) for c in conversations)
        return Prepared(iter([self._ready(conversations)]), dues, spare, total, notes)

    def _cleared(self) -> Iterator[str]:
        """Wait for what still runs, and empty the cache; what to know where that cannot be done."""
        if not self._encoder.control.wait_idle():
            yield "the server had requests of others when this block began, by its metrics: these figures are of both"
        if self._flush == "never" or self._encoder.control.flush():
            return
        if self._flush == "require":
            raise LoadError("expected /flush_cache to work, got a refusal; see --admin-key-env")
        yield "the prefix cache was not emptied before this block"

    def _ready(self, conversations: list[Conversation]) -> list[Work]:
        dialogues = [Dialogue(c, self._encoder) for c in conversations]
        return [(d, d.body(d.conversation.turns[0])) for d in dialogues]

    def _unmeasured(self, conversations: list[Conversation], phase: str, notice: Notice) -> list[Record]:
        """Requests that must all succeed, as many at once as the load has clients."""
        total = sum(len(c.turns) for c in conversations)
        notice(phase, 0, total, None)
        work, places = self._ready(conversations), self._cell.load.concurrency
        ledger = Ledger(phase, total, notice)
        drive(self._route, ledger, lambda driver: driver.at_once(work, places))
        failed = next((r for r in ledger.records if not r.good), None)
        if failed is not None:
            if failed.error == "refused" or not self._encoder.control.healthy():
                raise ServerGoneError
            raise LoadError(
                f"{self._cell.label}: expected {phase} requests to succeed, got {failed.error}: {failed.detail}"
            )
        return ledger.records
