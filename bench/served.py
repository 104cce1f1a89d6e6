"""Rows of one_rank.csv from finished `bench.load ab` runs against servers of `bench.one_rank`.

    python -m sglang_misa.bench.served FOLDER... [--csv bench/results/one_rank.csv] [--gpu NAME] [--commit ID]

Each folder compares stock (`--a-expect dsa`) with one preset (`--b-expect fast`); an arm is called by what was expected
of its server, and found there. A row is one block of one arm: the medians of its requests. GPU, SGLang, layers and
commit are the artefacts' word; --gpu and --commit are for those that lack it. Nothing is written unless every unit is
there and valid, and every request of every folder was answered as asked: exit status 2 says how many were not.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from sglang_misa.arguments import file_to_write
from sglang_misa.bench import one_rank
from sglang_misa.bench.load.figures import figure
from sglang_misa.bench.load.plan import Arm, Cell
from sglang_misa.bench.load.records import Record, Unit
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.selection import STOCK as STOCK_NAMES
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.stats import Estimate, block_ratio, geometric_mean
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.workload import LEAD
from sglang_misa.bench.table import Table, append, environment
from sglang_misa.config import PRESETS
from sglang_misa.decode_gate import Step

STOCK = "stock"
CONFIDENCE = 0.95
K = 1024


@dataclass(frozen=True)
class Row:
    """One block of one arm in one cell. Tokens and seconds are medians of its requests."""

    gpu: str
    sglang: str
    ranks: int  # of the eight that share the model
    layers: int
    workload: str  # cold, or cached: new tokens over a prefix that the cache holds
    cell: str  # the load in words
    clients: int
    arm: str  # stock, or the preset
    run: str  # when its `ab` began, UTC: ours is compared with the stock of its own run
    block: int
    started: float  # Unix time
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float | None  # None for a single token
    e2e_s: float
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Comparison:
    """Stock beside one preset in one cell, over the blocks of one run."""

    stock: Sequence[Row]
    ours: Sequence[Row]

    def times(self, column: str) -> tuple[float, float, Estimate] | None:
        """Stock's and our seconds, geometric means over blocks, and stock's over ours; None where a block has none."""
        a, b = ([getattr(row, column) for row in side] for side in (self.ours, self.stock))
        if None in (*a, *b):
            return None
        stock_first = [s.started < o.started for s, o in zip(self.stock, self.ours, strict=True)]
        ratio = block_ratio(a, b, stock_first, CONFIDENCE)
        return geometric_mean(b, CONFIDENCE).value, geometric_mean(a, CONFIDENCE).value, ratio


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Every preset in every cell beside its stock; of a case that was measured again, the last run in `rows`.

    Raises LoadError where a run has not the same blocks of both.
    """
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((row.run, row.cell), {}).setdefault(row.arm, []).append(row)
    last: dict[tuple[object, ...], Comparison] = {}
    for arms in runs.values():
        stock = sorted(arms.pop(STOCK, []), key=lambda row: row.block)
        for arm, own in arms.items():
            ours = sorted(own, key=lambda row: row.block)
            first = ours[0]
            if [row.block for row in stock] != [row.block for row in ours]:
                raise LoadError(
                    f"run {first.run}: expected the same blocks of stock and {arm}, got others; add it again"
                )
            case = (first.gpu, first.sglang, first.ranks, first.layers, first.cell, arm)
            last[case] = Comparison(stock, ours)
    return [*last.values()]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One GPU's share of DeepSeek-V3.2, served: stock beside each preset, a table for each GPU, SGLang and layers."""
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for each in comparisons(rows):
        first = each.ours[0]
        groups.setdefault((first.gpu, first.sglang, first.ranks, first.layers), []).append(each)
    times = ["TTFT stock, s", "ours", "× (95 %)", "TPOT stock, ms", "ours", "× (95 %)"]
    columns = ["workload", "prompt", "cached", "clients", "arm", "blocks", *times]
    found = []
    for (_, _, ranks, layers), own in sorted(groups.items(), key=str):
        cells = []
        for each in sorted(own, key=lambda c: (c.ours[0].clients, c.ours[0].workload != "cold", _tokens(c))):
            first, cached = each.ours[0], statistics.median(row.cached_tokens for row in each.ours)
            line = [first.workload, f"{_tokens(each) / K:.0f}K", f"{cached / K:.0f}K", f"{first.clients}", first.arm]
            line.append(f"{len(each.ours)}")
            line += _compared(each, "ttft_s", 1)
            tpot = _compared(each, "tpot_s", 1e3)
            if tpot[-1] and _decodes_by_stock(each):
                tpot[-1] = "both stock"  # what the columns differ by is the machine's unrest
            line += tpot
            cells.append(line)
        measured_on = environment([asdict(row) for each in own for row in each.ours])
        note = (
            f"{measured_on} {ranks} of eight ranks of DeepSeek-V3.2 with random weights, through HTTP. "
            "Geometric means of the blocks' medians; × is stock's time over ours, with its interval over blocks. "
            "Steps of fewer clients than a preset's gate asks for are stock's in both arms."
        )
        found.append(Table(f"Through the server, {layers} of {one_rank.LAYERS} layers", columns, cells, note))
    return found


