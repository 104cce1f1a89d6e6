"""How GPU work is timed: medians of events with a cold L2, or of CUDA-graph replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def event_us(call: Callable[[], object], repeats: int = 15, flush_bytes: int = 256 << 20) -> float:
    """Median µs of `call` after a flush of the L2 cache, during which the host launches ahead."""
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    return _median_us(call, repeats, before=flush.zero_)


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
