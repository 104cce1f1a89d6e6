"""Tables and figures of the measured pages, written from the CSVs.

    python -m sglang_misa.bench.report [--results bench/results] [--docs docs] [--readme README.md]

Writes the figures beside the CSVs, and the table NAME between the markers `<!-- NAME -->` and `<!-- /NAME -->` of
each page that has them: `results` in the README beside the CSVs, `measured` in docs/measured.md and the README,
`quality` and `needles` in docs/quality.md, `watching` in docs/operations.md. A table of kernels holds one GPU and, of
each preset, the policies of its last commit in the file; the newest row of a case wins, and none is shown if it is
wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_misa.bench.kernels import CACHED_ROWS
from sglang_misa.bench.table import Table, environment
from sglang_misa.config import PHASES, PRESETS, Phase
from sglang_misa.decode_gate import Step
from sglang_misa.outlet import kept_stdout

Record = dict[str, str]
K = 1024
WIDE = 8192  # rows of a whole chunk of prefill
LONG = 32 * K  # tokens that no preset's gate is near
PLOTTED = ("misa", "fast", "faithful", "exact", "hisa")  # at most four lines a figure, these first
KEPT = 7  # policies of a front in the quality table
PHASE_COSTS: dict[Phase, str] = {"prefill": "flop", "decode": "bytes"}  # columns of selection.csv


def read(path: Path) -> list[Record]:
    """The rows of a CSV; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list; none where it does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


def newest(rows: Iterable[Record]) -> list[Record]:
    """Of each GPU, SGLang, preset and table the last row of each case of its last policies, if it is a right one."""

    def table(row: Record) -> tuple[str | bool, ...]:
        return *stand(row), row["phase"], row["preset"], row["inputs"].startswith("hostile"), shared(row)

    def policy(row: Record) -> tuple[str, ...]:
        return tuple(row[name] for name in ("policy", "routed_heads", "residual", "candidates", "blocks", "sketch"))

    rows = [*rows]
    right = [row for row in rows if row["correct"] == "True"]
    last = {table(row): row["commit"] for row in right}
    today = {(table(row), policy(row)) for row in right if row["commit"] == last[table(row)]}
    found = {
        (table(row), policy(row), *(row[size] for size in ("index_heads", "rows", "length", "inputs"))): row
        for row in rows
        if (table(row), policy(row)) in today
    }
    return [row for row in found.values() if row["correct"] == "True"]


def shared(row: Record) -> bool:
    """Whether several prompts share the call: ` x64` behind its inputs."""
    return " x" in row["inputs"]


def stand(row: Record) -> tuple[str, str]:
    """What rows of one table have in common: the GPU, and the SGLang that is the baseline."""
    return row["gpu"], row["sglang"]


def kernel_tables(rows: Sequence[Record]) -> list[Table]:
    """Of one GPU and SGLang: whole chunks, cached prefixes, hostile inputs, decode; as far as there are rows."""
    prefill = [row for row in rows if row["phase"] == "prefill"]
    plain = [row for row in prefill if not row["inputs"].startswith("hostile") and not shared(row)]
    cached = [row for row in plain if int(row["rows"]) in CACHED_ROWS]
    wide = [row for row in plain if int(row["rows"]) == WIDE]
    decode = [row for row in rows if row["phase"] == "decode"]
    hostile = [row for row in prefill if row["inputs"].startswith("hostile")]
    return [
        table
        for table in (
            by_length("Prefill: a chunk of 8192 rows", [row for row in wide if int(row["length"]) >= LONG]),
            by_length("Prefill: a chunk of 8192 rows, shorter", [row for row in wide if int(row["length"]) < LONG]),
            by_length("Prefill: few new rows over a cached prefix", cached),
            by_length("Prefill: few new rows of each of many prompts", [row for row in prefill if shared(row)]),
            by_input("Prefill: hostile inputs", hostile),
            by_length("Decode", decode),
        )
        if table.rows
    ]


