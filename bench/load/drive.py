"""Sends the prepared conversations of one block, as a closed or an open loop, and records the results."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import requests

from sglang_misa.bench.load import client
from sglang_misa.bench.load.dialogue import Dialogue
from sglang_misa.bench.load.records import Record
from sglang_misa.bench.load.replies import Reply, whole
from sglang_misa.bench.load.settings import Api, Bounds, LoadError
from sglang_misa.bench.load.watch import LoopWatch
from sglang_misa.bench.load.workload import Turn, found

Work = tuple[Dialogue, bytes]  # a conversation and the body of its first request
Notice = Callable[[str, int, int | None, Record | None], None]  # (phase, done, total, the record that came)
Others = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """Where requests go, and what each may take."""

    url: str
    api: Api
    bounds: Bounds
    headers: Mapping[str, str]
    ca_file: str | None
    page: int  # tokens in the unit of prefix-cache hits


@dataclass(frozen=True)
class Timing:
    """When conversations are sent: by clients that wait for each answer, or each when it is due. Seconds."""

    starts: tuple[float, ...]  # of each client of a closed loop
    dues: tuple[float, ...]  # of each conversation of an open loop
    seconds: float  # after which no client asks for more
    hard_stop: float | None  # after which whatever is in flight hangs

    @property
    def steady(self) -> float:
        """When the whole load is on."""
        return max(self.starts, default=0.0)

    @property
    def at_once(self) -> int:
        """Conversations that must be ready before the start."""
        return len(self.starts or self.dues)

    def share(self, number: int, of: int) -> Timing:
        """That of process `number` of so many."""
        return replace(self, starts=self.starts[number::of], dues=self.dues[number::of])


@dataclass
class InFlight:
    """One turn on its way: what was asked with it, and what has come back."""

    pair: int
    number: int
    turn: Turn
    due: float
    prompt: int
    cached: int
    reply: Reply = field(default_factory=Reply)

    def record(self, start: float) -> Record:
        """As it stands, with times after `start` (seconds of perf_counter)."""
        reply, needle = self.reply, self.turn.needle
        times = [t - start for t in reply.times]
        counts = reply.counts
        steps = [
            (later - earlier, more - less)
            for earlier, later, less, more in zip(times, times[1:], counts, counts[1:], strict=False)
            if more > less
        ]
        return Record(
            pair=self.pair,
            turn=self.number,
            due=self.due,
            dispatched=(reply.dispatched or start) - start,
            first=times[0] if times else None,
            last=times[-1] if times else None,
            done=None if reply.done is None else reply.done - start,
            gaps=tuple(gap / tokens for gap, tokens in steps),
            gap_tokens=tuple(tokens for _, tokens in steps),
            exact=reply.exact,
            prompt_wanted=self.prompt,
            prompt_tokens=reply.prompt_tokens,
            output_wanted=self.turn.output_len,
            output_tokens=reply.completion_tokens,
            cached_wanted=self.cached,
            cached_tokens=reply.cached_tokens,
            queue_s=reply.queue_s,
            prefill_s=reply.prefill_s,
            needle_depth=None if needle is None else needle.depth,
            needle_right=None if needle is None else found(needle, reply.text),
            error=reply.error,
            detail=whole(reply.detail),
        )


@dataclass
class Ledger:
    """What came of one phase's requests."""

    phase: str
    total: int | None
    notice: Notice
    watch: LoopWatch = field(default_factory=LoopWatch)
    start: float = field(default_factory=time.perf_counter)
    steady: float = 0.0  # seconds after the start at which the whole load is on
    records: list[Record] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens that came), kept load included
    steps: list[tuple[float, int]] = field(default_factory=list)  # (time, 1 where a request left, -1 where it ended)
    health: list[dict[str, float]] = field(default_factory=list)  # of each process that sent

    def clock(self) -> float:
        """Seconds since the phase started."""
        return time.perf_counter() - self.start

    def step(self, change: int) -> None:
        """One request more or fewer is in flight."""
        self.steps.append((self.clock(), change))

    def settle(self, sent: InFlight, *, kept: bool) -> None:
        """Take in one request, cut off or not; a `kept` one counts for its tokens only."""
        reply, before = sent.reply, 0
        if reply.error is None or (kept and reply.error == "cut_off"):
            for at, count in zip(reply.times, reply.counts, strict=False):
                self.tokens.append((at - self.start, count - before))
                before = count
        if not kept and reply.dispatched:
            self.watch.delays.append(reply.dispatched - self.start - sent.due)
            self.add(sent.record(self.start))

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.notice(self.phase, len(self.records), self.total, record)


class Supply:
    """Conversations ready to be sent, a batch at a time made ahead in a thread where their number is open."""

    def __init__(self, batches: Iterator[list[Work]], low: int):
        self._batches, self._low = batches, low
        self._ready: deque[Work] = deque(next(batches, []))
        self._making: asyncio.Task[list[Work]] | None = None
        self._over = False

    async def take(self) -> Work | None:
        """The next one; None when there is none left."""
        if len(self._ready) <= self._low:
            self._make()
        if self._making is not None and self._making.done():
            await self._collect()
        while not self._ready and not self._over:
            self._make()
            await self._collect()
        return self._ready.popleft() if self._ready else None

    def _make(self) -> None:
        if self._making is None and not self._over:
            self._making = asyncio.create_task(asyncio.to_thread(next, self._batches, []))

    async def _collect(self) -> None:
        """Wait for the batch in the making; the first of those who wait takes it in."""
        making = self._making
        assert making is not None
        made = await asyncio.shield(making)
        if self._making is making:
            self._making, self._over = None, not made
            self._ready.extend(made)


