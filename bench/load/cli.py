"""Command line: run · sweep · ab · max · resume · compare."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

from sglang_misa.bench.load import report, shell
from sglang_misa.bench.load.capacity import CapacitySearch, conclude
from sglang_misa.bench.load.checks import check_heeded, check_plan
from sglang_misa.bench.load.comparison import comparison
from sglang_misa.bench.load.engine import execute
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.plan import Arm, Cell, Plan, Search, Slo
from sglang_misa.bench.load.progress import Live
from sglang_misa.bench.load.records import Unit, title
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import (
    Access,
    Bounds,
    Load,
    LoadError,
    Price,
    Protocol,
    Serving,
    Workload,
    changed,
)
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.verdict import Outcome, judge


@dataclass(frozen=True)
class Common:
    """Options of every measurement."""

    workload: tyro.conf.OmitArgPrefixes[Workload] = field(default_factory=Workload)
    load: tyro.conf.OmitArgPrefixes[Load] = field(default_factory=Load)
    protocol: tyro.conf.OmitArgPrefixes[Protocol] = field(default_factory=Protocol)
    access: tyro.conf.OmitArgPrefixes[Access] = field(default_factory=Access)
    serving: tyro.conf.OmitArgPrefixes[Serving] = field(default_factory=Serving)
    bounds: tyro.conf.OmitArgPrefixes[Bounds] = field(default_factory=Bounds)
    price: tyro.conf.OmitArgPrefixes[Price] = field(default_factory=Price)
    out: Path | None = None
    """folder of the artefacts; units found there are not measured again; default: load-DATE-TIME"""
    slo: Path | None = None
    """TOML or JSON file with limits in seconds: ttft, tpot, itl_max, e2e"""
    fail_if: tuple[str, ...] = ()
    """gates such as "ttft_p50 > 2.0" (in `ab` a ratio: "ttft_p50 > 1.02"); one that holds ends with code 1"""
    until_ci: float | None = None
    """go on with more blocks until the interval of the primary figure is this narrow, 0.02 = ±2 %, in every cell"""
    max_blocks: int = 40
    """with --until-ci, blocks of a cell at most"""
    confidence: float = 0.95
    """level of the intervals"""
    primary: str = "ttft_p50"
    """figure of the verdict and of --until-ci"""


@dataclass(frozen=True)
class Grid:
    """Cells of a sweep. What is left out comes from --input-len, --concurrency or --rate."""

    contexts: tuple[str, ...] = ()
    """prompt lengths: 32k 64k 128k"""
    concurrencies: tuple[int, ...] = ()
    """clients of a closed loop: 1 4 16"""
    rates: tuple[float, ...] = ()
    """requests a second of an open loop"""

    def cells(self, common: Common) -> tuple[Cell, ...]:
        """Every context with every load level. Raises LoadError."""
        load = common.load
        if self.rates and self.concurrencies:
            raise LoadError("rates: expected --rates or --concurrencies, got both; drop one")
        if self.rates and load.arrival == "closed":
            raise LoadError(
                "rates: expected an open loop, got --arrival closed; add --arrival poisson, constant or burst"
            )
        if self.concurrencies and load.arrival != "closed":
            raise LoadError(f"concurrencies: expected --arrival closed, got {load.arrival}; give --rates")
        check_heeded(common.workload, load)
        if common.workload.trace is not None and self.concurrencies:
            raise LoadError("concurrencies: expected no --trace, which has its own times, got one; drop one")
        if self.contexts and common.workload.recorded:
            raise LoadError("contexts: expected neither --trace nor --dataset, which have lengths, got one; drop one")
        loads = [changed(load, concurrency=n) for n in self.concurrencies]
        loads += [changed(load, rate=r) for r in self.rates]
        loads = loads or [load]
        shapes = [changed(common.workload, input_len=c) for c in self.contexts] or [common.workload]
        return tuple(Cell.of(shape, load) for shape in shapes for load in loads)


@dataclass(frozen=True)
class Run(Common):
    """Measure one server under one load."""

    server: tyro.conf.Positional[str] = "http://127.0.0.1:30000"
    """URL, or the command that launches the server (with --port N or --port {port})"""
    expect: str | None = None
    """token selection that must be running: off, dsa, misa, misa-hier, hisa …"""
    blocks: int = 1
    """how often each cell is measured, every time with other prompts"""


@dataclass(frozen=True)
class Sweep(Common):
    """Measure one server over a grid of contexts and loads."""

    server: tyro.conf.Positional[str] = "http://127.0.0.1:30000"
    """URL, or the command that launches the server (with --port N or --port {port})"""
    expect: str | None = None
    """token selection that must be running: off, dsa, misa, misa-hier, hisa …"""
    blocks: int = 1
    """how often each cell is measured, every time with other prompts"""
    grid: tyro.conf.OmitArgPrefixes[Grid] = field(default_factory=Grid)


@dataclass(frozen=True)
class Ab(Common):
    """Compare two servers, interleaved A B B A, with ratios by block and a verdict."""

    a: str = "http://127.0.0.1:30000"
    """URL or launch command of arm A, the baseline"""
    b: str = "http://127.0.0.1:30001"
    """URL or launch command of arm B"""
    names: tuple[str, str] = ("A", "B")
    """what to call the arms"""
    a_expect: str | None = None
    """token selection that must be running in A: off, dsa, misa, misa-hier, hisa …"""
    b_expect: str | None = None
    """token selection that must be running in B"""
    ab_mode: Literal["together", "alternate"] = "together"
    """together = both servers run all the time; alternate = start A, measure, stop, start B …, for one GPU"""
    blocks: int = 6
    """blocks, A first in one and B in the next; a verdict needs five"""
    grid: tyro.conf.OmitArgPrefixes[Grid] = field(default_factory=Grid)


@dataclass(frozen=True)
class Max(Common):
    """Find the highest load inside the service limits (--slo), for one server or for two of them in turns."""

    server: tyro.conf.Positional[str] = "http://127.0.0.1:30000"
    """URL, or the command that launches the server (with --port N or --port {port})"""
    expect: str | None = None
    """token selection that must be running: off, dsa, misa, misa-hier, hisa …"""
    against: str | None = None
    """URL or launch command of a second server, whose capacity is given as a ratio to the first one's"""
    against_expect: str | None = None
    """token selection that must be running in the second server"""
    names: tuple[str, str] = ("A", "B")
    """what to call the two"""
    ab_mode: Literal["together", "alternate"] = "together"
    """together = both servers run all the time; alternate = one after the other, for one GPU"""
    search: tyro.conf.OmitArgPrefixes[Search] = field(default_factory=Search)
    blocks: int | None = None
    """searches of each server, with other prompts; default: 1, and 6 for two servers"""
    contexts: tuple[str, ...] = ()
    """prompt lengths: 32k 64k 128k"""


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted run: what was measured is kept."""

    folder: tyro.conf.Positional[Path]
    """folder of the run"""


@dataclass(frozen=True)
class Compare:
    """Compare two earlier runs of the same cells. They were not interleaved: drift counts as difference."""

    first: tyro.conf.Positional[Path]
    """folder of the baseline"""
    second: tyro.conf.Positional[Path]
    """folder of the other run"""
    arms: tuple[str, str] | None = None
    """which arm of each folder; default: its last"""
    out: Path = Path("compare")
    """folder of the artefacts"""
    fail_if: tuple[str, ...] = ()
    """gates over the ratios"""
    primary: str = "ttft_p50"
    """figure of the verdict"""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Ab, tyro.conf.subcommand("ab")]
    | Annotated[Max, tyro.conf.subcommand("max")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a gate failed, 2 cannot be done as asked, 3 the figures are invalid, 130 interrupted."""

    def act(command: Any, console: Console) -> int:
        return _compare(command, console) if isinstance(command, Compare) else _measure(command, arguments, console)

    return shell.run(Command, act, "sglang_misa.bench.load", arguments, "`resume` goes on with what is missing")


