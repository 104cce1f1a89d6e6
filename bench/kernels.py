"""Kernel bench: the whole indexer of one layer, stock beside ours in one run, checked before it is timed.

    python -m sglang_misa.bench.kernels prefill --preset fast faithful --inputs random trained:layer0.safetensors
    python -m sglang_misa.bench.kernels prefill --cached                # few new rows over long prefixes
    python -m sglang_misa.bench.kernels prefill --inputs hostile        # every hostile input by name
    python -m sglang_misa.bench.kernels decode --rows 1 16 64 --length 131072 --csv kernels.csv

Ours goes through the engine that serves: page statistics, routing, scoring and selection. A wrong selection is
reported as such and not timed. Recall is the mean share of DSA's fp32 top 2048 in sampled rows; on random inputs it
says nothing about a real model. Prefill is timed with events after a flush of the L2 cache, stock and ours in turn,
with all launches queued; what the host needs for them is printed beside it. Decode replays a CUDA graph over rotating
inputs, in turn too. All times are medians.

TFLOPS (prefill) and GB/s (decode) are the policy's least arithmetic and bytes over the measured time; `floor` is the
time that these take at the chip's data-sheet rate. --stages adds the µs of every kernel, stock's and ours.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sglang_misa.bench import inputs, stock
from sglang_misa.bench import layer as bench
from sglang_misa.bench.commit import commit
from sglang_misa.bench.compile import jobs, side_by_side
from sglang_misa.bench.table import append
from sglang_misa.bench.timing import event_us, graph_us, host_us, kernel_us
from sglang_misa.bench.work import CHIPS, UNKNOWN, Work, work_of
from sglang_misa.config import PHASES, PRESETS, Phase, SelectionPolicy
from sglang_misa.policy import STOCK

COLUMNS = (
    *("gpu", "sglang", "phase", "preset", "policy", "index_heads", "routed_heads", "residual", "candidates", "blocks"),
    *("sketch", "rows", "length", "inputs", "stock_us", "ours_us", "ratio", "recall", "correct", "commit"),
    *("driver", "torch", "date"),
)
SIZES = {  # fields of a policy that the command line varies
    "heads": "routed heads",
    "candidates": "tokens scored again",
    "blocks": "blocks kept",
    "block_size": "tokens of a block",
    "sketch": "bits of a sketch",
}
LENGTHS = {"prefill": [8192, 32768, 65536, 131072], "decode": [8192, 32768, 65536, 131072]}
ROWS = {"prefill": [8192], "decode": [1, 4, 16, 64]}
CACHED_ROWS, CACHED_LENGTHS = [1024, 2048, 4096], [131072, 262144, 524288]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    phase: Phase
    preset: str
    policy: SelectionPolicy
    index_heads: int
    rows: int
    length: int
    inputs: str
    requests: int = 1

    @property
    def source(self) -> str:
        """The inputs' name, without a file's folder, and how many prompts share a call."""
        kind, _, rest = self.inputs.partition(":")
        name = f"trained:{pathlib.Path(rest).stem}" if kind == "trained" else self.inputs
        return name if self.requests == 1 else f"{name} x{self.requests}"


@dataclass(frozen=True)
class Outcome:
    """µs of stock and of ours on the GPU, nan unless the result was right; of their launches on the host, in prefill;
    and of each kernel of both, if asked for."""

    stock_us: float
    ours_us: float
    flaw: str | None
    recall: float
    host_us: tuple[float, float] | None
    stages: Mapping[str, Mapping[str, float]]


Sizes = Mapping[str, Sequence[int] | None]  # by a field of the policy; None or missing: as the preset has it


def sized(policy: SelectionPolicy, sizes: Sizes) -> Iterator[SelectionPolicy]:
    """`policy` without its gate, with each combination of `sizes` for the numbers that it has."""
    axes = {name: values for name, values in sizes.items() if values and getattr(policy, name) is not None}
    for chosen in itertools.product(*axes.values()):
        yield policy.model_copy(update={"min_len": 0, **dict(zip(axes, chosen, strict=True))})


def policies(phase: Phase, presets: Sequence[str], sizes: Sizes) -> list[tuple[str, SelectionPolicy]]:
    """(preset, policy) of what differs from stock in `phase`: each policy once, under the first preset that has it."""
    found: dict[SelectionPolicy, str] = {}
    for preset in presets:
        base = PRESETS[preset].policy(phase)
        for policy in sized(base, sizes) if base.active else ():
            found.setdefault(policy, preset)
    return [(preset, policy) for policy, preset in found.items()]


def bench_prefill(case: Case, stages: bool) -> Outcome:
    """One extend call: the last `rows` rows of prompts of `length` tokens. Ours keeps what decode reads."""
    shape = bench.Shape("prefill", case.index_heads, case.rows, case.length, case.inputs, case.requests)
    layer = bench.layer_of(shape)
    decoding = PRESETS[case.preset].policy("decode")
    engine = bench.engine_of(case.policy, shape, [layer.index_k_pages], decoding)
    ours, slots = bench.extend(case.policy, layer, engine)
    ours()
    verdict = bench.judge(case.policy, layer, engine, 0, slots)
    baseline = layer.stock()
    calls = [baseline, ours] if verdict.flaw is None else [baseline]
    times = event_us(calls)
    return Outcome(
        stock_us=times[0],
        ours_us=times[1] if len(times) > 1 else float("nan"),
        flaw=verdict.flaw,
        recall=verdict.recall,
        host_us=(host_us(baseline), host_us(ours)),
        stages={"stock": kernel_us(baseline), "ours": kernel_us(ours)} if stages else {},
    )


def bench_decode(case: Case, stages: bool) -> Outcome:
    """A layer of a decode step of `rows` requests of `length` tokens.

    Ours has its share of the step's one launch that brings the page statistics of all layers up to date.
    """
    shape = bench.Shape("decode", case.index_heads, case.rows, case.length, case.inputs)
    # Enough inputs that neither reader finds its keys in L2: ours reads 8K of a row at least, stock all of it.
    copies = max(1, min(64, (200 << 20) // (case.rows * min(case.length, 8192) * 132)))
    layers = [bench.layer_of(shape, seed) for seed in range(copies)]
    engine = bench.engine_of(
        case.policy, shape, [layers[i % copies].index_k_pages for i in range(max(copies, bench.LAYERS))]
    )
    ours: list[Callable[[], object]] = []
    verdict = None
    for i, layer in enumerate(layers):
        layer.keep_statistics(engine, i)
        call = layer.decode_call(i, torch.full((case.rows, bench.TOPK), -1, dtype=torch.int32, device="cuda"))
        ours.append(functools.partial(engine.decode, call, case.policy))
        if i < 2 and (verdict is None or verdict.flaw is None):
            ours[-1]()
            verdict = bench.judge(case.policy, layer, engine, i, call.ids)
    assert verdict is not None

    def upkeep() -> None:
        engine.end_step(layers[0].page_table, layers[0].seq_lens)

    stocks: list[Callable[[], object]] = [layer.stock() for layer in layers]
    kinds: list[list[Callable[[], object]]] = [stocks]
    if verdict.flaw is None:
        kinds += [ours, [upkeep]]
    times = graph_us(kinds)
    return Outcome(
        stock_us=times[0],
        ours_us=times[1] + times[2] / bench.LAYERS if len(times) > 1 else float("nan"),
        flaw=verdict.flaw,
        recall=verdict.recall,
        host_us=None,
        stages={"stock": kernel_us(stocks[0]), "ours": kernel_us(ours[0])} if stages else {},
    )


def measure(case: Case, stages: bool) -> dict[str, object]:
    """The row of a case; prints it with what the table does not hold."""
    outcome = (bench_prefill if case.phase == "prefill" else bench_decode)(case, stages)
    torch.cuda.empty_cache()
    row = _row(case, outcome)
    print("  ".join(_shown(case, outcome, row)), *([f"WRONG: {outcome.flaw}"] if outcome.flaw else []))
    for whose, kernels in outcome.stages.items():
        for kernel, us in kernels.items():
            print(f"    {whose:<5} {us:9.1f} us  {kernel}")
    sys.stdout.flush()
    return row


def _row(case: Case, outcome: Outcome) -> dict[str, object]:
    """The row of the table."""
    policy, right = case.policy, outcome.flaw is None
    return {
        "gpu": torch.cuda.get_device_name(),
        "sglang": stock.version(),
        "phase": case.phase,
        "preset": case.preset,
        "policy": policy.name,
        "index_heads": case.index_heads,
        "routed_heads": policy.heads or "",
        "residual": int(policy.residual),
        "candidates": policy.candidates or "",
        "blocks": policy.blocks or "",
        "sketch": policy.sketch or "",
        "rows": case.rows,
        "length": case.length,
        "inputs": case.source,
        "stock_us": round(outcome.stock_us, 1),
        "ours_us": round(outcome.ours_us, 1) if right else "",
        "ratio": round(outcome.stock_us / outcome.ours_us, 3) if right else "",
        "recall": round(outcome.recall, 4),
        "correct": right,
        "commit": commit(),
        "driver": driver(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _shown(case: Case, outcome: Outcome, row: Mapping[str, object]) -> Iterator[str]:
    """The row without what all have in common, then rates, the least time and the host's."""
    yield from (f"{name}={row[name]}" for name in COLUMNS[2:-4] if row[name] != "")
    prefill = case.phase == "prefill"
    lens = torch.full((case.rows,), case.length) - torch.arange(case.rows if prefill else 1) % (
        case.rows // case.requests
    )
    work, dsa = (work_of(p, case.phase, case.index_heads, lens) for p in (case.policy, STOCK))
    unit, rate = ("TFLOPS", Work.tflops) if prefill else ("GB/s", Work.gb_s)
    yield f"{unit}={rate(work, outcome.ours_us):.0f} (stock {rate(dsa, outcome.stock_us):.0f})"
    floor_us = work.floor_us(CHIPS.get(str(row["gpu"]), UNKNOWN))
    yield from (f"floor_us={floor_us:.1f}", f"of_floor={floor_us / outcome.ours_us:.0%}")
    if outcome.host_us is not None:
        yield "host_us={:.0f} (stock {:.0f})".format(*reversed(outcome.host_us))


