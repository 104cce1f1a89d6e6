"""Kernel bench: the whole indexer of one layer, stock beside ours in one run, checked before it is timed.

    python -m sglang_misa.bench.kernels prefill [--lengths 32768 131072] [--rows 8192] [--index-heads 64] [--csv FILE]
    python -m sglang_misa.bench.kernels prefill --policies misa misa-hier --heads 4 8 16 --candidates 4096 8192 16384
    python -m sglang_misa.bench.kernels decode  [--lengths 8192 131072] [--batches 1 16 64] [--stages]

Each method of the presets has its row, or one for each of --heads, --candidates and --blocks where it has such a
number, and so has `plain`, which does MISA without a kernel that selects: the routed heads' score matrix in memory,
then SGLang's top-k, as stock has it. Prefill is timed with events after a flush of the L2 cache and with all launches
queued; what the host needs for them is printed beside it. Decode is timed by replaying a CUDA graph over rotating
inputs. Both report medians. A wrong result is reported as such and not timed, and so is one of `plain` where SGLang's
top-k, approximate where scores crowd together, missed places. Inputs are random, with heavy-tailed gates: they say what
a shape costs, and nothing about the recall of a policy on a real model.

TFLOPS (prefill) and GB/s (decode) are the method's least arithmetic and bytes over the measured time; `floor` is the
time that these take at the chip's data-sheet rate. --stages adds the µs of every kernel, stock's and ours.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa import indexer
from sglang_misa.bench import check, stock
from sglang_misa.bench.inputs import unpack_pages
from sglang_misa.bench.timing import event_us, graph_us, host_us, kernel_us
from sglang_misa.bench.work import CHIPS, UNKNOWN, Work, count
from sglang_misa.config import PHASES, PRESETS, Phase, SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.page_means import Layers, update_last_page_means
from sglang_misa.kernels.prefill import route, topk_routed
from sglang_misa.page_stats import PageStats

TOPK = 2048
COLUMNS = (
    *("gpu", "phase", "policy", "index_heads", "routed_heads", "candidates", "blocks", "rows", "length"),
    *("stock_us", "ours_us", "ratio", "correct", "commit"),
)
RESULTS = pathlib.Path(__file__).parent / "results" / "kernels.csv"
CHECKED_ROWS = 24
LAYERS = 61  # of DeepSeek-V3.2: those that share the upkeep of page means in decode
DSA = SelectionPolicy()
PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """What is timed beside stock: a policy by our kernels or, in prefill, by `routed_logits` and stock's top-k."""

    policy: SelectionPolicy
    plain: bool = False

    @property
    def name(self) -> str:
        return PLAIN if self.plain else self.policy.name


SIZES = {"heads": "routed heads", "candidates": "tokens scored again", "blocks": "blocks kept"}  # fields of a policy
Sizes = Mapping[str, Sequence[int] | None]  # by such a field; None or missing: as the preset has it


def sized(policy: SelectionPolicy, sizes: Sizes) -> Iterator[SelectionPolicy]:
    """`policy` without its gate, with each combination of `sizes` for the numbers that it has."""
    axes = {name: values for name, values in sizes.items() if values and getattr(policy, name) is not None}
    for chosen in itertools.product(*axes.values()):
        yield policy.model_copy(update={"min_len": 0, **dict(zip(axes, chosen, strict=True))})


def methods(phase: Phase, names: Sequence[str], sizes: Sizes) -> list[Method]:
    """The methods that differ from stock in `phase`, each once, of presets and `PLAIN`, which is MISA's."""
    presets = [(PRESETS["misa" if name == PLAIN else name].policy(phase), name == PLAIN) for name in names]
    active = [(policy, plain) for policy, plain in presets if policy.active]
    return list(dict.fromkeys(Method(one, plain) for policy, plain in active for one in sized(policy, sizes)))


@dataclass(frozen=True)
class Layer:
    """One layer's inputs: a pool of pages in random physical order, and `requests` of `length` keys in it."""

    index_q: Tensor  # [T, H, 128] fp8
    head_gates: Tensor  # [T, H] fp32
    buffer: Tensor  # [num_pages, 8448] uint8
    page_table: Tensor  # [requests, W] int32
    row_lens: Tensor  # [T] int32