def plan_of(command: Run | Sweep | Ab | Max) -> Plan:
    """The plan that a command line asks for. Raises LoadError."""
    arms = _arms(command)
    if isinstance(command, Max):
        _check_search(command)
        grid = Grid(contexts=command.contexts)
    else:
        grid = Grid() if isinstance(command, Run) else command.grid
    return Plan(
        arms=arms,
        cells=grid.cells(command),
        blocks=command.blocks if command.blocks is not None else 6 if len(arms) == 2 else 1,
        mode=command.ab_mode if isinstance(command, Ab | Max) else "together",
        search=command.search if isinstance(command, Max) else None,
        protocol=command.protocol,
        access=command.access,
        serving=command.serving,
        bounds=command.bounds,
        price=command.price,
        slo=None if command.slo is None else Slo.read(command.slo),
        fail_if=command.fail_if,
        primary=command.primary,
        until_ci=command.until_ci,
        max_blocks=command.max_blocks,
        confidence=command.confidence,
    )


def _arms(command: Run | Sweep | Ab | Max) -> tuple[Arm, ...]:
    if isinstance(command, Ab):
        names, pair = command.names, ((command.a, command.a_expect), (command.b, command.b_expect))
    elif isinstance(command, Max) and command.against is not None:
        pair = (command.server, command.expect), (command.against, command.against_expect)
        names = command.names
    else:
        return (Arm(name="server", server=command.server, expect=command.expect),)
    if names[0] == names[1]:
        raise LoadError(f"names: expected two different names, got {names[0]} twice; change one")
    return tuple(
        Arm(name=name, server=server, expect=expect) for name, (server, expect) in zip(names, pair, strict=True)
    )


