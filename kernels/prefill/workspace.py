"""A prefill call's scratch, and the launches that go through it."""

from __future__ import annotations

import abc
import functools
from typing import Any

import torch

from sglang_misa.kernels.build import stream_of
from sglang_misa.kernels.prefill.operands import Keys, Output, RoutedHeads, Rows, inputs
from sglang_misa.kernels.prefill.plan import aligned
from sglang_misa.kernels.structs import Failed, Struct

MOST_BYTES = 1 << 30  # whatever the budget
LISTS_BYTES = 1 << 20  # step in which the row lists grow
SAMPLE_STAGE, THRESHOLD_STAGE, COLLECT_STAGE = 1, 2, 4  # of a call's launches, in their order
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


class Call(abc.ABC):
    """A call, checked, with its scratch and its launches, so that a test can look between the stages."""

    def __init__(self, rows: Rows, keys: Keys, heads: RoutedHeads, output: Output):
        self.rows, self.keys, self.heads, self.output = rows, keys, heads, output
        self.structs = inputs(rows, keys, heads), output.struct(len(rows))

    def reserve(self, listed: int, size: int) -> None:
        """Take scratch. listed: rows that may fail at once; size: bytes for the plan's parts."""
        # [number of failed rows, their list …, meeting counter of `redo`] then the plan's parts.
        self.listed, self.lists = listed, aligned(4 * (listed + 2), LISTS_BYTES)
        self.scratch = scratch_of(self.rows.device, self.lists + size)
        self.slow_rows = slow_rows(self.rows.device)

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
            at_once=min(len(self.rows), int(self.scratch.numel() - self.lists - offset) // (4 * ld)),
        )

    def redone(self) -> int:
        """Rows that the last run, or its last pass, had to redo (synchronises)."""
        return int(self.scratch[:4].view(torch.int32).item())

    def run(self, stages: int = ALL_STAGES) -> None:
        """Launch everything in one call of the host's side; `stages` is a sum of *_STAGE."""
        structs = *self.structs, self.division()
        self.module().topk(*map(bytes, structs), stages, stream_of(self.rows.device))
