"""What those who look at a running server cost: one look of the canary and of the audit, and its share of a step.

    python -m sglang_misa.bench.watching [--preset faithful] [--rows 16] [--length 131072] [--step-ms MS] …

One layer of made-up requests, the classes that serve; nothing is timed before each look has found what it must. The
canary (`--misa-verify-stats`) looks at each step. The audit (`--misa-audit-rows`) looks at one replay of a decode graph
in `--every`, and at one prefill call of a layer in as many. `gpu_us` is what a look's kernels take, `host_us` how long
it holds the scheduler's thread, which runs ahead of the GPU for the canary and waits for it in an audit. `share` is the
time of a step that a look takes, spread over the steps between two of them: that of the GPU for the canary, both for an
audit. A step's time is what you have measured on your server (`--step-ms`; `--chunk-ms` of a prefill chunk of
`--layers` layers).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from sglang_misa import versions
from sglang_misa.arguments import at_least, file_to_write
from sglang_misa.bench import check, kernels, timing
from sglang_misa.bench import layer as bench
from sglang_misa.bench.commit import commit
from sglang_misa.call import Output, Run
from sglang_misa.canary import SAMPLE, Canary, StaleStatistics
from sglang_misa.config import PRESETS, Audit, Phase
from sglang_misa.kernels.layout import PAGE
from sglang_misa.metrics import recorder
from sglang_misa.runtime import Runtime
from sglang_misa.selection import Selector

INDEX_HEADS, CHUNK = 64, 8192
BUDGETS = {"canary": 0.005, "audit": 0.01}  # of a step
NEAR = 1e-3  # of recall: two of the 2048 tokens, as rounding decides at the cut


@dataclass(frozen=True)
class Look:
    """What one look costs, and the share of a step's time that is, where that is known."""

    look: str
    gpu_us: float
    host_us: float
    looks_a_step: float  # on average
    step_ms: float | None
    share: float | None
    budget: float

    @classmethod
    def of(cls, look: str, gpu_us: float, host_us: float, looks: float, step_ms: float | None) -> Look:
        kind = look.split(",")[0]
        us = gpu_us if kind == "canary" else host_us
        share = None if step_ms is None else round(us * looks / step_ms / 1e3, 6)
        return cls(look, round(gpu_us, 1), round(host_us, 1), looks, step_ms, share, BUDGETS[kind])

    def __str__(self) -> str:
        told = f"{self.look:<16} gpu_us={self.gpu_us:<8} host_us={self.host_us:<8}"
        return told if self.share is None else f"{told} share={self.share:.3%} of at most {self.budget:.1%}"


