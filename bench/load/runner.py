"""Measurement of one block of one arm in one cell: prepare, drive, assemble."""

from __future__ import annotations

from sglang_misa.bench.load import schedule, selection
from sglang_misa.bench.load.assemble import Assembler, Measured, Snapshot
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.dialogue import Encoder
from sglang_misa.bench.load.drive import Ledger, Notice, Route, Timing
from sglang_misa.bench.load.plan import Arm, Cell, Plan
from sglang_misa.bench.load.prepare import Preparation, Prepared, ServerGoneError
from sglang_misa.bench.load.prompts import Source
from sglang_misa.bench.load.records import Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Lengths, LoadError
from sglang_misa.bench.load.watch import GpuWatch, ServerWatch
from sglang_misa.bench.load.workers import Crew, WorkerError

NO_METRICS = "the server has no /metrics (SGLang: --enable-metrics): nothing is told of its queue, prefill and cache"
ENOUGH_WAVES = 2  # requests for each client from which on the clients start apart


class Runner:
    """Measures blocks of one cell on one server."""

    def __init__(self, arm: Arm, cell: Cell, control: Control, plan: Plan, keys: Keys):
        self._arm, self._cell, self._control, self._plan, self._keys = arm, cell, control, plan, keys
        self._encoder = Encoder(control, plan.protocol, cell.workload)
        self._request_s: float | None = None  # seconds of one request of a warm server

    def measure(self, source: Source, block: int, notice: Notice) -> Unit:
        """One block, after a warm-up the first time. Raises LoadError, and ServerGoneError."""
        before = Snapshot.of(self._control)
        if self._arm.expect and (problem := selection.problem(self._arm.expect, before.info)):
            if not self._control.healthy():
                raise ServerGoneError
            raise LoadError(
                f"arm {self._arm.name}: {problem}; start it with that selection, or correct what is expected"
            )
        plan, control = self._plan, self._control
        headers = self._keys.headers()
        route = Route(control.url, plan.protocol.api, plan.bounds, headers, plan.access.ca_file, control.page_size)
        preparation = Preparation(self._cell, self._encoder, route, plan.serving.flush)
        try:
            if self._request_s is None:
                self._request_s = preparation.warm_up(source, block, notice)
            prepared = preparation.block(source, block, notice)
        except LoadError as error:
            raise LoadError(f"arm {self._arm.name}: {self._keys.erase(str(error))}") from None
        before = Snapshot.of(control)
        timing = self._timing(prepared)
        ledger = Ledger("measure", prepared.total, notice, steady=timing.steady)
        crew = Crew(plan.bounds.workers, route, ledger, timing)
        gauges = Control(control.url, plan.access, self._keys).gauges  # a session of its own, for another thread
        period = plan.bounds.sample_s if control.has_metrics else 0.0
        with GpuWatch(local=control.local) as gpu, ServerWatch(gauges, period) as server:
            try:
                crew.drive(prepared.batches, prepared.spare)
            except WorkerError as error:
                raise LoadError(
                    f"arm {self._arm.name}: expected client processes that stay, got {error} in block {block + 1}; "
                    "what was measured before is kept: `resume`"
                ) from None
        if control.healthy():
            control.wait_idle()
        series = {**server.series(ledger.start), **gpu.series(ledger.start)}
        notes = prepared.notes if control.has_metrics else [*prepared.notes, NO_METRICS]
        measured = Measured(block, ledger, before, Snapshot.of(control), gpu.figures(), series, notes)
        if measured.went_away or not control.healthy():
            raise ServerGoneError
        return Assembler(self._arm, self._cell, plan.bounds, plan.slo, control.page_size, self._keys).unit(measured)

    def _timing(self, prepared: Prepared) -> Timing:
        """Clients start spread over one request's time: together they would stay in step, and each request would meet
        the others in the same phase."""
        load, starts = self._cell.load, []
        if load.arrival == "closed":
            waves = (load.asked or ENOUGH_WAVES * load.concurrency) / load.concurrency
            apart = (self._request_s or 0.0) if waves >= ENOUGH_WAVES else 0.0
            starts = schedule.client_starts(load, apart)
        return Timing(tuple(starts), prepared.dues, load.seconds, self._hard_stop())

    def _hard_stop(self) -> float | None:
        """Seconds after which whatever is in flight hangs; None where no duration bounds the load."""
        load, shape = self._cell.load, self._cell.workload
        if load.duration_s is None:
            return None
        lengths = (shape.input_len, shape.output_len, shape.turn_len or "1")
        longest, turns = sum(Lengths.parse(text).longest for text in lengths), shape.turns or 1
        return load.duration_s + turns * (self._plan.bounds.request(longest * turns) + 10 * (shape.pause_s or 0.0))
