"""What those who look at a running server cost: one look of the canary and of the audit, and its share of a step.

    python -m sglang_misa.bench.watching [--preset faithful] [--rows 16] [--length 131072] [--step-ms MS] …

One layer of made-up requests, the classes that serve. The canary (`--misa-verify-stats`) looks at each step: `gpu_us`
is what its kernels take, `host_us` what the scheduler's thread does, which may run ahead of the GPU. The audit
(`--misa-audit-rows`) looks at one replay of a decode graph in `--every`, and at one prefill call of a layer in as many;
the host waits for it, so `wall_us` is all of it. `share` is a look, spread over the steps between two of them, by a
step's time as you have measured it on your server (`--step-ms`; `--chunk-ms` of a prefill chunk of `--layers` layers).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from sglang_misa import versions
from sglang_misa.arguments import at_least
from sglang_misa.bench import layer as bench
from sglang_misa.bench.timing import event_us, host_us, wall_us
from sglang_misa.call import Run
from sglang_misa.canary import Canary
from sglang_misa.config import PRESETS, Audit
from sglang_misa.kernels.layout import PAGE
from sglang_misa.runtime import Runtime
from sglang_misa.selection import Selector

INDEX_HEADS, CHUNK = 64, 8192


def watched(preset: str, shape: bench.Shape, audited: int) -> tuple[bench.Layer, Selector]:
    """A layer whose page statistics are there, and what selects in it: it audits `audited` rows of every call."""
    layer = bench.Layer.make(shape)
    config = PRESETS[preset].model_copy(update={"audit": Audit(rows=audited, every=1)})
    serving = Selector(
        Runtime(config, INDEX_HEADS, bench.TOPK, shape.length, shape.device, rank=0, ranks=1), [layer.index_k_pages]
    )
    serving.engine.pages_written(0, torch.arange(len(layer.index_k_pages), device=shape.device) * PAGE + PAGE - 1)
    return layer, serving


def canary_us(preset: str, rows: int, length: int) -> tuple[float, float]:
    """(GPU, host) µs of the canary's look at a step of `rows` requests."""
    layer, serving = watched(preset, bench.Shape("decode", INDEX_HEADS, rows, length, "random"), 0)
    place = torch.arange(length, device="cuda")
    req_to_token = layer.page_table[:, place // PAGE] * PAGE + (place % PAGE).int()
    canary, ids = Canary(serving.engine, [0], "raise"), torch.arange(rows, device="cuda")
    names = [str(row) for row in range(rows)]

    def look() -> None:
        canary.step(req_to_token, ids, layer.seq_lens, names)

    return event_us([look])[0], host_us(look)


def decode_audit_us(preset: str, rows: int, length: int, audited: int) -> float:
    """Wall µs of the audit of one layer in one decode step."""
    layer, serving = watched(preset, bench.Shape("decode", INDEX_HEADS, rows, length, "random"), audited)
    call = layer.decode_call(0, torch.full((rows, bench.TOPK), -1, dtype=torch.int32, device="cuda"))
    serving.engine.decode(call, PRESETS[preset].decode)
    return wall_us(lambda: serving.auditor.look_at_decode(call))


def prefill_audit_us(preset: str, length: int, audited: int) -> float:
    """Wall µs of the audit of one layer in one prefill call."""
    layer, serving = watched(preset, bench.Shape("prefill", INDEX_HEADS, CHUNK, length, "random"), audited)
    call = layer.extend_call(torch.full((CHUNK, bench.TOPK), -1, dtype=torch.int32, device="cuda"))
    serving.engine.extend(call, [(PRESETS[preset].prefill, Run(call.spans, 0, CHUNK))])
    return wall_us(lambda: serving.auditor.look_at_extend(call, [Run(call.spans, 0, CHUNK)]))


def _share(us: float, each: float, of_ms: float | None) -> str:
    return "" if of_ms is None else f"  share={us * each / of_ms / 1e3:.4%}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.watching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decoding = [name for name, config in PRESETS.items() if config.decode.active]
    parser.add_argument("--preset", choices=decoding, default="faithful")
    parser.add_argument("--rows", type=at_least(1), default=16, help="requests of a decode step")
    parser.add_argument("--length", type=at_least(1), default=131072, help="tokens of each")
    parser.add_argument("--layers", type=at_least(1), default=bench.LAYERS, help="of the model, for --chunk-ms")
    parser.add_argument("--audited", type=at_least(1), default=4, help="rows of an audited call")
    parser.add_argument("--every", type=at_least(1), default=Audit().every, help="the server's --misa-audit-every")
    parser.add_argument("--step-ms", type=float, help="ms of a decode step on your server")
    parser.add_argument("--chunk-ms", type=float, help=f"ms of a prefill chunk of {CHUNK} tokens on your server")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("expected a GPU, got none; run it where the server will run", file=sys.stderr)
        return 2
    place = f"device={torch.cuda.get_device_name()} sglang={versions.installed()} preset={options.preset}"
    print(f"{place} rows={options.rows} length={options.length} audited={options.audited} every={options.every}")
    gpu, host = canary_us(options.preset, options.rows, options.length)
    print(f"canary          gpu_us={gpu:.1f}  host_us={host:.1f}{_share(gpu, 1, options.step_ms)}", flush=True)
    wall = decode_audit_us(options.preset, options.rows, options.length, options.audited)
    print(f"audit, decode   wall_us={wall:.0f}{_share(wall, 1 / options.every, options.step_ms)}", flush=True)
    wall = prefill_audit_us(options.preset, options.length, options.audited)
    print(f"audit, prefill  wall_us={wall:.0f}{_share(wall, options.layers / options.every, options.chunk_ms)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