def by_length(title: str, rows: Sequence[Record]) -> Table:
    """A row for each policy, H, number of rows and kind of inputs; stock's ms, ours and the ratio by length."""
    lengths = sorted({int(row["length"]) for row in rows})
    groups: dict[tuple[str, ...], dict[int, list[Record]]] = {}
    for row in rows:
        name = (method(row), row["index_heads"], row["rows"], row["inputs"].partition(":")[0])
        groups.setdefault(name, {}).setdefault(int(row["length"]), []).append(row)
    cells = []
    for key, by in sorted(groups.items(), key=lambda item: (item[0][3], -int(item[0][1]), int(item[0][2]), item[0][0])):
        line: list[str] = [*key]
        for length in lengths:
            line += _times(by.get(length, []))
        recalls = [float(row["recall"]) for row in by[max(by)] if row["recall"]]
        cells.append([*line, f"{statistics.mean(recalls):.3f}" if recalls and key[3] == "trained" else ""])
    heads = [name for n in lengths for name in (f"{n // K}K stock", "ours", "×")]
    unit = "µs" if rows and rows[0]["phase"] == "decode" else "ms"
    note = f"Times in {unit}, medians."
    if files := sorted({name for row in rows for kind, _, name in [row["inputs"].partition(":")] if kind == "trained"}):
        note += (
            f" Trained inputs: {', '.join(files)} of a small model; of several, the slowest ratio, and the mean recall "
            "at the longest. [Quality](../../docs/quality.md#small-trained-indexers) has the recall of all layers."
        )
    return Table(title, ["policy", "H", "rows", "inputs", *heads, "recall"], cells, note)


def _times(rows: Sequence[Record]) -> list[str]:
    if not rows:
        return ["", "", ""]
    worst = min(rows, key=lambda row: float(row["ratio"]))
    scale = 1e3 if worst["phase"] == "prefill" else 1.0
    times = (f"{float(worst[column]) / scale:.3g}" for column in ("stock_us", "ours_us"))
    return [*times, f"{float(worst['ratio']):.2f}"]


def by_input(title: str, rows: Sequence[Record]) -> Table:
    """A row for each input and length, the ratio of each policy; the slowest first."""
    names = sorted({method(row) for row in rows})
    usual = statistics.mode([int(row["length"]) for row in rows] or [LONG])
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        length = int(row["length"])
        name = row["inputs"].removeprefix("hostile:") + ("" if length == usual else f", {length // K}K")
        by = ratios.setdefault(name, {})
        by[method(row)] = min(float(row["ratio"]), by.get(method(row), math.inf))
    ordered = sorted(ratios.items(), key=lambda item: min(item[1].values()))
    cells = [[name, *(f"{by[n]:.2f}" if n in by else "" for n in names)] for name, by in ordered]
    note = f"Stock's time over ours, 8192 rows over {usual // K}K keys where no other length is named."
    if len({row["index_heads"] for row in rows}) > 1:
        note += " Of several numbers of index heads the slowest."
    return Table(title, ["input", *names], cells, note)


def method(row: Record) -> str:
    """The preset, and its numbers where several rows of a file differ in them."""
    numbers = (("h", "routed_heads"), ("C", "candidates"), ("blocks", "blocks"), ("bits", "sketch"))
    shown = [f"{name} = {row[column]}" for name, column in numbers if row.get(column)]
    residual = ["residual"] if row.get("residual") == "1" else []
    return f"{row['preset']} ({', '.join([*shown[:1], *residual, *shown[1:]])})" if shown else row["preset"]


def quality_tables(rows: Sequence[Record]) -> list[Table]:
    """What selections keep of DSA's tokens: the presets' own, and the front of each length and phase."""
    found = []
    for length in sorted({int(row["length"]) for row in rows}, reverse=True):
        for phase, cost in PHASE_COSTS.items():
            own = [row for row in rows if int(row["length"]) == length and row["phase"] == phase]
            front = sorted((row for row in own if row["front"] == "1"), key=lambda row: float(row[cost]))
            shown = _spread(front, KEPT) + [row for row in own if _presets(row, phase)]
            unique = {tuple(row.values()): row for row in sorted(shown, key=lambda row: float(row[cost]))}.values()
            columns = ["preset", "selection", "columns", f"{cost} / stock's", "recall", "p10", "worst layer", "front"]
            numbers = ("columns", cost, "recall", "p10", "worst_layer")
            cells = [
                [_presets(r, phase), _selection(r), *(r[name] for name in numbers), "yes" if r["front"] == "1" else ""]
                for r in unique
            ]
            if cells:
                found.append(Table(f"{phase.capitalize()}, {length // K}K", columns, cells))
    return found


def _spread(rows: Sequence[Record], count: int) -> list[Record]:
    """At most so many rows, evenly from the first to the last."""
    apart = max(1.0, (len(rows) - 1) / (count - 1))
    return [rows[round(at * apart)] for at in range(min(count, len(rows)))]


