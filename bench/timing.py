"""Timing of GPU work: medians of CUDA events with a cold L2, or of CUDA-graph replays in turn; also by kernel."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

HEAD_START = 8_000_000  # cycles, about 4 ms: longer than a slow host needs for the launches of one call
FLUSH_BYTES = 256 << 20  # more than an L2 cache holds
CALLS, REPLAYS, TRACES = 15, 20, 5  # of which a median or a mean is taken


def event_us(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median µs that each of `calls` takes on the GPU, in turn: after a flush of the L2 cache, all launches queued."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        flush.zero_()
        torch.cuda._sleep(HEAD_START)

    for call in calls:
        for _ in range(3):
            call()
    return _median_us(calls, CALLS, before=prepare)


def synchronize(device: str) -> None:
    """Wait for `device`, if it is one to wait for."""
    if device != "cpu":
        torch.cuda.synchronize()


def host_us(call: Callable[[], object]) -> float:
    """Median µs that the host needs to launch `call`."""
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return float(statistics.median(times))


def wall_us(call: Callable[[], object]) -> float:
    """Median µs of `call` from an idle device to an idle device, the host's part among them."""

    def to_its_end() -> None:
        call()
        torch.cuda.synchronize()

    return host_us(to_its_end)


def graph_us(kinds: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
    """Median µs of a call of each kind, in turn: its calls are replayed from one CUDA graph.

    Several calls a kind have inputs of their own, so that L2 does not hold one.
    """
    graphs = [_captured(calls) for calls in kinds]
    times = _median_us([graph.replay for graph in graphs], REPLAYS)
    return [us / len(calls) for us, calls in zip(times, kinds, strict=True)]


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
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
    return graph


def kernel_us(call: Callable[[], object]) -> dict[str, float]:
    """Mean µs of each kernel in `call`, cold L2, by name; launches of one name are added up."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    call()
    sums: dict[str, float] = {}
    for _ in range(TRACES):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        for event in sorted(trace.events(), key=lambda e: e.time_range.start):
            if event.device_type == torch.autograd.DeviceType.CUDA:
                name = _short(event.name)
                sums[name] = sums.get(name, 0.0) + event.time_range.elapsed_us() / TRACES
    return sums


def _short(kernel: str) -> str:
    """`score_kernel<Hits>` of `void misa::score_kernel<misa::Hits>(misa::Task, …)`."""
    plain = re.sub(r"^void |\(anonymous namespace\)::|\b(misa|at|native)::", "", kernel)
    match = re.match(r"[\w: ]+(<[\w:]+>)?", plain)
    return match.group().strip() if match else plain


def _median_us(
    calls: Sequence[Callable[[], object]], repeats: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop) * 1e3)
    return [float(statistics.median(taken)) for taken in times]
