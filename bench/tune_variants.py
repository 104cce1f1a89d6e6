"""Build variants of the collector side by side, check each, then time them in turn: what each of its parts costs.

    python -m sglang_misa.bench.tune_variants [NAME ...]

A variant is a list of replacements in the sources of `topk_routed.cu`. Times are medians in µs of the collecting launch
alone and of the whole call; `exact` says that the rows looked at have the exact top k.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sglang_misa.bench.timing import event_us
from sglang_misa.bench.tune_scan import TOPK, normal, periodic, problem, wrong
from sglang_misa.kernels import build
from sglang_misa.kernels.build import Target
from sglang_misa.kernels.prefill import topk_routed as scan

Change = tuple[str, str, str]  # file, text, what stands there instead

TURN: list[Change] = [
    ("topk_routed.cu", "      shared.turn(left, place);\n", ""),
    ("topk_routed.cu", "{ shared.turn(left, place); }", "{}"),
]
TIES: list[Change] = [
    ("scorer.cuh", "if (lane_sink.begin(seat)) extent.all_lo = INT_MAX;", "lane_sink.begin(seat);"),
    ("threshold.cuh", " || threshold.refuses(score[q][half], key)", ""),
]
SWEEPS: list[Change] = [("scorer.cuh", "SWEEPS = 17", "SWEEPS = 16")]
# The extents of a thread's buffers, which then never change hands, in registers instead of shared memory.
HELD: list[Change] = [
    *TURN,
    ("topk_routed.cu", "const auto own = shared.init(task, ", "held = shared.init(task, "),
    ("topk_routed.cu", "place[q] = address(own.first(q))", "place[q] = address(held.first(q))"),
    ("topk_routed.cu", "place[q] = own.first(q)", "place[q] = held.first(q)"),
    ("topk_routed.cu", "const auto own = shared.own();", "const auto own = held;"),
    ("topk_routed.cu", "shared.own().end(q)", "held.end(q)"),
    ("topk_routed.cu", "    Shared& shared;\n", "    Shared& shared;\n    typename Shared::Extent held;\n"),
    ("topk_routed.cu", "return first[q][seat[sm90::thread()]]", "return first[q][threadIdx.x]"),
    ("topk_routed.cu", "return number(seat[sm90::thread()])", "return number(sm90::thread())"),
]
VARIANTS: dict[str, list[Change]] = {
    "as it is": [],
    "no turn": TURN,
    "turn 32": [("topk_routed.cu", "TURN = 8;", "TURN = 32;")],
    "no ties": TIES,
    "sweeps 16": SWEEPS,
    "held": HELD,
    "held, no ties, 16": [*HELD, *TIES, *SWEEPS],
}


def compiled(name: str, changes: Sequence[Change], folder: Path) -> Any:
    """The kernels with `changes`, each of which must apply."""
    from tvm_ffi.cpp import load

    sources = folder / name.replace(" ", "_").replace(",", "")
    shutil.copytree(Path(build.__file__).parent / "csrc/sm90", sources)
    for file, text, instead in changes:
        found = (sources / file).read_text()
        if text not in found:
            raise ValueError(f"{name}: expected {text!r} in {file}; bring the variant up to date")
        (sources / file).write_text(found.replace(text, instead))
    return load(
        f"misa_variant_{sources.name}",
        cuda_files=[str(sources / "topk_routed.cu")],
        extra_cuda_cflags=["-O3", "-DMISA_HEADS=8", "-DMISA_RESIDUAL=0"],
        extra_include_paths=[str(sources)],
        build_directory=str(sources / "build"),
    )


class Variant(scan.Ragged):
    """A call of a variant's kernels."""

    kernels: Any = None

    def module(self) -> Any:
        return self.kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(VARIANTS), help=f"of {list(VARIANTS)}")
    names = parser.parse_args().names
    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = "9.0a"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        built = dict(
            zip(names, pool.map(lambda name: compiled(name, VARIANTS[name], Path(folder)), names), strict=True)
        )
        scan.module = lambda *_: built[names[0]]  # for scores: one compilation less
        rows, long, short = 8192, 1 << 17, 1 << 15
        cases = {
            "random, 128K": lambda: problem(rows, normal(long, 128), 8),
            "random, 32K": lambda: problem(rows, normal(short, 128), 8),
            "period 32, 128K": lambda: problem(rows, periodic(long, 32, 0.3), 8),
        }
        for case, make in cases.items():
            p, calls, notes = make(), [], []
            for name in names:
                out = torch.full((p.rows, TOPK), -7, dtype=torch.int32, device="cuda")
                call = Variant(p, Target(out))
                call.kernels = built[name]
                before = int(call.slow_rows)
                call.run()
                slow = int(call.slow_rows) - before
                fault = "wrong" if wrong(p, out) else "exact"
                notes.append(f"{fault}, {slow} slow rows")
                calls += [functools.partial(call.run, scan.COLLECT_STAGE), call.run]
            times = event_us(calls, repeats=11)
            for name, collect, whole, note in zip(names, times[::2], times[1::2], notes, strict=True):
                print(f"{case:18} {name:20} collect {collect:7.0f}  call {whole:7.0f}  {note}", flush=True)


if __name__ == "__main__":
    main()