def driver() -> str:
    """The version of the NVIDIA driver; empty where nothing says it."""
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    return next((word for word in text.split() if word.count(".") == 2 and word[0].isdigit()), "")


def cases(words: Sequence[str] | None = None) -> tuple[list[Case], argparse.Namespace]:
    """What a command line asks for. Leaves with a message where that is nothing, or impossible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--csv", type=pathlib.Path, help="append the rows to this file (default: print them only)")
    parser.add_argument("--preset", nargs="+", choices=[*PRESETS], default=[*PRESETS], help="default: all")
    parser.add_argument("--inputs", nargs="+", default=["random"], help=inputs.__doc__.split("\n\n")[1])
    parser.add_argument("--index-heads", nargs="+", type=int, default=[64], choices=[32, 64])
    parser.add_argument("--length", nargs="+", type=int, help="keys of a request")
    parser.add_argument("--rows", nargs="+", type=int, help="prefill: query rows of a call; decode: requests of a step")
    parser.add_argument("--cached", action="store_true", help="prefill: few new rows over long cached prefixes")
    parser.add_argument(
        "--requests", nargs="+", type=int, default=[1], help="prefill: prompts that share a call's rows"
    )
    for size, what in SIZES.items():
        parser.add_argument("--" + size.replace("_", "-"), nargs="+", type=int, help=f"{what} (default: the presets')")
    parser.add_argument("--stages", action="store_true", help="print the time of every kernel, stock's and ours")
    options = parser.parse_args(words)
    if options.cached and options.phase == "decode":
        parser.error("--cached: expected prefill, where rows share a prefix, got decode; drop it")
    rows = options.rows or (CACHED_ROWS if options.cached else ROWS[options.phase])
    lengths = options.length or (CACHED_LENGTHS if options.cached else LENGTHS[options.phase])
    sources = [n for name in options.inputs for n in (_hostile() if name == "hostile" else [name])]
    wanted = policies(options.phase, options.preset, {size: getattr(options, size) for size in SIZES})
    if not wanted:
        active = ", ".join(name for name, preset in PRESETS.items() if preset.policy(options.phase).active)
        parser.error(f"--preset: expected one of {active} in {options.phase}, got {' '.join(options.preset)}")
    for _, policy in wanted:
        for problem in policy.problems(options.phase, index_heads=min(options.index_heads), topk=bench.TOPK):
            parser.error(problem)
    axes = itertools.product(options.index_heads, sources, lengths, rows, options.requests, wanted)
    found = [
        Case(options.phase, preset, policy, heads, count, length, source, requests)
        for heads, source, length, count, requests, (preset, policy) in axes
        if options.phase == "decode" or (count % requests == 0 and count // requests <= length)
    ]
    if not found:
        parser.error(f"--rows: expected at most as many as keys of a request, got {rows} and {lengths}; choose others")
    return found, options


def _hostile() -> list[str]:
    return [f"hostile:{name}" for name in inputs.names()]


def main(words: Sequence[str] | None = None) -> int:
    found, options = cases(words)
    if not torch.cuda.is_available():
        print("expected a GPU, got none; run it where the server will run", file=sys.stderr)
        return 2
    side_by_side(jobs(options.phase, {case.policy for case in found}, options.index_heads))
    correct = True
    for case in found:
        row = measure(case, options.stages)
        if options.csv is not None:
            append(options.csv, COLUMNS, [row])  # at once: should a later case fail, this one is kept
        correct = correct and bool(row["correct"])
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
