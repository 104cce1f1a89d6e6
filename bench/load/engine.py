"""Carries out a plan: A B A B over servers that run together, or one after the other where they do not fit at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.prompts import Source, source_of
from sglang_misa.bench.load.runner import Runner, Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.servers import running
from sglang_misa.bench.load.settings import Arm, Cell, Lengths, Plan
from sglang_misa.bench.load.store import Store

Step = tuple[Arm, Cell, int]


def execute(plan: Plan, store: Store, keys: Keys, live: Live) -> list[Unit]:
    """Measure every unit of `plan` that `store` does not hold, and give all of them back in the plan's order."""
    together = plan.mode == "together"
    groups = [list(_together(plan))] if together else list(_alternate(plan))
    units = []
    for steps in groups:
        found = {step: store.find(step[0], step[1], step[2], plan.connection) for step in steps}
        missing = [step for step in steps if found[step] is None]
        with ExitStack() as stack:
            arms = list(dict.fromkeys(step[0] for step in missing))
            sessions = {arm: _Session(arm, plan, store, keys, live, stack) for arm in arms}
            for arm, cell, block in steps:
                unit = found[arm, cell, block]
                if unit is None:
                    unit = sessions[arm].measure(cell, block)
                    store.save(unit, arm, cell, plan.connection)
                live.finished(_line(unit))
                units.append(unit)
    return units


def _together(plan: Plan) -> Iterator[Step]:
    for cell in plan.cells:
        for block in range(plan.blocks):
            for arm in plan.arms:
                yield arm, cell, block


def _alternate(plan: Plan) -> Iterator[list[Step]]:
    for block in range(plan.blocks):
        for arm in plan.arms:
            yield [(arm, cell, block) for cell in plan.cells]


class _Session:
    """One arm's server while it runs, with its prompt sources and the cells it is warm for."""

    def __init__(self, arm: Arm, plan: Plan, store: Store, keys: Keys, live: Live, stack: ExitStack):
        self._arm, self._plan, self._keys, self._live = arm, plan, keys, live
        waiting: Callable[[str, float], None] = partial(live.waiting, f"arm {arm.name}")
        self._control: Control = stack.enter_context(running(arm, plan.connection, keys, store.folder, waiting))
        self._sources: dict[tuple[str, int, tuple[int, int]], Source] = {}
        self._warm: set[Cell] = set()
        self._longest = max(Lengths.parse(c.workload.input_len).longest for c in plan.cells)

    def measure(self, cell: Cell, block: int) -> Unit:
        """One unit, after the warm-up that this server still needs for the cell."""
        work = cell.workload
        key = (work.text, work.seed, work.id_range)
        if key not in self._sources:
            self._sources[key] = source_of(work, self._longest, self._control.tokenize)
        blocks = f" · block {block + 1}/{self._plan.blocks}" if self._plan.blocks > 1 else ""
        self._live.unit(f"{self._arm.name} · {cell.label}{blocks}")
        runner = Runner(self._arm, cell, self._control, self._plan.connection, self._keys, self._plan.slo)
        unit = runner.measure(self._sources[key], block, self._live.request, warm=cell not in self._warm)
        self._warm.add(cell)
        return unit


def _line(unit: Unit) -> str:
    figures = unit.figures
    parts = [f"{unit.arm} · {unit.label} · block {unit.block + 1}:"]
    if "ttft_p50" in figures:
        parts.append(f"TTFT p50 {1e3 * figures['ttft_p50']:.1f} ms,")
    if "tpot_p50" in figures:
        parts.append(f"TPOT p50 {1e3 * figures['tpot_p50']:.2f} ms,")
    parts.append(f"{figures['output_throughput']:.1f} tok/s, {figures['errors']:.0f}/{figures['requests']:.0f} errors")
    return (
        " ".join(parts)
        + "".join(f"\n      INVALID: {p}" for p in unit.problems)
        + "".join(f"\n      note: {n}" for n in unit.notes)
    )
