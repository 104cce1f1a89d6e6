"""Bench of host-cache load-back: the time that page statistics add when cached tokens return to the KV pool.

    python -m sglang_misa.bench.load_back [--tokens 131072] [--layers 61] [--io-backend kernel] [--layout page_first]

SGLang's own pool, host pools and cache controller copy the tokens of one long prompt back, all layers of DeepSeek-V3.2
by default, in turn with stock DSA (`dsa`, which keeps no statistics) and with each preset. Before anything is timed,
the keys must be those that were saved, and every statistic that of its page, bit by bit. A preset's `share` is the time
of its statistics alone by that of stock's load-back; `added` is what the whole load-back took longer by.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from sglang_misa import versions
from sglang_misa.arguments import at_least, device, file_to_write
from sglang_misa.bench.host_cache import HostCache
from sglang_misa.bench.layer import LAYERS, TOPK
from sglang_misa.bench.table import append
from sglang_misa.bench.timing import event_us
from sglang_misa.config import PRESETS
from sglang_misa.engines import Engine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.patches import register
from sglang_misa.runtime import Runtime
from sglang_misa.selection import Selector

STOCK = "dsa"
PRESETS_TIMED = ("hisa", "fast", "faithful")
INDEX_HEADS = 64
HOST_ROOM = 1.1  # host slots for one device slot: SGLang wants more of them
FINITE = 120  # bytes under it make finite keys and scales


@dataclass(frozen=True)
class Timing:
    """One row of the table; times are medians in ms."""

    device: str
    sglang: str
    tokens: int
    layers: int
    layout: str
    io_backend: str
    preset: str
    load_back_ms: float
    host_ms: float  # that the scheduler's thread is held
    statistics_ms: float
    share: float
    added: float


class LoadBack:
    """One prompt's pages in a host cache, and what loads them back."""

    def __init__(self, tokens: int, layers: int, device: str, layout: str, io_backend: str):
        self.device = device
        self.cache = HostCache(
            tokens // PAGE,
            layers,
            device,
            hicache_ratio=HOST_ROOM,
            hicache_mem_layout=layout,
            hicache_io_backend=io_backend,
        )
        self.pages: Sequence[Tensor] = self.cache.pool.index_k_with_scale_buffer
        for pages in self.pages:
            pages.random_(0, FINITE)
        slots = self.cache.allocator.alloc(tokens)
        self._saved = [pages[_pages(slots)] for pages in self.pages]
        self._host_slots = self.cache.offload(slots)
        self._wait(self.cache.controller.ack_write_queue)
        self.cache.allocator.free(slots)

    def selector(self, preset: str) -> Selector:
        config = PRESETS[preset]
        runtime = Runtime(config, INDEX_HEADS, TOPK, len(self.pages[0]) * PAGE, self.device, rank=0, ranks=1)
        return Selector(runtime, self.pages)

    def run(self, selector: Selector) -> tuple[float, float, Tensor]:
        """(ms of the copies, ms that the host was held, the slots they went to, free again)."""
        self.cache.pool.misa_selector = selector
        allocator = self.cache.allocator
        order = torch.randperm(len(allocator.free_pages), device=self.device)
        allocator.free_pages = allocator.free_pages[order]  # those of a pool in use lie anywhere
        begin = time.perf_counter()
        slots = self.cache.load_back(self._host_slots)
        held = time.perf_counter()
        taken = self._wait(self.cache.controller.ack_load_queue)
        allocator.free(slots)
        return (taken or held - begin) * 1e3, (held - begin) * 1e3, slots

    @staticmethod
    def _wait(acknowledged: list) -> float | None:  # type: ignore[type-arg]
        """Seconds on the device from start to end of the copies; None where it tells no time."""
        ack = acknowledged.pop()
        ack.finish_event.synchronize()
        return ack.start_event.elapsed_time(ack.finish_event) / 1e3 if ack.timing_enabled else None

    def check(self, engine: Engine, slots: Tensor, kept: bool) -> None:
        """Raise RuntimeError where pages at `slots` are not those saved, or their statistics, if `kept`, not theirs."""
        at = _pages(slots)
        for layer, (pages, saved) in enumerate(zip(self.pages, self._saved, strict=True)):
            if not torch.equal(pages[at], saved):
                raise RuntimeError(f"layer {layer}: expected the keys that were saved, got others")
            if kept and engine.compared(layer, at)[1].any():
                raise RuntimeError(f"layer {layer}: expected the statistics of its pages, got others")

    def statistics_ms(self, engine: Engine, slots: Tensor) -> float:
        """ms of the statistics of all layers' pages at `slots`, nothing beside them."""
        last_slots = slots[PAGE - 1 :: PAGE].contiguous()

        def every_layer() -> None:
            for layer in range(len(self.pages)):
                engine.pages_written(layer, last_slots)

        if self.device == "cuda":
            return event_us([every_layer])[0] / 1e3
        begin = time.perf_counter()
        every_layer()
        return (time.perf_counter() - begin) * 1e3