def needle_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Needles found of those asked, a table for each model: a line for each length, a column for each arm."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        arms = list(dict.fromkeys(row["arm"] for row in own))
        cells = []
        for length in sorted({row["length"] for row in own}):
            line = [f"{length / K:g}K"]
            for arm in arms:
                part = [row for row in own if (row["arm"], row["length"]) == (arm, length)]
                missed = ", ".join(f"{100 * row['depth']:.0f} %" for row in part if row["found"] < row["asked"])
                told = f"{sum(row['found'] for row in part)} of {sum(row['asked'] for row in part)}" if part else ""
                line.append(f"{told} (not at {missed})" if missed else told)
            cells.append(line)
        depths = len({row["depth"] for row in own})
        commits = ", ".join(dict.fromkeys(row["commit"] for row in own))
        note = f"{depths} depths, from the start (0 %) to the end of the text (100 %); commit {commits}."
        found.append(Table(f"Needles found by {model}", ["tokens", *arms], cells, note))
    return found


def watching_tables(looks: Sequence[dict[str, Any]]) -> list[Table]:
    """What watching costs, a line for each look."""
    cells = []
    for look in looks:
        share = "" if look["share"] is None else f"{look['share']:.2%} of {look['step_ms']:g} ms"
        times = (f"{look[column]:.0f}" for column in ("gpu_us", "host_us"))
        cells.append([look["look"], f"{look['looks_a_step']:.3g}", *times, share, f"{look['budget']:.1%}"])
    if not looks:
        return []
    shape = ", ".join(f"{name} {looks[0][name]}" for name in ("preset", "rows", "length", "layers", "audited", "every"))
    columns = ["look", "in a step", "GPU, µs", "host, µs", "share", "at most"]
    return [Table("Watching", columns, cells, f"{environment(looks)} {shape}.")]


def _presets(row: Record, phase: Phase) -> str:
    """The presets whose policy a row of selection.csv is."""
    names = []
    for name, config in PRESETS.items():
        policy = config.policy(phase)
        fields = [
            *(policy.heads, policy.router if policy.heads else None, int(policy.residual)),
            *(policy.block_size if policy.pooled else None, policy.blocks, policy.sketch, policy.candidates),
        ]
        columns = ("heads", "router", "residual", "block_size", "blocks", "sketch", "candidates")
        if (
            policy.active
            and not policy.exact
            and [row[c] for c in columns] == ["" if f is None else str(f) for f in fields]
        ):
            names.append(name)
    return ", ".join(names)


def _selection(row: Record) -> str:
    parts = [f"{row['blocks']} blocks of {row['block_size']}"] if row["blocks"] else []
    if row["heads"]:
        parts.append(f"{row['heads']} heads by {row['router']} over {row['block_size']}")
    parts += ["residual"] if row["residual"] == "1" else []
    parts += [f"{row['sketch']}-bit sketch"] if row["sketch"] else []
    parts += [f"C = {row['candidates']}"] if row["candidates"] else []
    return ", ".join(parts or ["all heads"])


def plot(rows: Sequence[Record], folder: Path) -> list[Path]:
    """Stock's time over ours by length, a figure a GPU and phase: 8192 rows in prefill, the largest batch in decode.

    Of several versions of SGLang the one that was measured at the most lengths, and of equals the newest, is drawn;
    of several policies of a preset the slowest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for gpu, phase in sorted({(row["gpu"], row["phase"]) for row in rows}):
        kind = (gpu, phase, "64", "random")
        every = [row for row in rows if (row["gpu"], row["phase"], row["index_heads"], row["inputs"]) == kind]
        versions = {row["sglang"] for row in every}
        drawn = max(versions, key=lambda version: (len(_lengths(every, version)), _version(version)), default="")
        own = [row for row in every if row["sglang"] == drawn and _passes_gate(row)]
        most = WIDE if phase == "prefill" else max((int(r["rows"]) for r in own), default=0)
        lines: dict[str, dict[int, float]] = {}
        for row in own:
            if int(row["rows"]) == most:
                line, length = lines.setdefault(row["preset"], {}), int(row["length"])
                line[length] = min(float(row["ratio"]), line.get(length, math.inf))
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name in [name for name in PLOTTED if name in lines][:4]:
            axes.plot(*zip(*sorted(lines[name].items()), strict=True), marker="o", label=name)
        axes.axhline(1.0, color="grey", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for points in lines.values() for length in points})
        axes.set_xticks(ticks, [f"{t // K}K" for t in ticks])
        rows_are = "rows" if phase == "prefill" else "requests"
        title = f"Indexer of a layer, {phase} of {most} {rows_are}, {gpu.removeprefix('NVIDIA ')}, SGLang {drawn}"
        axes.set(xlabel="context length (tokens)", ylabel="stock's time / ours", title=title)
        axes.legend(fontsize="small")
        target = folder / f"kernels-{phase}-{gpu.replace(' ', '-')}.png"
        figure.savefig(target, dpi=130)
        pyplot.close(figure)
        written.append(target)
    return written


def _passes_gate(row: Record) -> bool:
    """Whether some row of a chunk is past its preset's length gate."""
    return row["phase"] == "decode" or int(row["length"]) > PRESETS[row["preset"]].prefill.min_len