def make_layer(rows: int, heads: int, length: int, requests: int, seed: int = 0) -> Layer:
    g = torch.Generator("cuda").manual_seed(seed)
    width = -(-length // PAGE)
    pages = requests * width + 1
    keys = torch.randn(pages * PAGE, 128, device="cuda", generator=g).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(pages, PAGE, device="cuda", generator=g).add_(0.5)
    buffer = torch.cat([keys.view(pages, -1), scales.view(torch.uint8)], dim=1)
    table = (torch.randperm(pages - 1, device="cuda", generator=g) + 1).view(requests, width).int()
    q = torch.randn(rows, heads, 128, device="cuda", generator=g).to(torch.float8_e4m3fn)
    gates = torch.randn(rows, heads, device="cuda", generator=g).mul_(1.5).exp_() * heads**-0.5
    gates *= torch.where(torch.rand(rows, heads, device="cuda", generator=g) < 0.1, -1.0, 1.0)
    if requests == 1 and rows > 1:  # an extend call: row t sees one key more than row t - 1
        lens = torch.arange(length - rows + 1, length + 1, dtype=torch.int32, device="cuda")
    else:
        lens = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    return Layer(q, gates, buffer, table, lens)


def correct_rows(policy: SelectionPolicy, layer: Layer, stats: PageStats, chosen: Tensor) -> bool:
    """Whether sampled rows of `chosen` [T, TOPK] physical slots are the policy's selection; False if none decided."""
    rows = torch.linspace(0, len(layer.row_lens) - 1, min(CHECKED_ROWS, len(layer.row_lens))).long().unique().tolist()
    verdicts = []
    for row in rows:
        request = row if len(layer.page_table) > 1 else 0
        length = int(layer.row_lens[row])
        pages = layer.page_table[request, : -(-length // PAGE)].long()
        index_k, k_scale = (x[:length] for x in unpack_pages(layer.buffer[pages]))
        logical = torch.full((len(layer.buffer),), -1, device=pages.device)
        logical[pages] = torch.arange(len(pages), device=pages.device)
        slots = chosen[row].long()
        positions = torch.where(slots < 0, -1, logical[slots.clamp_min(0) // PAGE] * PAGE + slots % PAGE)
        if bool((positions[slots >= 0] < 0).any()):
            return False
        means = stats.means[0][pages[: length // PAGE]]
        seen = check.Row(layer.index_q[row], layer.head_gates[row], index_k, k_scale, means)
        with contextlib.suppress(check.Undecided):
            verdicts.append(check.selection_flaw(policy, seen, positions, TOPK) is None)
    return False not in verdicts and True in verdicts


@dataclass(frozen=True)
class Outcome:
    """µs of stock and of ours on the GPU, the latter nan unless its result was right; the keys that the rows saw; µs of
    the launches of stock and of ours on the host, in prefill; and of each kernel of both, if asked for."""

    stock_us: float
    ours_us: float
    correct: bool
    row_lens: Tensor
    host_us: tuple[float, float] | None
    stages: dict[str, dict[str, float]]


def routed_logits(policy: SelectionPolicy, call: indexer.RaggedCall, block_means: Tensor) -> Tensor:
    """The scores that MISA ranks, all of them in memory: fp32 [T, S], as DeepGEMM leaves stock's.

    Columns that a row does not see hold anything.
    """
    assert policy.heads is not None
    rows = (call.index_q, call.head_gates, block_means, call.row_batch, call.row_lens)
    head_ids = route.route(*rows, policy.heads, policy.block_size, policy.router)
    (keys,) = call.k_scale.shape
    stride = topk_routed.aligned(keys, indexer.ROW_STRIDE)
    return topk_routed.routed_logits(
        call.index_q,
        call.head_gates,
        head_ids,
        call.index_k,
        call.k_scale,
        call.ks,
        call.ks + call.row_lens,
        out=torch.empty(len(call.row_lens), stride, device=call.index_k.device)[:, :keys],
    )


def bench_prefill(method: Method, heads: int, rows: int, length: int, stages: bool) -> Outcome:
    """One indexer call for the last `rows` rows of a prompt of `length` tokens."""
    policy = method.policy
    layer = make_layer(rows, heads, length, requests=1)
    pages = layer.page_table[0].long()
    index_k = layer.buffer[pages, : PAGE * 128].reshape(-1, 128).view(torch.float8_e4m3fn)[:length].contiguous()
    k_scale = layer.buffer[pages, PAGE * 128 :].contiguous().view(torch.float32).flatten()[:length].contiguous()
    position = torch.arange(length, device="cuda")
    slots = (pages[position // PAGE] * PAGE + position % PAGE).int().unsqueeze(0)
    ks = torch.zeros_like(layer.row_lens)
    stock_topk = stock.fused_topk(ks, layer.row_lens, slots, TOPK)
    baseline = stock.prefill(layer.index_q, layer.head_gates, index_k, k_scale, ks, layer.row_lens, stock_topk)

    stats = PageStats([layer.buffer], kernels=True)
    lens = torch.tensor([length], dtype=torch.int32, device="cuda")
    call = indexer.RaggedCall(
        layer.index_q,
        layer.head_gates,
        index_k,
        k_scale,
        layer.row_lens,
        ks,
        torch.zeros_like(ks),
        layer.page_table,
        lens,
    )
    run = indexer.Run((indexer.Span(0, 0, rows, 0, length),), 0, rows)
    out = torch.full((rows, TOPK), -1, dtype=torch.int32, device="cuda")
    space = indexer.OutputSpace(pages=layer.page_table)

    def ours() -> Tensor:
        block_means = stats.heal(0, layer.buffer, layer.page_table, lens, policy.block_size)
        if method.plain:
            return stock_topk(routed_logits(policy, call, block_means))
        indexer.ragged_topk(policy, call, run, block_means, space, out)
        return out

    correct = correct_rows(policy, layer, stats, ours())
    return Outcome(
        stock_us=event_us(baseline),
        ours_us=event_us(ours) if correct else float("nan"),
        correct=correct,
        row_lens=layer.row_lens,
        host_us=(host_us(baseline), host_us(ours)),
        stages={"stock": kernel_us(baseline), "ours": kernel_us(ours)} if stages else {},
    )


def bench_decode(method: Method, heads: int, batch: int, length: int, stages: bool) -> Outcome:
    """A layer of a decode step of `batch` requests of `length` tokens.

    Ours has its share of the step's one launch that brings the page means of all layers up to date.
    """
    policy = method.policy
    # Enough inputs that neither reader finds its keys in L2: ours reads 8K of a row, stock all of it.
    copies = max(1, min(64, (200 << 20) // (batch * min(length, 8192) * 132)))
    layers = [make_layer(batch, heads, length, requests=batch, seed=s) for s in range(copies)]
    stats = [PageStats([layer.buffer], kernels=True) for layer in layers]
    for layer, means in zip(layers, stats, strict=True):
        means.heal(0, layer.buffer, layer.page_table, layer.row_lens, policy.block_size)

    def ours(layer: Layer, means: PageStats) -> Tensor:
        return indexer.paged_topk(
            policy, layer.index_q, layer.head_gates, layer.buffer, layer.page_table, layer.row_lens, means, 0, TOPK
        )

    served = [i % copies for i in range(LAYERS)]
    addresses = Layers.of([layers[i].buffer for i in served], [stats[i].means[0] for i in served])

    def upkeep() -> None:
        update_last_page_means(addresses, layers[0].page_table, layers[0].row_lens)

    correct = all(
        correct_rows(policy, layer, means, ours(layer, means))
        for layer, means in zip(layers[:2], stats[:2], strict=True)
    )
    baselines = [stock.decode(la.index_q, la.head_gates, la.buffer, la.page_table, la.row_lens, TOPK) for la in layers]
    mine = [functools.partial(ours, la, me) for la, me in zip(layers, stats, strict=True)]
    return Outcome(
        stock_us=graph_us(baselines),
        ours_us=graph_us(mine) + graph_us([upkeep]) / LAYERS if correct else float("nan"),
        correct=correct,
        row_lens=layers[0].row_lens,
        host_us=None,
        stages={"stock": kernel_us(baselines[0]), "ours": kernel_us(mine[0])} if stages else {},
    )


def measure(phase: Phase, method: Method, heads: int, rows: int, length: int, stages: bool) -> dict[str, object]:
    bench, unit, rate = (
        (bench_prefill, "TFLOPS", Work.tflops) if phase == "prefill" else (bench_decode, "GB/s", Work.gb_s)
    )
    outcome, policy = bench(method, heads, rows, length, stages), method.policy
    torch.cuda.empty_cache()
    gpu = torch.cuda.get_device_name()
    row = {
        "gpu": gpu,
        "phase": phase,
        "policy": method.name,
        "index_heads": heads,
        "routed_heads": policy.heads or "",
        "candidates": policy.candidates or "",
        "blocks": policy.blocks or "",
        "rows": rows,
        "length": length,
        "stock_us": round(outcome.stock_us, 1),
        "ours_us": round(outcome.ours_us, 1) if outcome.correct else "",
        "ratio": round(outcome.stock_us / outcome.ours_us, 2) if outcome.correct else "",
        "correct": outcome.correct,
        "commit": commit(),
    }
    shown = [f"{name}={row[name]}" for name in COLUMNS[1:-1] if row[name] != ""]
    work, dsa = (count(p, phase, heads, outcome.row_lens) for p in (policy, DSA))
    shown.append(f"{unit}={rate(work, outcome.ours_us):.0f} (stock {rate(dsa, outcome.stock_us):.0f})")
    floor_us = work.floor_us(CHIPS.get(gpu, UNKNOWN))
    shown += [f"floor_us={floor_us:.1f}", f"of_floor={floor_us / outcome.ours_us:.0%}"]
    if outcome.host_us is not None:
        shown.append("host_us={:.0f} (stock {:.0f})".format(*reversed(outcome.host_us)))
    print("  ".join(shown))
    for whose, kernels in outcome.stages.items():
        for kernel, us in kernels.items():
            print(f"    {whose:<5} {us:9.1f} us  {kernel}")
    sys.stdout.flush()
    return row


def commit() -> str:
    """The commit under test; `-dirty` marks a changed tree; 'unknown' outside a checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--match=-"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: pathlib.Path, row: dict[str, object]) -> None:
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line, with `methods`. Leaves with a message where it asks for nothing to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PRESETS, PLAIN]
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--csv", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--policies", nargs="+", choices=names, default=names, help="default: all active in the phase")
    parser.add_argument("--index-heads", nargs="+", type=int, default=[64, 32], choices=[32, 64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 65536, 131072])
    parser.add_argument("--rows", nargs="+", type=int, default=[8192], help="prefill: query rows of a call")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="decode: requests of a step")
    for size, what in SIZES.items():
        choices = topk_routed.ROUTED_HEADS if size == "heads" else None
        parser.add_argument(f"--{size}", nargs="+", type=int, choices=choices, help=f"{what} (default: the presets')")
    parser.add_argument("--stages", action="store_true", help="print the time of every kernel, stock's and ours")
    options = parser.parse_args(words)
    sizes = {size: getattr(options, size) for size in SIZES}
    options.methods = methods(options.phase, options.policies, sizes)
    if not options.methods:
        active = ", ".join(name for name in names if methods(options.phase, [name], {}))
        parser.error(f"--policies: expected one of {active} in {options.phase}, got {' '.join(options.policies)}")
    for method in options.methods:
        for problem in method.policy.problems(options.phase, index_heads=min(options.index_heads), topk=TOPK):
            parser.error(problem)
    return options


def main() -> int:
    options = arguments()
    cases = [
        (method, heads, rows, length)
        for method in options.methods
        for heads in options.index_heads
        for length in options.lengths
        for rows in (options.rows if options.phase == "prefill" else options.batches)
        if options.phase == "decode" or rows <= length
    ]
    correct = True
    for case in cases:
        row = measure(options.phase, *case, options.stages)
        append(options.csv, row)  # at once: should a later case fail, this one is kept
        correct = correct and bool(row["correct"])
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