def _decodes_by_stock(comparison: Comparison) -> bool:
    """Whether the preset leaves steps of all clients to stock DSA: then both arms decode alike."""
    first, policy = comparison.ours[0], PRESETS[comparison.ours[0].arm].decode
    step = Step([round(_tokens(comparison))] * first.clients)
    return not policy.active or step.why_under_gate(policy) is not None


def _tokens(comparison: Comparison) -> float:
    return statistics.median(row.prompt_tokens for row in comparison.ours)


def _compared(comparison: Comparison, column: str, unit: float) -> list[str]:
    if (times := comparison.times(column)) is None:
        return ["", "", ""]
    stock, ours, (ratio, low, high, _) = times
    interval = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return [f"{stock * unit:.3g}", f"{ours * unit:.3g}", f"{ratio:.2f}{interval}"]


def rows_of(folder: Path, gpu: str | None = None, commit: str | None = None) -> list[Row]:
    """The rows of one finished `ab`. Raises LoadError where something is missing, failed, or was not as asked.

    gpu, commit: for artefacts that do not tell them.
    """
    plan = Store.plan_in(folder)
    names = {arm: _arm_name(folder, arm) for arm in plan.arms}
    if plan.search is not None or len(names) != 2 or [*names.values()].count(STOCK) != 1:
        raise LoadError(
            f"{folder}: expected an `ab` of stock and one preset, got {' and '.join(names.values())}; "
            "measure with --a-expect dsa --b-expect PRESET"
        )
    if plan.until_ci is not None:
        raise LoadError(f"{folder}: expected a number of blocks set beforehand, got --until-ci; use --blocks")
    store = Store(folder, Keys())
    places = [(arm, cell, block) for cell in plan.cells for block in range(plan.blocks) for arm in plan.arms]
    units = [(place, unit) for place in places if (unit := store.find(*place, plan.protocol)) is not None]
    if len(units) < len(places):
        raise LoadError(
            f"{folder}: expected {len(places)} valid blocks of the arms, got {len(units)}; `bench.load resume` "
            "measures what is missing or invalid"
        )
    told = [f for _, unit in units for record in unit.records if (f := _fault(record, unit)) is not None]
    if told:
        asked = sum(len(unit.records) for _, unit in units)
        raise LoadError(f"{folder}: expected {asked} requests answered as asked, {len(told)} were not: {told[0]}")
    environment = store.environment()
    if environment is None:
        raise LoadError(f"{folder}: expected environment.json of the run, got none; measure again")
    one_kind = re.fullmatch(r"\d+ × ([^,]+)", environment.gpus.get("GPUs", ""))
    known = "(" in environment.client["sglang-misa"]
    gpu = _given(folder, "--gpu", one_kind[1] if one_kind else None, gpu)
    commit = _given(folder, "--commit", environment.commit if known else None, commit)
    return [_row(names[arm], cell, unit, gpu, commit, environment.started) for (arm, cell, _), unit in units]


def _arm_name(folder: Path, arm: Arm) -> str:
    """What was expected of the arm's server and found there."""
    if arm.expect is None:
        raise LoadError(
            f"{folder}: expected arms whose selection was checked, got {arm.name} without; "
            "measure with --a-expect dsa --b-expect PRESET"
        )
    return STOCK if arm.expect in STOCK_NAMES else arm.expect


def _given(folder: Path, flag: str, told: str | None, given: str | None) -> str:
    """What the artefacts tell, or the flag where they are silent."""
    if told and given and told != given:
        raise LoadError(f"{flag}: expected {told}, as {folder} says, got {given}; drop it")
    if not (told or given):
        raise LoadError(f"{flag}: expected it beside {folder}, which does not tell it, got none; add it")
    return told or given or ""


