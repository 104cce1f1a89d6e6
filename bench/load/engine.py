"""Carries out a plan: A B B A over servers that run together, or one after the other where they do not fit at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.prompts import Source, source_of
from sglang_misa.bench.load.records import Unit
from sglang_misa.bench.load.runner import Runner, ServerGoneError
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.servers import ArmServer
from sglang_misa.bench.load.settings import Arm, Cell, Lengths, LoadError, Plan
from sglang_misa.bench.load.store import Store

Step = tuple[Arm, Cell, int]
ATTEMPTS = 3  # at a block in which the server goes away


def execute(plan: Plan, store: Store, keys: Keys, live: Live) -> list[Unit]:
    """Measure every unit of `plan` that `store` does not hold, and give all of them back in the plan's order."""
    groups = [list(_together(plan))] if plan.mode == "together" else list(_alternate(plan))
    units = []
    for steps in groups:
        found = {step: store.find(step[0], step[1], step[2], plan.protocol) for step in steps}
        missing = [step for step in steps if found[step] is None]
        with ExitStack() as stack:
            sessions = {
                arm: stack.enter_context(_Session(arm, plan, store, keys, live))
                for arm in dict.fromkeys(step[0] for step in missing)
            }
            for arm, cell, block in steps:
                unit = found[arm, cell, block]
                if unit is None:
                    unit = sessions[arm].measure(cell, block)
                    store.save(unit, arm, cell, plan.protocol)
                live.finished(_line(unit))
                units.append(unit)
    return units


def ordered(arms: tuple[Arm, ...], block: int) -> tuple[Arm, ...]:
    """A B in even blocks, B A in odd ones: a drift of the machine then hurts both arms alike."""
    return arms if block % 2 == 0 else arms[::-1]


def _together(plan: Plan) -> Iterator[Step]:
    for cell in plan.cells:
        for block in range(plan.blocks):
            for arm in ordered(plan.arms, block):
                yield arm, cell, block


def _alternate(plan: Plan) -> Iterator[list[Step]]:
    """A server for each block and arm, also where two neighbours are the same arm: blocks must not share a process."""
    for block in range(plan.blocks):
        for arm in ordered(plan.arms, block):
            yield [(arm, cell, block) for cell in plan.cells]


class _Session:
    """One arm's server while it runs, with its prompt sources and the runners that are warm."""

    def __init__(self, arm: Arm, plan: Plan, store: Store, keys: Keys, live: Live):
        self._arm, self._plan, self._keys, self._live = arm, plan, keys, live
        self._server = ArmServer(arm, plan, keys, store.folder, partial(live.waiting, f"arm {arm.name}"))
        self._sources: dict[tuple[str, int, tuple[int, int]], Source] = {}
        self._runners: dict[Cell, Runner] = {}
        self._longest = max(Lengths.parse(c.workload.input_len).longest for c in plan.cells)

    def __enter__(self) -> _Session:
        self._server.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def measure(self, cell: Cell, block: int) -> Unit:
        """One unit; measured again, after the server is back, where it went away in the middle."""
        blocks = f" · block {block + 1}/{self._plan.blocks}" if self._plan.blocks > 1 else ""
        self._live.unit(f"{self._arm.name} · {cell.label}{blocks}")
        for attempt in range(ATTEMPTS):
            try:
                unit = self._runner(cell).measure(self._source(cell), block, self._live.request)
            except ServerGoneError:
                self._live.said(f"arm {self._arm.name}: the server went away; block {block + 1} is measured again")
                self._server.recover()
                self._runners.clear()
                continue
            again = (f"the server went away in this block; it was measured again ({attempt + 1} attempts)",)
            return unit.model_copy(update={"notes": (*unit.notes, *again)}) if attempt else unit
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