def _pages(slots: Tensor) -> Tensor:
    return slots[::PAGE].long() // PAGE


def measure(bench: LoadBack, presets: Sequence[str], repeats: int) -> dict[str, tuple[float, float, float]]:
    """(load-back, host, statistics) in ms by preset, stock's among them. Raises RuntimeError on a wrong result."""
    selectors = {preset: bench.selector(preset) for preset in (STOCK, *presets)}
    alone = dict.fromkeys(selectors, 0.0)
    for preset, selector in selectors.items():
        engine = selector.engine
        for means in engine.stats.means:
            means.fill_(float("nan"))
        slots = bench.run(selector)[2]
        bench.check(engine, slots, kept=preset != STOCK)
        if preset != STOCK:
            alone[preset] = bench.statistics_ms(engine, slots)
    taken: dict[str, list[tuple[float, float]]] = {preset: [] for preset in selectors}
    for _ in range(repeats):
        for preset, selector in selectors.items():
            taken[preset].append(bench.run(selector)[:2])
    found = {}
    for preset, times in taken.items():
        load_back, host = (statistics.median(column) for column in zip(*times, strict=True))
        found[preset] = (load_back, host, alone[preset])
    return found


def rows(arguments: argparse.Namespace) -> list[Timing]:
    """The table for the given command line."""
    version, device = versions.installed(), arguments.device
    hook = [patch for patch in register.PATCHES if patch.wrapper.endswith("pool:load_to_device_per_layer")]
    register.apply(version, hook)
    try:
        place = (arguments.tokens, arguments.layers, device, arguments.layout, arguments.io_backend)
        found = measure(LoadBack(*place), arguments.presets, arguments.repeats)
    finally:
        register.undo()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    stock = found[STOCK][0]
    return [
        Timing(
            name,
            version,
            arguments.tokens,
            arguments.layers,
            arguments.layout,
            arguments.io_backend,
            preset,
            round(load_back, 3),
            round(host, 3),
            round(alone, 3),
            round(alone / stock, 5),
            round(load_back / stock - 1, 5),
        )
        for preset, (load_back, host, alone) in found.items()
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_misa.bench.load_back", description=__doc__)
    parser.add_argument("--tokens", type=at_least(PAGE), default=131072, help=f"of the prompt, a multiple of {PAGE}")
    parser.add_argument("--layers", type=at_least(1), default=LAYERS)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--io-backend", default="kernel", help="SGLang's --hicache-io-backend")
    parser.add_argument("--layout", default="page_first", help="SGLang's --hicache-mem-layout")
    parser.add_argument("--presets", nargs="+", choices=[*PRESETS], default=PRESETS_TIMED)
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--csv", type=file_to_write, help="append the rows there")
    arguments = parser.parse_args(argv)
    try:
        found = rows(arguments)
    except ValueError as error:  # SGLang's word on a host pool that does not fit, or on a layout
        parser.error(f"expected a host pool that SGLang can make, got: {error} Lower --layers, or change --layout")
    for row in found:
        print(*(f"{name}={value}" for name, value in asdict(row).items()))
    if arguments.csv is not None:
        append(arguments.csv, [field.name for field in fields(Timing)], map(asdict, found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
