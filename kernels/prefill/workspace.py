"""A prefill call's inputs, its scratch, and the launches that go through both."""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass
from typing import Any

import torch

from sglang_misa.kernels.build import Target
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.layout import HEAD_DIM
from sglang_misa.kernels.prefill.plan import aligned
from sglang_misa.kernels.prefill.residual import Residual
from sglang_misa.kernels.structs import Failed, Inputs, ResidualColumn, Struct

MOST_BYTES = 1 << 30  # whatever the budget
LISTS_BYTES = 1 << 20  # step in which the row lists grow
SAMPLE_STAGE, THRESHOLD_STAGE, COLLECT_STAGE, SELECT_STAGE, REDO_STAGE = 1, 2, 4, 8, 16
ALL_STAGES = 31


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_slow_rows: dict[torch.device, torch.Tensor] = {}


def slow_rows(device: torch.device) -> torch.Tensor:
    """int64 [1] on the device: rows that its prefill kernels selected the slow way so far. Reading it synchronises."""
    if device not in _slow_rows:
        _slow_rows[device] = torch.zeros(1, dtype=torch.int64, device=device)
    return _slow_rows[device]


_scratch: dict[torch.device, torch.Tensor] = {}


def scratch_of(device: torch.device, size: int) -> torch.Tensor:
    """One buffer a device, grown when a call needs more; calls on one stream follow each other through it.

    It lies within 4 GiB whose addresses share their high half: the scorer counts in the low one.
    """
    if size > MOST_BYTES:
        raise ValueError(f"scratch: expected at most {MOST_BYTES} bytes, got {size}; lower the budget")
    held = _scratch.get(device)
    if held is None or held.numel() < size:
        if held is not None:
            held.record_stream(torch.cuda.current_stream(device))  # launches queued here may still use it
        _scratch.pop(device, None)
        del held
        crossing = []  # kept until one fits, or the allocator would return the same
        while True:
            found = torch.empty(size, dtype=torch.uint8, device=device)
            if found.data_ptr() >> 32 == (found.data_ptr() + size) >> 32:
                break
            crossing.append(found)
        _scratch[device] = found
    return _scratch[device]


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, checked. Shapes and dtypes as in `topk_routed`."""

    index_q: torch.Tensor
    head_gates: torch.Tensor
    head_ids: torch.Tensor
    index_k: torch.Tensor
    k_scale: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    residual: Residual | None = None

    def __post_init__(self) -> None:
        rows, heads = self.head_gates.shape
        fp8 = (torch.float8_e4m3fn, torch.uint8)
        expect("index_q", self.index_q, (rows, heads, HEAD_DIM), *fp8, cuda=True)
        expect("head_gates", self.head_gates, (rows, heads), torch.float32, cuda=True)
        expect("head_ids", self.head_ids, (rows, None), torch.int32, cuda=True)
        expect("index_k", self.index_k, (None, HEAD_DIM), *fp8, cuda=True)
        expect("k_scale", self.k_scale, (self.index_k.shape[0],), torch.float32, cuda=True)
        expect("ks", self.ks, (rows,), torch.int32, cuda=True)
        expect("ke", self.ke, (rows,), torch.int32, cuda=True)
        if self.residual is not None:
            self.residual.check(rows)

    @property
    def rows(self) -> int:
        return int(self.head_ids.shape[0])

    @property
    def columns(self) -> int:
        return int(self.head_ids.shape[1]) + (self.residual is not None)

    @property
    def keys(self) -> int:
        return int(self.index_k.shape[0])

    @property
    def device(self) -> torch.device:
        return self.index_q.device

    def struct(self) -> Inputs:
        residual = self.residual
        return Inputs(
            index_q=self.index_q,
            head_gates=self.head_gates,
            head_ids=self.head_ids,
            index_k=self.index_k,
            k_scale=self.k_scale,
            ks=self.ks,
            ke=self.ke,
            residual=ResidualColumn(query=residual and residual.query, scale=residual and residual.scale),
            rows=self.rows,
            index_heads=self.head_gates.shape[1],
            keys=self.keys,
        )


class Call(abc.ABC):
    """A call's scratch and its launches, so that a check can look between the stages."""

    def __init__(self, problem: Problem, target: Target, listed: int, size: int):
        """listed: rows that may fail at once; size: bytes of scratch for the plan's parts."""
        self.problem, self.target = problem, target
        # [number of failed rows, their list …, meeting counter of `redo`] then the plan's parts.
        self.listed, self.lists = listed, aligned(4 * (listed + 2), LISTS_BYTES)
        self.scratch = scratch_of(problem.device, self.lists + size)
        self.slow_rows = slow_rows(problem.device)

    @abc.abstractmethod
    def module(self) -> Any:
        """The compiled kernels."""

    @abc.abstractmethod
    def division(self) -> Struct:
        """The plan as the kernels have it."""

    def part(self, offset: int) -> int:
        """The address of the plan's part at `offset` bytes."""
        return int(self.scratch.data_ptr()) + self.lists + offset

    def failed(self, offset: int, ld: int) -> Failed:
        """The list of failed rows, whose scores, `ld` apart, have room from the plan's part at `offset` on."""
        return Failed(
            list=self.scratch,
            meeting=self.scratch.data_ptr() + 4 * (self.listed + 1),
            ever=self.slow_rows,
            at_once=min(self.problem.rows, int(self.scratch.numel() - self.lists - offset) // (4 * ld)),
        )

    def redone(self) -> int:
        """Rows that the last run, or its last pass, had to redo (synchronises)."""
        return int(self.scratch[:4].view(torch.int32).item())

    def run(self, stages: int = ALL_STAGES) -> None:
        """Launch everything in one call of the host's side; `stages` is a sum of *_STAGE."""
        problem = self.problem
        stream = torch.cuda.current_stream(problem.device).cuda_stream
        call = (problem.struct(), self.target.struct(), self.division())
        self.module().topk(*map(bytes, call), stages, stream)