@dataclass(frozen=True)
class Watched:
    """A layer whose page statistics are there, where every row has selected its newest tokens."""

    layer: bench.Layer
    serving: Selector
    output: Output

    @classmethod
    def make(cls, preset: str, shape: bench.Shape, audited: int) -> Watched:
        """Of a server that audits `audited` rows of every call."""
        layer = bench.Layer.make(shape)
        config = PRESETS[preset].model_copy(update={"audit": Audit(rows=audited, every=1)})
        runtime = Runtime(config, INDEX_HEADS, bench.TOPK, shape.length, shape.device, rank=0, ranks=1)
        serving = Selector(runtime, [layer.index_k_pages])
        layer.keep_statistics(serving.engine)
        ids = torch.empty(shape.rows, bench.TOPK, dtype=torch.int32, device=shape.device)
        output = Output(ids, layer.page_table, layer.row_batch)
        newest = torch.arange(1, bench.TOPK + 1, device=shape.device)
        ids.copy_(output.of(layer.seq_lens.long().unsqueeze(1) - newest))
        return cls(layer, serving, output)

    def canary(self) -> Callable[[], None]:
        """A look of a canary at a step of all requests. Raises RuntimeError where it misses a bit, or tells of none."""
        length, device = self.layer.shape.length, self.layer.shape.device
        place, rows = torch.arange(length, device=device), torch.arange(len(self.layer.page_table), device=device)
        req_to_token = self.layer.page_table[:, place // PAGE] * PAGE + (place % PAGE).int()
        step = req_to_token, rows, self.layer.seq_lens, [str(row) for row in rows.tolist()]

        def finds() -> bool:
            canary = Canary(self.serving.engine, [0], "raise")
            try:
                for _ in range(2):  # at the second it is told what it saw at the first
                    canary.step(*step)
                    timing.synchronize(device)
            except StaleStatistics:
                return True
            return False

        for kind in self.serving.engine.stats.kinds(0):
            for flipped in (True, False):
                kind.view(torch.uint8)[:, -1] ^= 1
                if finds() != flipped:
                    raise RuntimeError(f"canary: expected a mismatch where a bit is flipped alone, {flipped=}")
        canary = Canary(self.serving.engine, [0], "raise")
        return lambda: canary.step(*step)

    def audit(self, phase: Phase) -> Callable[[], None]:
        """A look of the audit at a call of all rows. Raises RuntimeError where `check` finds another recall."""
        auditor, rows, look = self.serving.auditor, self.layer.shape.rows, self._audit(phase)
        twin = replace(auditor, numbers=copy.copy(auditor.numbers))  # draws the rows that the look will
        audited = twin.rows(0, rows) if phase == "prefill" else twin.decode_rows(self.layer.seq_lens).tolist()
        look()
        told = recorder.status()["recall"][phase]["0"]["recall"]
        seen = {t: self.layer.row(t, self.serving.engine, 0) for t in audited}
        chosen = {t: self.layer.positions(t, self.output.ids[t]) for t in audited}
        expected = statistics.mean(check.recall(seen[t], chosen[t], bench.TOPK) for t in audited)
        if abs(told - expected) > NEAR:
            raise RuntimeError(f"audit, {phase}: expected a recall of {expected:.4f}, got {told:.4f}")
        return look

    def _audit(self, phase: Phase) -> Callable[[], None]:
        if phase == "decode":
            step = self.layer.decode_call(0, self.output.ids)
            return lambda: self.serving.auditor.look_at_decode(step)
        call = self.layer.extend_call(self.output.ids)
        return lambda: self.serving.auditor.look_at_extend(call, Run.whole(call.spans))


def measure(options: argparse.Namespace) -> Iterator[Look]:
    """The looks of the given command line, one after another. Raises RuntimeError on a wrong result."""
    decode = bench.Shape("decode", INDEX_HEADS, options.rows, options.length, "random")
    prefill = bench.Shape("prefill", INDEX_HEADS, min(CHUNK, options.length), options.length, "random")
    a_chunk = options.layers / options.every
    for shape in (decode, prefill):
        watched = Watched.make(options.preset, shape, options.audited)
        if shape is decode:
            look = watched.canary()
            times = timing.event_us([look])[0], timing.host_us(look)
            yield Look.of(f"canary, {SAMPLE} pages", *times, 1.0, options.step_ms)
        look = watched.audit(shape.phase)
        step = (1 / options.every, options.step_ms) if shape is decode else (a_chunk, options.chunk_ms)
        gpu_us = sum(timing.kernel_us(look).values())
        yield Look.of(f"audit, {shape.phase}", gpu_us, timing.wall_us(look), *step)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.watching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decoding = [name for name, config in PRESETS.items() if config.decode.active]
    parser.add_argument("--preset", choices=decoding, default="faithful")
    parser.add_argument("--rows", type=at_least(1), default=16, help="requests of a decode step")
    parser.add_argument("--length", type=at_least(bench.TOPK + 1), default=131072, help="tokens of each")
    parser.add_argument("--layers", type=at_least(1), default=bench.LAYERS, help="of the model, for --chunk-ms")
    parser.add_argument("--audited", type=at_least(1), default=4, help="rows of an audited call")
    parser.add_argument("--every", type=at_least(1), default=Audit().every, help="the server's --misa-audit-every")
    parser.add_argument("--step-ms", type=float, help="ms of a decode step on your server")
    parser.add_argument("--chunk-ms", type=float, help=f"ms of a prefill chunk of {CHUNK} tokens on your server")
    parser.add_argument("--json", type=file_to_write, help="write what was measured there")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("expected a GPU, got none; run it where the server will run", file=sys.stderr)
        return 2
    logging.getLogger("sglang_misa").setLevel(logging.CRITICAL)  # what is flipped on purpose is no news
    sizes = {name: getattr(options, name) for name in ("preset", "rows", "length", "layers", "audited", "every")}
    place = {
        "gpu": torch.cuda.get_device_name(),
        "sglang": versions.installed(),
        "torch": torch.__version__,
        "driver": kernels.driver(),
        "commit": commit(),
    }
    print("  ".join(f"{name}={value}" for name, value in (place | sizes).items()), flush=True)
    looks = []
    for look in measure(options):
        print(look, flush=True)
        looks.append(look)
    if options.json is not None:
        options.json.write_text(json.dumps([place | sizes | asdict(look) for look in looks], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
