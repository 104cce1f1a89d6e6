"""Whether the client itself kept up, and what the GPUs did meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Any

import numpy as np

LOOP_PERIOD_S = 0.01
GPU_PERIOD_S = 0.5


class LoopWatch:
    """Measures, inside the event loop, how late it wakes up and how much of one CPU it uses."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self.delays: list[float] = []  # dispatch delays, added by the runner

    async def __aenter__(self) -> LoopWatch:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self.cpu_share = (time.thread_time() - self._cpu) / max(time.perf_counter() - self._wall, 1e-9)

    async def _sample(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LOOP_PERIOD_S)
            self._lags.append(time.perf_counter() - before - LOOP_PERIOD_S)

    def figures(self) -> dict[str, float]:
        """Seconds of event-loop lag and dispatch delay, and the client's share of one CPU."""
        lags, delays = self._lags or [0.0], self.delays or [0.0]
        return {
            "loop_lag_p50": float(np.percentile(lags, 50)),
            "loop_lag_p99": float(np.percentile(lags, 99)),
            "dispatch_delay_p99": float(np.percentile(delays, 99)),
            "client_cpu_share": self.cpu_share,
        }


class GpuWatch:
    """Samples memory and power of every GPU through NVML in a thread. Without pynvml or a driver it stays empty."""

    def __init__(self, *, local: bool) -> None:
        self._handles: list[Any] = []
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        if local:
            try:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            except Exception:  # no package, no driver, no permission: there is nothing to sample
                self._handles = []
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> GpuWatch:
        if self._handles:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._handles:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(GPU_PERIOD_S):
            used = sum(self._nvml.nvmlDeviceGetMemoryInfo(h).used for h in self._handles)
            watts = sum(self._nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1000
            self._samples.append((used / 2**30, watts))

    def figures(self) -> dict[str, float]:
        """`gpu_memory_gib_max` and `gpu_power_w_mean` over all GPUs of this machine; empty without samples."""
        if not self._samples:
            return {}
        memory, power = zip(*self._samples, strict=True)
        return {"gpu_memory_gib_max": max(memory), "gpu_power_w_mean": float(np.mean(power))}