def _lengths(rows: Sequence[Record], sglang: str) -> set[str]:
    return {row["length"] for row in rows if row["sglang"] == sglang}


def _version(sglang: str) -> list[int]:
    return [int(part) for part in sglang.split(".") if part.isdigit()]


def between(page: str, name: str, text: str) -> str:
    """`page` with `text` between its markers of `name`; as it is without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}", page)


def _selects(row: Record) -> bool:
    """Whether a preset takes a call as wide as the row's."""
    rows, decode = int(row["rows"]), PRESETS[row["preset"]].decode
    return (
        rows >= WIDE
        if row["phase"] == "prefill"
        else Step([int(row["length"])], width=rows).why_under_gate(decode) is None
    )


def summary(rows: Sequence[Record]) -> str:
    """The README's tables: each preset where it selects at 128K, random inputs, H = 64, by GPU and SGLang."""
    chosen = [row for row in rows if row["inputs"] == "random" and row["index_heads"] == "64"]
    chosen = [row for row in chosen if int(row["length"]) == 128 * K and _selects(row)]
    tables = []
    for gpu, sglang in sorted({*map(stand, chosen)}, key=lambda key: (key[0], _version(key[1])), reverse=True):
        own = sorted(
            (row for row in chosen if stand(row) == (gpu, sglang)),
            key=lambda r: (r["phase"] == "decode", int(r["rows"]), r["preset"]),
        )
        cells = [[row["phase"], row["rows"], row["preset"], *_times([row])] for row in own]
        columns = ["phase", "rows", "preset", "stock", "ours", "×"]
        title = f"{gpu.removeprefix('NVIDIA ')}, SGLang {sglang}, 128K tokens"
        tables.append(str(Table(title, columns, cells, environment(own))))
    return "\n\n".join(tables)


def kernel_sections(rows: Sequence[Record]) -> Iterator[str]:
    """What the page beside the CSVs says of kernels: of each GPU its figures, then its tables by SGLang and phase."""
    for gpu in sorted({row["gpu"] for row in rows}):
        found = {row["phase"] for row in rows if row["gpu"] == gpu}
        phases = [phase for phase in PHASES if phase in found]
        yield f"## {gpu.removeprefix('NVIDIA ')}"
        yield from (f"![{phase}](kernels-{phase}-{gpu.replace(' ', '-')}.png)" for phase in phases)
        for sglang in sorted({row["sglang"] for row in rows if row["gpu"] == gpu}, key=_version, reverse=True):
            for phase in phases:
                if part := [row for row in rows if (*stand(row), row["phase"]) == (gpu, sglang, phase)]:
                    yield environment(part)
                    yield from map(str, kernel_tables(part))


@kept_stdout()
def main(words: Sequence[str] | None = None) -> int:
    from sglang_misa.bench import served  # by the extra `bench`, which those who read kernels.csv alone may lack
    from sglang_misa.bench.load.settings import LoadError

    parser = argparse.ArgumentParser(prog="python -m sglang_misa.bench.report", description=__doc__)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--results", type=Path, default=root / "bench/results", help="folder of the CSVs")
    parser.add_argument("--docs", type=Path, default=root / "docs", help="folder of measured.md and quality.md")
    parser.add_argument("--readme", type=Path, default=root / "README.md")
    options = parser.parse_args(words)
    rows = newest(read(options.results / "kernels.csv"))
    if not rows:
        parser.error(
            f"--results: expected right rows in {options.results}/kernels.csv, got none; run bench.kernels --csv"
        )
    try:
        through = [str(table) for table in served.tables(served.read(options.results / "one_rank.csv"))]
    except LoadError as error:
        parser.error(str(error))
    plot(rows, options.results)
    quality = "\n\n".join(map(str, quality_tables(read(options.results / "selection.csv"))))
    needles = "\n\n".join(map(str, needle_tables(read_json(options.results / "needles.json"))))
    watching = "\n\n".join(map(str, watching_tables(read_json(options.results / "watching.json"))))
    for page, name, text in (
        (options.results / "README.md", "results", "\n\n".join([*kernel_sections(rows), *through])),
        (options.docs / "measured.md", "measured", "\n\n".join([summary(rows), *through])),
        (options.docs / "quality.md", "quality", quality),
        (options.docs / "quality.md", "needles", needles),
        (options.docs / "operations.md", "watching", watching),
        (options.readme, "measured", summary(rows)),
    ):
        if page.exists() and text:
            page.write_text(between(page.read_text(), name, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
