"""Search for the highest load, for one arm or for two in turn, and its result."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from sglang_misa.bench.load import gates
from sglang_misa.bench.load.engine import Session, ordered
from sglang_misa.bench.load.figures import under
from sglang_misa.bench.load.plan import Arm, Cell, Plan
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.records import NO_SUCCESS, Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.search import Capacity, CapacityRatio, Step, at_level, capacity_ratio, find, judge_step
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.verdict import MIN_BLOCKS, Outcome, Tone, pool


class Found(NamedTuple):
    """What the searches of a plan brought; `plan` has a cell for each load that was tried."""

    plan: Plan
    units: list[Unit]
    capacities: list[Capacity]


class CapacitySearch:
    """The searches of one plan: in every context, `plan.blocks` times, each arm in turn."""

    def __init__(self, plan: Plan, store: Store, keys: Keys, live: Live):
        assert plan.search is not None
        self._plan, self._search, self._store, self._keys, self._live = plan, plan.search, store, keys, live
        self._units: list[Unit] = []
        self._cells: dict[str, Cell] = {}
        self._found: list[Capacity] = []

    def run(self) -> Found:
        with ExitStack() as together:
            sessions: dict[Arm, Session] = {}
            for number in range(self._plan.blocks):
                for arm in ordered(self._plan.arms, number):
                    with ExitStack() as alone:
                        stack = together if self._plan.mode == "together" else alone
                        for cell in self._plan.cells:
                            self._one(arm, cell, number, sessions, stack)
                    if self._plan.mode != "together":
                        sessions.clear()
        cells = tuple(sorted(self._cells.values(), key=lambda c: (c.workload.label, c.load.concurrency, c.load.rate)))
        return Found(self._plan.model_copy(update={"cells": cells}), self._units, self._found)

    def _one(self, arm: Arm, cell: Cell, number: int, sessions: dict[Arm, Session], stack: ExitStack) -> None:
        search = self._search

        def carries(level: float) -> Step:
            tried = at_level(cell, search.over, level)
            self._cells[tried.digest()] = tried
            units: list[Unit] = []
            for i in range(search.step_blocks):
                units.append(self._unit(arm, tried, number * search.step_blocks + i, sessions, stack))
                if step := judge_step(level, units, search.target, i + 1 == search.step_blocks):
                    break
            assert step is not None
            word = "carried" if step.carried else "failed"
            self._live.said(f"{arm.name} · {tried.label}: {step.kept} of {step.asked} inside the limits, {word}")
            return step

        before = [c.level for c in self._found if c.arm == arm.name and c.context == cell.workload.label and c.level]
        level, beyond, steps = find(carries, search.over, before[-1] if before else search.start, search.highest)
        self._found.append(
            Capacity(
                arm=arm.name,
                context=cell.workload.label,
                search=number,
                level=level,
                beyond=beyond,
                steps=tuple(steps),
            )
        )

    def _unit(self, arm: Arm, cell: Cell, block: int, sessions: dict[Arm, Session], stack: ExitStack) -> Unit:
        unit = self._store.find(arm, cell, block, self._plan.protocol)
        if unit is None:
            if arm not in sessions:
                sessions[arm] = stack.enter_context(Session(arm, self._plan, self._store, self._keys, self._live))
            unit = sessions[arm].measure(cell, block)
            self._store.save(unit, arm, cell, self._plan.protocol)
        unit = under(unit, self._plan.slo)
        self._live.finished(f"{unit.arm} · {unit.label} · block {unit.block + 1}")
        self._units.append(unit)
        return unit


def conclude(found: Found) -> Outcome:
    """Figures of every load that was tried, the capacities, and their ratio where there are two arms."""
    plan, units, capacities = found
    names = tuple(arm.name for arm in plan.arms)
    arms = tuple(
        pool(side, plan)
        for cell in plan.cells
        for name in names
        if (side := [u for u in units if u.arm == name and u.cell == cell.digest()])
    )
    ratios = tuple(_ratios(plan, names, capacities)) if len(names) == 2 else ()
    verdict, tone = _verdict(plan, names, capacities, ratios)
    problems = sorted({f"{a.arm} at {a.label}: {p}" for a in arms for p in a.problems})
    results = [
        gate.apply(a.label, a.figures, None) for gate in gates.gates_of(plan.fail_if, default=False) for a in arms
    ]
    return Outcome(
        names=names,
        arms=arms,
        ratios=(),
        mean=None,
        verdict=verdict,
        tone=tone,
        valid=not [p for p in problems if NO_SUCCESS not in p],
        gates=tuple(results),
        capacities=tuple(capacities),
        capacity_ratios=ratios,
    )


def _ratios(plan: Plan, names: tuple[str, ...], capacities: list[Capacity]) -> list[CapacityRatio]:
    found = []
    for context in dict.fromkeys(c.context for c in capacities):
        sides = [[c for c in capacities if c.arm == name and c.context == context] for name in names]
        b_first = [number % 2 == 1 for number in range(len(sides[0]))]
        if ratio := capacity_ratio(sides[0], sides[1], b_first, plan.confidence):
            found.append(ratio)
    return found


def _verdict(
    plan: Plan, names: tuple[str, ...], capacities: list[Capacity], ratios: tuple[CapacityRatio, ...]
) -> tuple[str, Tone]:
    assert plan.search is not None
    what = plan.search.over
    if len(names) == 1:
        told = [
            (f"a {what} of {c.level:g}" if c.level else f"no {what}")
            + f" at {c.context}"
            + (" (the highest tried)" if c.beyond is None else "")
            for c in capacities
        ]
        share = f"with {plan.search.target:.0%} of the requests inside the limits"
        return f"{names[0]} carries {', '.join(told)} {share}.", "neutral"
    if not ratios:
        way_out = "lower --start, raise --highest, or change the limits"
        return f"No verdict: in no context did both arms carry a {what} and fail a higher one; {way_out}.", "bad"
    level = f"{plan.confidence:.0%}"
    told = [
        f"{r.value:.2f}×"
        + (f" ({level} CI {r.low:.2f}–{r.high:.2f})" if r.low is not None else "")
        + f" at {r.context}"
        for r in ratios
    ]
    sentence = f"{names[1]} carries, of {names[0]}'s {what} inside the limits, {', '.join(told)}"
    if plan.blocks < MIN_BLOCKS:
        return f"{sentence}; {plan.blocks} search(es) give no verdict, use --blocks {MIN_BLOCKS + 1}.", "neutral"
    sure = [r for r in ratios if r.low is not None and r.high is not None and (r.low > 1 or r.high < 1)]
    tone: Tone = "neutral" if not sure else "good" if all(r.value > 1 for r in sure) else "bad"
    return f"{sentence}.", tone
