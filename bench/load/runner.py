"""One block: warm-up, flush, priming, then the measured requests of one arm in one cell."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from pydantic import BaseModel, ConfigDict

from sglang_misa.bench.load import client, schedule
from sglang_misa.bench.load.control import STOCK, Control, misa_calls, misa_problem, routed
from sglang_misa.bench.load.dialogue import Dialogue, Encoder
from sglang_misa.bench.load.measure import Record, error_classes, summarize
from sglang_misa.bench.load.prompts import Source
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Arm, Cell, Connection, Lengths, LoadError, Slo
from sglang_misa.bench.load.watch import GpuWatch, LoopWatch
from sglang_misa.bench.load.workload import KEEP_STREAM, LEAD, WARMUP_STREAM, Builder, Conversation, Turn, found

MAX_PREPARED = 4 * 1024**3  # bytes of request bodies held ready at once
BYTES_PER_TOKEN = 7  # of a token id in JSON
PRIME_GROUP = -1  # conversation number of a prefix that is only primed
SPARES = 4  # unmeasured conversations ready for each client, to hold the load up at the end
ARRIVAL_STREAM = 0xA221
Work = tuple[Dialogue, bytes]
Notice = Callable[[str, int, int, Record | None], None]  # (phase, done, total, the record that came)


class Unit(BaseModel):
    """What one arm did in one block of one cell."""

    model_config = ConfigDict(frozen=True)

    arm: str
    cell: str  # digest
    label: str
    block: int
    started: float  # Unix time
    figures: dict[str, float]
    errors: dict[str, int]
    client: dict[str, float]
    gpu: dict[str, float]
    metrics: dict[str, float]  # what changed in the server's counters
    misa: dict[str, float]  # indexer calls by path in this block
    problems: tuple[str, ...]  # why these figures must not be used
    notes: tuple[str, ...]  # what to know when reading them
    records: tuple[Record, ...]


@dataclass
class Block:
    """The live state of one measured block."""

    encoder: Encoder
    connection: Connection
    http: aiohttp.ClientSession
    watch: LoopWatch
    notice: Notice
    phase: str
    total: int
    page: int = 1
    start: float = field(default_factory=time.perf_counter)
    records: list[Record] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens that came), kept load included

    async def converse(self, dialogue: Dialogue, body: bytes, due: float, *, kept: bool = False) -> None:
        """Send the turns of one conversation, the first of them `body`, one after the other; a failed turn ends it."""
        for number, turn in enumerate(dialogue.conversation.turns):
            cached = dialogue.in_cache // self.page * self.page
            if number > 0:
                body = await asyncio.to_thread(dialogue.body, turn)
                due = self.clock()
            wanted = dialogue.prompt_len
            bound = self.connection.request_bound(wanted + turn.output_len)
            stall = self.connection.stall_timeout_s or bound
            reply = client.Reply()
            try:
                await client.exchange(self.http, self.encoder.control.url, self.encoder.api, body, bound, stall, reply)
            finally:  # cut off or not, its tokens came and its request was sent
                before = 0
                for at, count in zip(reply.times, reply.counts, strict=True):
                    self.tokens.append((at - self.start, count - before))
                    before = count
                if not kept and reply.dispatched:
                    self.watch.delays.append(reply.dispatched - self.start - due)
                    record = self._record(dialogue.conversation, number, turn, reply, due, wanted, cached)
                    self.records.append(record)
                    self.notice(self.phase, len(self.records), self.total, record)
            if reply.error:
                return
            if number + 1 < len(dialogue.conversation.turns):
                await asyncio.to_thread(dialogue.hear, reply)

    def clock(self) -> float:
        """Seconds since the block started."""
        return time.perf_counter() - self.start

    def _record(
        self,
        conversation: Conversation,
        number: int,
        turn: Turn,
        reply: client.Reply,
        due: float,
        wanted: int,
        cached: int,
    ) -> Record:
        times = [t - self.start for t in reply.times]
        steps = [
            (later - earlier, more - less)
            for earlier, later, less, more in zip(times, times[1:], reply.counts, reply.counts[1:], strict=False)
            if more > less
        ]
        needle = turn.needle
        return Record(
            pair=conversation.index,
            turn=number,
            due=due,
            dispatched=reply.dispatched - self.start,
            first=times[0] if times else None,
            last=times[-1] if times else None,
            done=None if reply.done is None else reply.done - self.start,
            gaps=tuple(gap / tokens for gap, tokens in steps),
            gap_tokens=tuple(tokens for _, tokens in steps),
            exact=reply.exact,
            prompt_wanted=wanted,
            prompt_tokens=reply.prompt_tokens,
            output_wanted=turn.output_len,
            output_tokens=reply.completion_tokens,
            cached_wanted=cached,
            cached_tokens=reply.cached_tokens,
            queue_s=reply.queue_s,
            prefill_s=reply.prefill_s,
            needle_depth=None if needle is None else needle.depth,
            needle_right=None if needle is None else found(needle, reply.text),
            error=reply.error,
            detail=reply.detail,
        )


class Runner:
    """Measures blocks of one cell on one server."""

    def __init__(self, arm: Arm, cell: Cell, control: Control, connection: Connection, keys: Keys, slo: Slo | None):
        self._arm, self._cell, self._control = arm, cell, control
        self._connection, self._keys, self._slo = connection, keys, slo
        self._encoder = Encoder(control, connection, cell.workload)

    def measure(self, source: Source, block: int, notice: Notice, *, warm: bool) -> Unit:
        """One block. Warm-up runs when `warm`; the cache is emptied and primed each time."""
        if self._arm.expect and (problem := misa_problem(self._arm.expect, self._control.refresh())):
            raise LoadError(f"arm {self._arm.name}: {problem}")
        builder = Builder(self._cell.workload, source)
        load, notes = self._cell.load, []
        if warm and load.warmups:
            self._plain(builder.conversations(block, load.warmups, WARMUP_STREAM), "warm-up", notice)
        if self._connection.flush != "never":
            self._control.wait_idle()
            if not self._control.flush():
                if self._connection.flush == "require":
                    raise LoadError(
                        f"arm {self._arm.name}: expected /flush_cache to work, got a refusal; see --admin-key-env"
                    )
                notes.append("the prefix cache was not emptied before this block")
        prefixes = [
            Conversation(PRIME_GROUP, (Turn(ids, 1),), group, 0) for group, ids in enumerate(builder.prefixes(block))
        ]
        if prefixes:
            self._plain(prefixes, "priming", notice)
        conversations = builder.conversations(block, load.requests)
        size = BYTES_PER_TOKEN * sum(len(c.turns[0].ids) for c in conversations)
        if size > MAX_PREPARED:
            raise LoadError(
                f"requests: expected at most {MAX_PREPARED >> 30} GiB of prompts in a block, got {size >> 30}; lower it"
            )
        work = self._prepare(conversations)
        spare = self._prepare(
            builder.conversations(block, SPARES * load.concurrency, KEEP_STREAM) if load.cooldown == "keep" else []
        )
        calls, metrics, started = misa_calls(self._control.refresh()), self._control.metrics(), time.time()
        with GpuWatch(local="127.0.0.1" in self._control.url or "localhost" in self._control.url) as gpu:
            state = asyncio.run(self._drive(work, spare, block, notice))
        self._control.wait_idle()
        after = self._control.metrics()
        later = misa_calls(self._control.refresh())
        # a CUDA graph counts at capture only, so a captured path counts as it stands
        misa = {path: float(count - calls.get(path, 0) * ("captured:" not in path)) for path, count in later.items()}
        return self._unit(state, block, started, gpu.figures(), _changes(metrics, after), misa, notes)

    def _plain(self, conversations: list[Conversation], phase: str, notice: Notice) -> None:
        """Unmeasured requests, all of which must succeed, as many at once as the load has clients."""

        async def run() -> list[Record]:
            async with client.session(self._keys.headers()) as http, LoopWatch() as watch:
                total = sum(len(c.turns) for c in conversations)
                state = Block(self._encoder, self._connection, http, watch, notice, phase, total)
                places = asyncio.Semaphore(self._cell.load.concurrency)

                async def one(dialogue: Dialogue, body: bytes) -> None:
                    async with places:
                        await state.converse(dialogue, body, 0.0)

                await asyncio.gather(*(one(*pair) for pair in self._prepare(conversations)))
                return state.records

        notice(phase, 0, len(conversations), None)
        failed = [r for r in asyncio.run(run()) if not r.good]
        if failed:
            raise LoadError(
                f"arm {self._arm.name}, {self._cell.label}: expected {phase} requests to succeed, "
                f"got {failed[0].error}: {self._keys.erase(failed[0].detail)}"
            )

    def _prepare(self, conversations: list[Conversation]) -> list[Work]:
        dialogues = [Dialogue(c, self._encoder) for c in conversations]
        return [(d, d.body(d.conversation.turns[0])) for d in dialogues]

    async def _drive(self, work: list[Work], spare: list[Work], block: int, notice: Notice) -> Block:
        load, shape = self._cell.load, self._cell.workload
        turns = sum(len(d.conversation.turns) for d, _ in work)
        longest = sum(Lengths.parse(text).longest for text in (shape.input_len, shape.output_len, shape.turn_len))
        async with client.session(self._keys.headers()) as http, LoopWatch() as watch:
            state = Block(
                self._encoder, self._connection, http, watch, notice, "measure", turns, self._control.page_size
            )
            notice("measure", 0, turns, None)
            hard_stop = load.duration_s + shape.turns * self._connection.request_bound(longest * shape.turns)
            with contextlib.suppress(TimeoutError):  # what was in flight is recorded as cut off
                async with asyncio.timeout(hard_stop):
                    if load.arrival == "closed":
                        await self._closed(state, iter(work), spare)
                    else:
                        await self._open(state, work, block)
        return state

    async def _closed(self, state: Block, work: Iterator[Work], spare: list[Work]) -> None:
        """Clients that wait for each answer; with spare work they go on, unmeasured, until the last one is done."""
        load, measuring, finished = self._cell.load, 0, asyncio.Event()
        extra = iter(spare)

        async def one_client(start: float) -> None:
            nonlocal measuring
            await asyncio.sleep(start)
            while state.clock() < load.duration_s and (item := next(work, None)) is not None:
                measuring += 1
                await state.converse(*item, state.clock())
                measuring -= 1
            if measuring == 0:
                finished.set()
            while not finished.is_set() and (item := next(extra, None)) is not None:
                await state.converse(*item, state.clock(), kept=True)

        clients = asyncio.gather(*(one_client(s) for s in schedule.client_starts(load)))
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

    async def _open(self, state: Block, work: list[Work], block: int) -> None:
        """Requests sent when they are due, whatever became of the earlier ones."""
        rng = np.random.default_rng([self._cell.workload.seed, block, ARRIVAL_STREAM])
        async with asyncio.TaskGroup() as group:
            for due, item in zip(schedule.arrivals(self._cell.load, rng).tolist(), work, strict=False):
                await asyncio.sleep(max(0.0, due - state.clock()))
                group.create_task(state.converse(*item, due))

    def _unit(
        self,
        state: Block,
        block: int,
        started: float,
        gpu: dict[str, float],
        metrics: dict[str, float],
        misa: dict[str, float],
        notes: list[str],
    ) -> Unit:
        records = sorted(state.records, key=lambda r: (r.pair, r.turn))
        end = max((r.done or r.dispatched for r in records), default=0.0)
        start = min((r.dispatched for r in records), default=0.0)
        window = max(end - start, 1e-9)
        streamed = sum(count for at, count in state.tokens if start <= at <= end)
        figures = summarize(records, window, streamed, self._slo)
        figures |= _server_figures(metrics)
        health = state.watch.figures()
        return Unit(
            arm=self._arm.name,
            cell=self._cell.digest(),
            label=self._cell.label,
            block=block,
            started=started,
            figures=figures,
            errors=error_classes(records),
            client=health,
            gpu=gpu,
            metrics=metrics,
            misa=misa,
            problems=tuple(self._problems(records, health, misa)),
            notes=(*notes, *self._remarks(figures)),
            records=tuple(r.model_copy(update={"detail": self._keys.erase(r.detail)}) for r in records),
        )

    def _problems(self, records: list[Record], health: dict[str, float], misa: dict[str, float]) -> Iterator[str]:
        connection, expect = self._connection, self._arm.expect
        for name in ("loop_lag_p99", "dispatch_delay_p99"):
            if health[name] > connection.max_lag_s:
                yield (
                    f"the client was saturated: {name} was {1e3 * health[name]:.0f} ms, at most "
                    f"{1e3 * connection.max_lag_s:.0f} ms may be (--max-lag-s)"
                )
        if health["client_cpu_share"] > connection.max_cpu_share:
            yield f"the client was saturated: it used {health['client_cpu_share']:.0%} of one CPU (--max-cpu-share)"
        if not any(r.good for r in records):
            yield "no request succeeded"
        if expect and expect not in STOCK and not routed(misa):
            yield (
                f"{expect} did not run: the server counted no routed indexer call in this block "
                "(prompts below its min_len get stock selection)"
            )

    def _remarks(self, figures: dict[str, float]) -> Iterator[str]:
        page = self._control.page_size
        if figures.get("cached_error_max", 0) > page + LEAD:
            yield (
                f"prefix hits differ from the plan: {figures['cached_share']:.1%} of the prompt tokens were cached, "
                f"{figures['cached_wanted_share']:.1%} were meant to be"
            )
        if self._cell.workload.shared_prefix and "cached_share" not in figures:
            yield "prefix hits are not verified: the server reports no cached_tokens (SGLang: --enable-cache-report)"
        if figures.get("prompt_error_max", 0) > 0:
            yield f"the server counted up to {figures['prompt_error_max']:.0f} prompt tokens more or fewer than asked"
        if self._cell.workload.ignore_eos and figures.get("short_outputs"):
            yield f"{figures['short_outputs']:.0f} answers were shorter than asked"
        if figures.get("inexact_itl"):
            yield "the stream does not count tokens: ITL spreads the final total evenly over the chunks"


def _changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Counters that grew."""
    return {name: after[name] - before.get(name, 0.0) for name in after if after[name] - before.get(name, 0.0) > 0}


def _server_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The queue's and the prefill's part of the latency, and the hit rate, by the server's own counters."""

    def total(name: str, **labels: str) -> float:
        wanted = [f'{k}="{v}"' for k, v in labels.items()]
        return sum(v for k, v in metrics.items() if k.split("{")[0] == name and all(w in k for w in wanted))

    figures = {}
    if queued := total("sglang:queue_time_seconds_count"):
        figures["server_queue_s_mean"] = total("sglang:queue_time_seconds_sum") / queued
    stage = "sglang:per_stage_req_latency_seconds"
    if count := total(f"{stage}_count", stage="prefill_forward"):
        figures["server_prefill_s_mean"] = total(f"{stage}_sum", stage="prefill_forward") / count
    if prompt := total("sglang:prompt_tokens_total"):
        figures["server_cached_share"] = total("sglang:cached_tokens_total") / prompt
    if retracted := total("sglang:num_retracted_requests_total"):
        figures["server_retractions"] = retracted
    return figures
