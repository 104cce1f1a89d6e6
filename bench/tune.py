"""Launch sizes of HISA's decode kernels, each of them timed, and the time that page statistics add to a step.

    python -m sglang_misa.bench.tune keep score upkeep

The defaults in kernels/decode come from `keep` and `score`. Times are medians of CUDA-graph replays over rotating
inputs. A cut that selects otherwise than the default is marked.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.bench.layer import LAYERS, TOPK, Layer, Shape
from sglang_misa.bench.timing import graph_us
from sglang_misa.kernels.decode.keep_blocks import KeepTuning
from sglang_misa.kernels.decode.operands import Chosen, PagedRows
from sglang_misa.kernels.decode.topk_blocks import Cut, DecodeScratch, ScoreTuning, decode_topk
from sglang_misa.kernels.layout import HEAD_DIM
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_slots

BLOCKS, BLOCK_SIZE = 64, 128
SHAPES = [(1, 131072), (4, 131072), (16, 131072), (64, 131072), (1, 32768)]  # rows, length
COPIES = 4  # of the inputs


CUTS = {
    "keep": [Cut(keep=KeepTuning(p, w)) for p, w in ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8))],
    "score": [Cut(score=ScoreTuning(p, w)) for p, w in ((1, 4), (2, 4), (2, 8), (4, 4), (4, 8))],
}


@dataclass(frozen=True)
class Step:
    """A layer of a decode step."""

    layer: Layer
    means: Tensor
    scratch: DecodeScratch
    out: Tensor

    @classmethod
    def make(cls, rows: int, length: int, seed: int) -> Step:
        layer = Layer.make(Shape("decode", 64, rows, length, "random"), seed)
        means = torch.zeros(len(layer.index_k_pages), HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        update_slots(layer.index_k_pages, means, torch.arange(63, means.shape[0] * 64, 64, device="cuda"))
        width = layer.page_table.shape[1]
        scratch = DecodeScratch.allocate(rows, width, BLOCKS, BLOCK_SIZE, means.device)
        return cls(layer, means, scratch, torch.empty(rows, TOPK, dtype=torch.int32, device="cuda"))

    def select(self, cut: Cut) -> None:
        la = self.layer
        rows = PagedRows(la.index_q, la.head_gates, la.index_k_pages, la.page_table, la.seq_lens)
        decode_topk(rows, self.means, scratch=self.scratch, out=Chosen(self.out), cut=cut)


def cuts(stage: str) -> Iterator[str]:
    """One line for each cut of `stage` on each shape."""
    for rows, length in SHAPES:
        steps = [Step.make(rows, length, seed) for seed in range(COPIES)]
        steps[0].select(Cut())
        expected = steps[0].out.clone()
        for cut in CUTS[stage]:
            name = f"{rows:4d} × {length >> 10}K {getattr(cut, stage)}"
            try:
                (us,) = graph_us([[functools.partial(step.select, cut) for step in steps]])
            except RuntimeError as error:  # a cut may not fit the chip: the others still count
                yield f"{name}: {str(error)[:80]}"
                continue
            steps[0].select(cut)
            yield f"{name} {us:8.2f} us" + ("" if torch.equal(steps[0].out, expected) else "  SELECTS OTHERWISE")


def upkeep() -> Iterator[str]:
    """What the page means of all layers add to a step: one launch behind the selections of its layers."""
    for rows, (name, length) in itertools.product((1, 4, 16, 64), (("idle", 32765), ("every row ends a page", 32768))):
        steps = [Step.make(rows, length, seed) for seed in range(COPIES)]
        order = [steps[i % COPIES] for i in range(LAYERS)]
        layers = Layers.of([s.layer.index_k_pages for s in order], [s.means for s in order])
        selections = [functools.partial(step.select, Cut()) for step in order]
        table, lens = steps[0].layer.page_table, steps[0].layer.seq_lens
        update: Callable[[], object] = functools.partial(update_last_page_means, layers, table, lens)
        without, together, alone = graph_us([selections, [*selections, update], [update] * 8])
        added = together * (LAYERS + 1) - without * LAYERS
        yield (
            f"{rows:4d} rows, {LAYERS} layers, {name}: {without * LAYERS:8.1f} us, means add {added:5.1f} "
            f"({added / (without * LAYERS):.2%}), alone {alone:.1f}"
        )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", choices=[*CUTS, "upkeep"])
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, got none; run it on the machine of the server")
    for what in options.what:
        for line in upkeep() if what == "upkeep" else cuts(what):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
