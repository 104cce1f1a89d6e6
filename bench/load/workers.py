"""Client processes of one block: each drives its share of the load, and one ledger collects the results.

The parent holds the conversations. A worker asks for more as its clients come free, so a closed loop stays one loop;
the requests of an open loop are dealt out before the start. All processes read one clock (CLOCK_MONOTONIC), and the
parent collects single requests, never figures.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from sglang_misa.bench.load.drive import Ledger, Route, Supply, Timing, Work, drive_block
from sglang_misa.bench.load.records import Record

START_S = 0.1  # between the word to start and the start, so that every worker has heard it
READY, MORE, FINISHED = "ready", "more", "finished"  # what a worker says at the desk where it is given work
LOW = 1  # conversations that a worker has ready when it asks for another one


class WorkerError(Exception):
    """A worker ended in the middle of a block: its requests are lost, and with them the block."""


@dataclass(frozen=True)
class Share:
    """What one worker is given; that many conversations to begin with, and spare ones, follow."""

    phase: str
    route: Route
    timing: Timing
    first: int
    spare: int


@dataclass(frozen=True)
class Sent:
    """What one worker brings in the end, beside its records."""

    tokens: list[tuple[float, int]]
    steps: list[tuple[float, int]]
    health: list[dict[str, float]]


class Crew:
    """As many processes as are asked for, at most one for each client or conversation. One sends from this process."""

    def __init__(self, workers: int, route: Route, ledger: Ledger, timing: Timing):
        self._count = max(1, min(workers, timing.at_once))
        self._route, self._ledger, self._timing = route, ledger, timing

    def drive(self, batches: Iterator[list[Work]], spare: list[Work]) -> None:
        """Send conversations of `batches`, and keep what came of them in the ledger. Raises WorkerError."""
        if self._count == 1:
            drive_block(self._route, self._ledger, self._timing, Supply(batches, self._timing.at_once), spare)
            return
        work, of = itertools.chain.from_iterable(batches), self._count
        wave = list(itertools.islice(work, self._timing.at_once))
        with ExitStack() as stack:
            workers = []
            for i in range(of):
                timing, first, extra = self._timing.share(i, of), wave[i::of], spare[i::of]
                share = Share(self._ledger.phase, self._route, timing, len(first), len(extra))
                workers.append(stack.enter_context(_Worker(f"worker {i + 1} of {of}", share)))
                for item in (*first, *extra):
                    workers[-1].give(item)
            del wave
            self._start(workers)
            self._serve(workers, work)
        self._ledger.health = [health for worker in workers for health in worker.health]

    def _start(self, workers: list[_Worker]) -> None:
        """Once all are ready, tell all when to start."""
        for worker in workers:
            worker.hear(worker.desk)
        self._ledger.start = time.perf_counter() + START_S
        for worker in workers:
            worker.give(self._ledger.start)

    def _serve(self, workers: list[_Worker], work: Iterator[Work]) -> None:
        """Give out work and take in news until every worker has brought everything."""
        desks: dict[Any, _Worker] = {worker.desk: worker for worker in workers}
        news: dict[Any, _Worker] = {worker.news: worker for worker in workers}
        waiting: list[_Worker] = []  # whose clients are done, for the clients of the others
        pipe: Any
        while news:
            for pipe in wait([*news, *desks]):
                if pipe in news:
                    said = news[pipe].hear(pipe)  # an end without a Sent before it is an error
                    if isinstance(said, Record):
                        self._ledger.add(said)
                    else:
                        self._close(news.pop(pipe), said)
                    continue
                worker = desks[pipe]
                try:
                    word = pipe.recv()
                except (EOFError, OSError):  # its news say whether it had finished
                    del desks[pipe]
                    continue
                if word == MORE:
                    worker.give(next(work, None))
                else:
                    waiting.append(worker)
            if waiting and len(waiting) == len(news):
                for worker in waiting:
                    worker.give(None)
                waiting.clear()

    def _close(self, worker: _Worker, sent: Sent) -> None:
        self._ledger.tokens += sent.tokens
        self._ledger.steps += sent.steps
        worker.health = sent.health


class _Worker:
    """One process, as its parent knows it: a desk at which it is given work, and the news that it sends."""

    def __init__(self, name: str, share: Share):
        # forked from a process without threads, for this one may have some
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.name = name
        self.health: list[dict[str, float]] = []
        self.desk, desk = context.Pipe()
        self.news, news = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=_work, args=(share, desk, news), daemon=True)
        self._process.start()
        desk.close()  # so that the end of the process is the end of its pipes
        news.close()

    def give(self, item: Work | float | None) -> None:
        try:
            self.desk.send(item)
        except OSError:
            raise self._ended() from None

    def hear(self, pipe: Connection) -> Any:
        """The next thing said. Raises WorkerError where the process has ended."""
        try:
            return pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> WorkerError:
        self._process.join()
        return WorkerError(f"{self.name} ended with exit code {self._process.exitcode}")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self.desk.close()
        self.news.close()


def _work(share: Share, desk: Connection, news: Connection) -> None:
    """The whole life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    first = [desk.recv() for _ in range(share.first)]
    spare = [desk.recv() for _ in range(share.spare)]
    desk.send(READY)
    start = desk.recv()
    ledger = Ledger(share.phase, None, lambda *said: news.send(said[-1]))

    asked = threading.Lock()  # for one answer at a time

    def ask(word: str) -> Any:
        with asked:
            desk.send(word)
            return desk.recv()

    more = ([item] for item in iter(partial(ask, MORE), None))

    async def others() -> None:
        await asyncio.to_thread(ask, FINISHED)

    drive_block(share.route, ledger, share.timing, Supply(itertools.chain([first], more), LOW), spare, others, start)
    news.send(Sent(ledger.tokens, ledger.steps, ledger.health))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
