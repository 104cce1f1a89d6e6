"""How GPU work is timed: medians of events with a cold L2, or of CUDA-graph replays; and kernel by kernel."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

HEAD_START = 8_000_000  # cycles, about 4 ms: longer than a slow host needs for the launches of one call


def event_us(call: Callable[[], object], repeats: int = 15, flush_bytes: int = 256 << 20) -> float:
    """Median µs that `call` takes on the GPU, after a flush of the L2 cache and with all its launches queued."""
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)

    for _ in range(3):
        call()
    return _median_us(call, repeats, before=prepare)


def host_us(call: Callable[[], object], repeats: int = 15) -> float:
    """Median µs that the host needs to launch `call`."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return float(statistics.median(times))


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median µs of one of `calls`, all replayed from one CUDA graph: several inputs, so that L2 does not hold one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _median_us(graph.replay, repeats) / len(calls)


def kernel_us(call: Callable[[], object], repeats: int = 5, flush_bytes: int = 256 << 20) -> dict[str, float]:
    """Mean µs of each kernel in `call`, cold L2, by name; launches of one name are added up."""
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
    call()
    sums: dict[str, float] = {}
    for _ in range(repeats):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        for event in sorted(trace.events(), key=lambda e: e.time_range.start):
            if event.device_type == torch.autograd.DeviceType.CUDA:
                name = _short(event.name)
                sums[name] = sums.get(name, 0.0) + event.time_range.elapsed_us() / repeats
    return sums


def _short(kernel: str) -> str:
    """`score_kernel<Hits>` of `void misa::score_kernel<misa::Hits>(misa::Task, …)`."""
    plain = re.sub(r"^void |\(anonymous namespace\)::|\b(misa|at|native)::", "", kernel)
    match = re.match(r"[\w: ]+(<[\w:]+>)?", plain)
    return match.group().strip() if match else plain


def _median_us(call: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return float(statistics.median(times))
