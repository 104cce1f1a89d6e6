"""Execution of a plan: A B B A over servers that run together, or one server after the other."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial

from sglang_misa.bench.load.figures import under
from sglang_misa.bench.load.plan import Arm, Cell, Plan
from sglang_misa.bench.load.prepare import ServerGoneError
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.prompts import Source, source_of
from sglang_misa.bench.load.records import Unit
from sglang_misa.bench.load.runner import Runner
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.servers import ArmServer
from sglang_misa.bench.load.settings import Lengths, LoadError
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.verdict import SEQUENTIAL_BLOCKS, half_width

ATTEMPTS = 3  # at a block in which the server goes away


def execute(plan: Plan, store: Store, keys: Keys, live: Live) -> list[Unit]:
    """Measure every unit of `plan` that `store` does not hold, and give all of them back."""
    return _Execution(plan, store, keys, live).run()


def ordered(arms: tuple[Arm, ...], block: int) -> tuple[Arm, ...]:
    """A B in even blocks, B A in odd ones: a drift of the machine then hurts both arms alike."""
    return arms if block % 2 == 0 else arms[::-1]


class _Execution:
    """One plan under way: the units so far, and the servers that run."""

    def __init__(self, plan: Plan, store: Store, keys: Keys, live: Live):
        self._plan, self._store, self._keys, self._live = plan, store, keys, live
        self._units: list[Unit] = []
        self._sessions: dict[Arm, Session] = {}

    def run(self) -> list[Unit]:
        plan = self._plan
        if plan.mode == "together":
            with ExitStack() as stack:
                for cell in plan.cells:
                    for block in range(plan.most_blocks):
                        if self._settled(cell, block):
                            break
                        for arm in ordered(plan.arms, block):
                            self._step(arm, cell, block, plan.arms, stack)
            return self._units
        for block in range(plan.most_blocks):
            cells = [cell for cell in plan.cells if not self._settled(cell, block)]
            # a server for each block and arm, also where two neighbours are the same arm: blocks must not share one
            for arm in ordered(plan.arms, block):
                with ExitStack() as stack:
                    for cell in cells:
                        self._step(arm, cell, block, (arm,), stack)
                self._sessions.clear()
        return self._units

    def _settled(self, cell: Cell, block: int) -> bool:
        """Whether `cell` has enough blocks: those that are asked for, and then until its interval is narrow."""
        until = self._plan.until_ci
        if until is None or block < max(self._plan.blocks, SEQUENTIAL_BLOCKS):
            return False
        width = half_width(self._plan, [u for u in self._units if u.cell == cell.digest()])
        return width is not None and width <= until

    def _step(self, arm: Arm, cell: Cell, block: int, side_by_side: tuple[Arm, ...], stack: ExitStack) -> None:
        """One unit, from the store or measured; the first that is measured starts the servers of `side_by_side`."""
        unit = self._store.find(arm, cell, block, self._plan.protocol)
        if unit is None:
            if not self._sessions:
                for other in side_by_side:
                    session = Session(other, self._plan, self._store, self._keys, self._live)
                    self._sessions[other] = stack.enter_context(session)
            unit = self._sessions[arm].measure(cell, block)
            self._store.save(unit, arm, cell, self._plan.protocol)
        unit = under(unit, self._plan.slo)
        self._live.finished(_line(unit))
        self._units.append(unit)


class Session:
    """One arm's server while it runs, with its prompt sources and the runners that are warm."""

    def __init__(self, arm: Arm, plan: Plan, store: Store, keys: Keys, live: Live):
        self._arm, self._plan, self._keys, self._live = arm, plan, keys, live
        self._server = ArmServer(arm, plan, keys, store.folder, partial(live.waiting, f"arm {arm.name}"))
        self._sources: dict[tuple[str, int, tuple[int, int]], Source] = {}
        self._runners: dict[Cell, Runner] = {}
        self._longest = max(Lengths.parse(c.workload.input_len).longest for c in plan.cells)

    def __enter__(self) -> Session:
        self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def measure(self, cell: Cell, block: int) -> Unit:
        """One unit; measured again, after the server is back, where it went away in the middle."""
        blocks = f" · block {block + 1}/{self._plan.blocks}" if self._plan.blocks > 1 else ""
        self._live.unit(f"{self._arm.name} · {cell.label}{blocks}")
        for attempt in range(ATTEMPTS):
            with suppress(ServerGoneError):
                unit = self._runner(cell).measure(self._source(cell), block, self._live.request)
                again = (f"the server went away in this block; it was measured again ({attempt + 1} attempts)",)
                return unit.model_copy(update={"notes": (*unit.notes, *again)}) if attempt else unit
            self._live.said(f"arm {self._arm.name}: the server went away; block {block + 1} is measured again")
            self._server.recover()  # not while the error is handled: it would be the context of what is told then
            self._runners.clear()
        raise LoadError(
            f"arm {self._arm.name}: expected a server that stays, got one that went away in {ATTEMPTS} attempts "
            f"at block {block + 1} of {cell.label}; what was measured is kept: mend it and `resume`"
        )

    def _runner(self, cell: Cell) -> Runner:
        if cell not in self._runners:
            self._runners[cell] = Runner(self._arm, cell, self._server.control, self._plan, self._keys)
        return self._runners[cell]

    def _source(self, cell: Cell) -> Source:
        work = cell.workload
        key = (work.text, work.seed, work.id_range)
        if key not in self._sources:
            self._sources[key] = source_of(work, self._longest, self._server.control.tokenize)
        return self._sources[key]


def _line(unit: Unit) -> str:
    figures = unit.figures
    parts = [f"{unit.arm} · {unit.label} · block {unit.block + 1}:"]
    if "ttft_p50" in figures:
        parts.append(f"TTFT p50 {1e3 * figures['ttft_p50']:.1f} ms,")
    if "tpot_p50" in figures:
        parts.append(f"TPOT p50 {1e3 * figures['tpot_p50']:.2f} ms,")
    if "output_throughput" in figures:
        parts.append(f"{figures['output_throughput']:.1f} tok/s,")
    parts.append(f"{figures['errors']:.0f}/{figures['requests']:.0f} errors")
    told = [f"INVALID: {p}" for p in unit.problems]
    told += [f"error {kind} × {unit.errors[kind]}: {why}" for kind, why in unit.reasons.items()]
    told += [f"note: {n}" for n in unit.notes]
    return " ".join(parts) + "".join(f"\n      {line}" for line in told)