def _check_search(command: Max) -> None:
    """Raise LoadError for a load that cannot grow as the search would have it, or a search without limits."""
    over, load = command.search.over, command.load
    if over == "rate" and load.arrival == "closed":
        raise LoadError("over: expected an open loop with --over rate, got --arrival closed; add --arrival poisson")
    if over == "concurrency" and load.arrival != "closed":
        raise LoadError("over: expected a closed loop, got an open one; add --over rate")
    if command.slo is None:
        raise LoadError("max: expected service limits, got none; give --slo FILE")
    if command.until_ci is not None:
        raise LoadError("until_ci: expected `run`, `sweep` or `ab`, got `max`; give --blocks")
    if getattr(load, over) != getattr(Load(), over):
        raise LoadError(f"{over}: expected --start, the load to begin with, got another; drop it")
    if command.workload.trace is not None:
        raise LoadError("max: expected a load that can grow, got --trace with its own times; drop it")


def _measure(command: Run | Sweep | Ab | Max | Resume, arguments: list[str] | None, console: Console) -> int:
    if isinstance(command, Resume):
        plan, folder = Store.plan_in(command.folder), command.folder
    else:
        plan = plan_of(command)
        folder = command.out or Path(f"load-{datetime.now():%Y%m%d-%H%M%S}")
    check_plan(plan)
    keys = Keys.read(plan.access)
    with Store(folder, keys) as store:
        store.begin(plan, Environment.now(sys.argv[1:] if arguments is None else arguments, keys))
        with Live(console, len(plan.cells) * plan.blocks * len(plan.arms)) as live:
            if plan.search is None:
                units = execute(plan, store, keys, live)
                outcome = judge(plan, units)
            else:
                found = CapacitySearch(plan, store, keys, live).run()
                plan, units, outcome = found.plan, found.units, conclude(found)
        return _conclude(plan, units, outcome, store, keys, console)


def _conclude(plan: Plan, units: list[Unit], outcome: Outcome, store: Store, keys: Keys, console: Console) -> int:
    path = report.write(plan, units, outcome, store, keys, store.environment())
    _show(outcome, console)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return (
        shell.INVALID if not outcome.valid else shell.GATE_FAILED if any(g.failed for g in outcome.gates) else shell.OK
    )


def _show(outcome: Outcome, console: Console) -> None:
    table = Table(
        Column("cell", no_wrap=True),
        "arm",
        "TTFT p50",
        "TTFT p90",
        "TPOT p50",
        "ITL p90",
        "out tok/s",
        "errors",
        box=None,
    )
    for arm in outcome.arms:
        cells = [
            f"{1e3 * v:.2f} ms" if (v := arm.figures.get(n)) is not None else "–"
            for n in ("ttft_p50", "ttft_p90", "tpot_p50", "itl_p90")
        ]
        rate = arm.figures.get("output_throughput")
        table.add_row(
            arm.label, arm.arm, *cells, "–" if rate is None else f"{rate:.1f}", f"{arm.figures['error_rate']:.1%}"
        )
    console.print(table)
    for arm in outcome.arms:
        for kind, count in arm.errors.items():
            why = f"{arm.arm} at {arm.label}: {count} × {kind}: {arm.reasons.get(kind, '')}"
            console.print(why, style="red", highlight=False)
        if wrong := arm.figures.get("needle_wrong"):
            told = f"{arm.arm} at {arm.label}: {wrong:.1%} of {arm.figures['needles']:.0f} needles are wrong"
            console.print(told, style="red", highlight=False)
    for cell in outcome.ratios:
        shown = [
            f"{title(r.metric)} {r.value:.3f}" + (f" [{r.low:.3f}, {r.high:.3f}]" if r.low is not None else "")
            for r in cell.ratios
            if r.metric.endswith("p50")
        ]
        console.print(f"{cell.label}: ratio {outcome.names[1]}/{outcome.names[0]}: " + " · ".join(shown))
    for gate in outcome.gates:
        value = "not measured" if gate.value is None else f"{gate.value:.4g}"
        console.print(f"gate {'FAILED' if gate.failed else 'passed'}: {gate.gate} at {gate.label}: {value}")
    console.print(outcome.verdict, style="bold", highlight=False)


def _compare(command: Compare, console: Console) -> int:
    folders = (command.first, command.second)
    plan, units = comparison(folders, command.arms, command.out, command.fail_if, command.primary)
    with Store(command.out, Keys()) as store:
        return _conclude(plan, units, judge(plan, units), store, Keys(), console)