def _fault(record: Record, unit: Unit) -> str | None:
    """Why a request cannot stand for its arm; None where it was answered as asked."""
    where = f"{unit.arm} at {unit.label}, block {unit.block + 1}"
    if not record.good:
        return f"{where}: {record.error or 'no token'} {record.detail}".rstrip()
    tokens, wanted = (record.prompt_tokens, record.output_tokens), (record.prompt_wanted, record.output_wanted)
    if tokens != wanted:
        return f"{where}: {tokens[0]} tokens read and {tokens[1]} written, {wanted[0]} and {wanted[1]} asked"
    if record.output_wanted > 1 and record.tpot is None:
        return f"{where}: all tokens came in one read, which tells no TPOT"
    if record.cached_tokens is None:
        return (
            f"{where}: the server told no cached_tokens; start it with --enable-cache-report, without which only "
            "--api generate has them"
        )
    if abs(record.cached_tokens - record.cached_wanted) > int(unit.server.get("page_size", 1)) + LEAD:
        return f"{where}: {record.cached_tokens} tokens found in the cache, {record.cached_wanted} planned"
    return None


def _row(arm: str, cell: Cell, unit: Unit, gpu: str, commit: str, run: str) -> Row:
    cached = {record.cached_wanted > 0 for record in unit.records}
    if len(cached) != 1:
        raise LoadError(
            f"{unit.label}: expected requests that are all cold, or all over a cached prefix, got both; "
            "use --workload agent"
        )
    if (share := one_rank.share_of(unit.server.get("model_path", ""))) is None or "version" not in unit.server:
        raise LoadError(
            f"{unit.arm}: expected a server of bench.one_rank, got the model {unit.server.get('model_path')}"
        )

    def tokens(name: str) -> int:
        counts: list[int] = [getattr(record, name) for record in unit.records]
        return round(statistics.median(counts))

    def seconds(latency: str) -> float | None:
        found = figure(unit.records, f"{latency}_p50")
        return None if found is None else round(found, 6)

    ttft_s, e2e_s = seconds("ttft"), seconds("e2e")
    assert ttft_s is not None
    assert e2e_s is not None
    return Row(
        gpu=gpu,
        sglang=unit.server["version"],
        ranks=share[0],
        layers=share[1],
        workload="cached" if cached == {True} else "cold",
        cell=unit.label,
        clients=cell.load.concurrency,
        arm=arm,
        run=run,
        block=unit.block,
        started=round(unit.started, 3),
        requests=len(unit.records),
        prompt_tokens=tokens("prompt_tokens"),
        cached_tokens=tokens("cached_tokens"),
        output_tokens=tokens("output_tokens"),
        ttft_s=ttft_s,
        tpot_s=seconds("tpot"),
        e2e_s=e2e_s,
        commit=commit,
    )


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where it does not exist. Raises LoadError for other columns."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise LoadError(f"{path}: expected the columns of bench.served, got {table.fieldnames}; remove its rows")
        return [_typed(row) for row in table]


def _typed(row: dict[str, str]) -> Row:
    whole = ("ranks", "layers", "clients", "block", "requests", "prompt_tokens", "cached_tokens", "output_tokens")
    seconds = ("started", "ttft_s", "tpot_s", "e2e_s")
    numbers = {n: int(row[n]) for n in whole} | {n: float(row[n]) if row[n] else None for n in seconds}
    return Row(**(row | numbers))  # type: ignore[arg-type]


def add(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV. Raises LoadError where it holds one of their runs, or other columns."""
    if again := {row.run for row in read(path)} & {row.run for row in rows}:
        raise LoadError(f"{path}: expected runs that it does not hold, got {', '.join(sorted(again))} again; leave out")
    append(path, COLUMNS, map(asdict, rows))


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 not every block and request of every folder can be a row."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.served",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a finished `bench.load ab`")
    parser.add_argument("--csv", type=file_to_write, help="append the rows there (default: print them only)")
    parser.add_argument("--gpu", help="name of the GPU, where the artefacts do not tell it")
    parser.add_argument("--commit", help="commit that was served, where the artefacts do not tell it")
    options = parser.parse_args(words)
    try:
        parts = [rows_of(folder, options.gpu, options.commit) for folder in options.folders]
        if len({part[0].run for part in parts}) < len(parts):
            raise LoadError("expected each run once, got one twice; leave out a folder")
        rows = [row for part in parts for row in part]
        if options.csv is not None:
            add(options.csv, rows)
    except LoadError as error:
        parser.error(str(error))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerows([COLUMNS, *map(astuple, rows)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