class Driver:
    """Sends conversations to one server and writes into one ledger."""

    def __init__(self, http: aiohttp.ClientSession, route: Route, ledger: Ledger):
        self._http, self._route, self._ledger = http, route, ledger

    async def converse(self, dialogue: Dialogue, body: bytes, due: float, *, kept: bool = False) -> None:
        """Send the turns of one conversation, the first of them `body`, one after the other; a failed turn ends it."""
        turns = dialogue.conversation.turns
        for number, turn in enumerate(turns):
            sent = InFlight(dialogue.conversation.index, number, turn, due, 0, 0)
            try:
                if number > 0:
                    await asyncio.sleep(turn.pause_s)
                    body = await asyncio.to_thread(dialogue.body, turn)
                    sent.due = self._ledger.clock()
                sent.prompt = dialogue.prompt_len
                sent.cached = dialogue.in_cache // self._route.page * self._route.page
                await self._send(sent, body, kept=kept)
                if sent.reply.error:
                    return
                if number + 1 < len(turns):
                    await asyncio.to_thread(dialogue.hear, sent.reply)
            except (LoadError, requests.RequestException) as error:  # the tokenizer's endpoint, between two turns
                if not kept:
                    reply = Reply(dispatched=time.perf_counter(), error="control_call", detail=str(error))
                    asked = InFlight(sent.pair, number + (sent.reply.dispatched > 0), turn, due, sent.prompt, 0, reply)
                    self._ledger.add(asked.record(self._ledger.start))
                return

    async def _send(self, sent: InFlight, body: bytes, *, kept: bool) -> None:
        route = self._route
        bound = route.bounds.request(sent.prompt + sent.turn.output_len)
        stall = route.bounds.stall_timeout_s or bound
        self._ledger.step(1)
        try:
            await client.exchange(self._http, route.url, route.api, body, bound, stall, sent.reply)
        finally:  # cut off or not, its tokens came and its request was sent
            self._ledger.step(-1)
            self._ledger.settle(sent, kept=kept)

    async def at_once(self, work: list[Work], places: int) -> None:
        """All of `work`, at most `places` conversations at a time."""
        free = asyncio.Semaphore(places)

        async def one(dialogue: Dialogue, body: bytes) -> None:
            async with free:
                await self.converse(dialogue, body, self._ledger.clock())

        await asyncio.gather(*(one(*pair) for pair in work))

    async def closed(self, timing: Timing, supply: Supply, spare: list[Work], others: Others) -> None:
        """Clients that wait for each answer; with spare work they go on, unmeasured, until the last one is done.

        `others` returns when the clients of the other processes are done too. What a client waits for its next
        conversation is the harness's fault, and counts as a delay of its dispatch.
        """
        measuring, finished = len(timing.starts), asyncio.Event()
        extra = iter(spare)

        async def one_client(start: float) -> None:
            nonlocal measuring
            await asyncio.sleep(start)
            while (free := self._ledger.clock()) < timing.seconds and (item := await supply.take()) is not None:
                await self.converse(*item, free)
            measuring -= 1
            if measuring == 0:
                await others()
                finished.set()
            while not finished.is_set() and (item := next(extra, None)) is not None:
                await self.converse(*item, self._ledger.clock(), kept=True)

        clients = asyncio.gather(*(one_client(s) for s in timing.starts))
        last = asyncio.create_task(finished.wait())
        try:
            both: list[asyncio.Future[Any]] = [clients, last]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if clients.done():
                clients.result()
        finally:
            clients.cancel()
            last.cancel()
            await asyncio.gather(clients, last, return_exceptions=True)

    async def open(self, dues: Sequence[float], supply: Supply) -> None:
        """Requests sent when they are due, whatever became of the earlier ones."""
        async with asyncio.TaskGroup() as group:
            for due in dues:
                item = await supply.take()
                if item is None:
                    return
                await asyncio.sleep(max(0.0, due - self._ledger.clock()))
                group.create_task(self.converse(*item, due))


async def alone() -> None:
    """There are no other processes to wait for."""


def drive(
    route: Route,
    ledger: Ledger,
    send: Callable[[Driver], Awaitable[None]],
    hard_stop: float | None = None,
    start: float | None = None,
) -> None:
    """Run `send` on an event loop of its own, from `start` on (a time of perf_counter; None: from now).

    What is in flight `hard_stop` seconds later is cut off and kept as that.
    """

    async def run() -> None:
        tls = ssl.create_default_context(cafile=route.ca_file) if route.ca_file else None
        async with client.session(dict(route.headers), tls) as http, ledger.watch:
            ledger.start = time.perf_counter() if start is None else start
            await asyncio.sleep(-ledger.clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hard_stop):
                    await send(Driver(http, route, ledger))
        ledger.health.append(ledger.watch.figures())

    asyncio.run(run())


def drive_block(
    route: Route,
    ledger: Ledger,
    timing: Timing,
    supply: Supply,
    spare: list[Work],
    others: Others = alone,
    start: float | None = None,
) -> None:
    """Send one block, or one process's share of it."""

    async def send(driver: Driver) -> None:
        if timing.dues:
            await driver.open(timing.dues, supply)
        else:
            await driver.closed(timing, supply, spare, others)

    drive(route, ledger, send, timing.hard_stop, start)
