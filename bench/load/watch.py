"""Monitors of a block: whether the client kept up, and the GPUs' load meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

LOOP_PERIOD_S = 0.01
GPU_PERIOD_S = 0.5
Series = list[tuple[float, float]]


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
            "loop_lag_max": max(lags),
            "dispatch_delay_p99": float(np.percentile(delays, 99)),
            "client_cpu_share": self.cpu_share,
        }


class ServerWatch:
    """Reads gauges of the server in a thread every `period_s` seconds; with 0, or where it has none, it is empty."""

    def __init__(self, read: Callable[[], dict[str, float]], period_s: float) -> None:
        self._read, self._period = read, period_s
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> ServerWatch:
        if self._period > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._period > 0:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._period):
            self._samples.append((time.perf_counter(), self._read()))

    def series(self, start: float) -> dict[str, Series]:
        """Name → (seconds after `start`, value)."""
        names = sorted({name for _, sample in self._samples for name in sample})
        return {n: [(at - start, sample[n]) for at, sample in self._samples if n in sample] for n in names}


class GpuWatch:
    """Samples memory, power and energy of every GPU through NVML. Without pynvml or a driver it stays empty."""

    def __init__(self, *, local: bool) -> None:
        self._handles: list[Any] = []
        self._samples: list[tuple[float, float, float]] = []
        self._joules: float | None = None
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
            self._before = self._energy()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._handles:
            self._thread.join()
            after = self._energy()
            if self._before is not None and after is not None:
                self._joules = after - self._before

    def _energy(self) -> float | None:
        """Joules of all GPUs since their driver was loaded; None where they do not count."""
        try:
            return float(sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles)) / 1000
        except self._nvml.NVMLError:
            return None

    def _sample(self) -> None:
        while not self._stop.wait(GPU_PERIOD_S):
            try:
                used = sum(self._nvml.nvmlDeviceGetMemoryInfo(h).used for h in self._handles)
                watts = sum(self._nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1000
            except self._nvml.NVMLError:  # a GPU that does not tell, such as a part of one
                return
            self._samples.append((time.perf_counter(), used / 2**30, watts))

    def figures(self) -> dict[str, float]:
        """`gpu_memory_gib_max`, `gpu_power_w_mean`, `gpu_energy_j` over all GPUs of the machine; empty without NVML."""
        energy = {} if self._joules is None else {"gpu_energy_j": self._joules}
        if not self._samples:
            return energy
        _, memory, power = zip(*self._samples, strict=True)
        return {"gpu_memory_gib_max": max(memory), "gpu_power_w_mean": float(np.mean(power)), **energy}

    def series(self, start: float) -> dict[str, Series]:
        """The power of all GPUs: (seconds after `start`, watts)."""
        return {"gpu_power_w": [(at - start, watts) for at, _, watts in self._samples]} if self._samples else {}
