"""Checks of a plan before the first request: mistakes that would otherwise be noticed after hours, or never."""

from __future__ import annotations

import resource
import ssl
import sys

from sglang_misa.bench.load import dataset, gates, selection, trace
from sglang_misa.bench.load.plan import Cell, Plan
from sglang_misa.bench.load.prepare import check_size
from sglang_misa.bench.load.prompts import check_text
from sglang_misa.bench.load.records import check_compared
from sglang_misa.bench.load.safety import check_target
from sglang_misa.bench.load.servers import launch_words
from sglang_misa.bench.load.settings import Load, LoadError, Workload
from sglang_misa.config import PRESETS
from sglang_misa.validation import suggest

DAY_S = 86400.0
LONGEST_S = 7 * DAY_S  # of a block without --duration-s
OTHER_FILES = 64  # open ones of a process that are no connections of clients


def check_plan(plan: Plan) -> None:
    """Raise LoadError for what would be noticed only after hours of measuring."""
    check_compared(plan.primary)
    gates.check(plan.fail_if, ratios=len(plan.arms) == 2 and plan.search is None)
    labels = [cell.label for cell in plan.cells]
    if len({cell.digest() for cell in plan.cells}) < len(labels):  # its blocks would count twice
        raise LoadError(f"cells: expected each context and load once, got {', '.join(labels)}; drop one")
    check_arms(plan)
    room = _connections()
    for cell in plan.cells:
        if cell.load.arrival == "closed" and -(-cell.load.concurrency // plan.bounds.workers) > room:
            raise LoadError(
                f"concurrency: expected at most {room} clients a process (`ulimit -n`), got {cell.load.concurrency}; "
                "raise the limit, or use --workers"
            )
        check_text(cell.workload)
        if cell.workload.content != cell.workload.content_now():
            raise LoadError("files: expected the text or data that the run began with, got another; take a new --out")
        _check_times(cell)
        if cell.workload.dataset is not None:
            dataset.read(cell.workload)
        check_size(cell)
    if plan.access.ca_file:
        try:
            ssl.create_default_context(cafile=plan.access.ca_file)
        except OSError as error:  # SSLError is one
            raise LoadError(
                f"ca_file: expected a PEM file, got {plan.access.ca_file} ({error}); name another"
            ) from None


def check_arms(plan: Plan) -> None:
    """Raise LoadError for an arm whose server or claim cannot be meant: the others would be measured first."""
    for arm in plan.arms:
        if arm.launched:
            launch_words(arm)
        else:
            check_target(arm.server, allow_remote=plan.access.allow_remote)
        if arm.expect is not None and not selection.known(arm.expect):
            names = sorted({*selection.STOCK, *PRESETS})
            raise LoadError(
                f"arm {arm.name}: expected {', '.join(names)} or a policy's name as its selection, got "
                f"{arm.expect!r}; correct it{suggest(arm.expect, names)}"
            )


def _check_times(cell: Cell) -> None:
    """Raise LoadError where the last request of an open loop would be waited for longer than anybody means to."""
    work, load = cell.workload, cell.load
    if work.trace is not None:
        last, way_out = trace.dues(work)[: load.asked][-1], "lower --time-scale, or give --duration-s or --requests"
    elif load.arrival != "closed":
        last, way_out = (load.asked or 0) / load.rate + (load.ramp_s or 0) / 2, "raise the rate, or give --duration-s"
    else:
        return
    if min(last, load.seconds) > LONGEST_S:
        most = f"{LONGEST_S / DAY_S:.0f} days"
        raise LoadError(f"{cell.label}: expected arrivals within {most}, got {last / DAY_S:.4g} of them; {way_out}")


def check_heeded(workload: Workload, load: Load) -> None:
    """Raise LoadError for an option that is given and that this work or load does not heed: nothing would tell."""
    in_turns = workload.workload == "agent" or ((workload.turns or 1) > 1 and not workload.recorded)
    traced = workload.trace is not None
    closed, opened = load.arrival == "closed" and not traced, load.arrival not in ("closed", "trace")
    wanted = {
        "rate": (opened, "--arrival poisson, constant or burst"),
        "burst": (load.arrival == "burst", "--arrival burst"),
        "concurrency": (closed, "a closed loop"),
        "cooldown": (closed, "a closed loop"),
        "ramp_s": (closed or opened, "no --trace with its own times"),
        "input_len": (not workload.recorded, "neither --trace nor --dataset"),
        "output_len": (not traced, "no --trace"),
        "turns": (not traced, "no --trace"),
        "turn_len": (in_turns, "--turns 2 or more, or --workload agent"),
        "pause_s": (in_turns, "--turns 2 or more, or --workload agent"),
        "prefix_groups": (workload.workload == "agent" or workload.shared_prefix > 0, "--shared-prefix"),
        "time_scale": (traced, "--trace"),
        "max_len": (workload.recorded, "--trace or --dataset"),
        "id_range": (workload.text == "ids", "--text ids"),
    }
    if load.arrival == "trace" and workload.trace is None:
        raise LoadError("arrival: expected --trace FILE beside --arrival trace, got none; add it")
    given, default = dict(workload) | dict(load), dict(Workload()) | dict(Load())
    for name, (heeded, what) in wanted.items():
        if given[name] != default[name] and not heeded:
            raise LoadError(
                f"{name}: expected {what} beside it, got {given[name]} without; drop it or change the other"
            )


def _connections() -> int:
    """How many connections a process may hold, once it is given all the open files that it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sys.maxsize if most == resource.RLIM_INFINITY else most - OTHER_FILES
