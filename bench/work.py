"""Least FLOP (prefill) and bytes (decode) that a policy needs: the bench's lower bounds and rates derive from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sglang_misa.config import Phase, SelectionPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

PAIR = 2 * HEAD_DIM  # FLOP of a query head and a key
KEY_BYTES = HEAD_DIM + 4  # fp8 and a scale
MEAN_BYTES = 2 * HEAD_DIM  # bf16
SKETCH_SCALE_BYTES = 2  # of a key


@dataclass(frozen=True)
class Chip:
    """Dense FLOP/s and bytes/s of a data sheet."""

    fp8: float
    bf16: float
    memory: float


UNKNOWN = Chip(*(float("nan"),) * 3)
CHIPS = {  # by the name that CUDA gives the device
    "NVIDIA H100 80GB HBM3": Chip(1979e12, 989e12, 3.35e12),
    "NVIDIA H200": Chip(1979e12, 989e12, 4.8e12),
}


@dataclass(frozen=True)
class Work:
    """FLOP of fp8 and of bf16 products, and bytes; 0 for what does not bind the phase."""

    fp8: float = 0.0
    bf16: float = 0.0
    bytes: float = 0.0

    @property
    def fp8_time(self) -> float:
        """FLOP of fp8 that take as long as all of it: those of bf16 take twice as long."""
        return self.fp8 + 2 * self.bf16

    def floor_us(self, chip: Chip) -> float:
        """µs at the chip's rates, one after the other; nan for an unknown chip."""
        return (self.fp8 / chip.fp8 + self.bf16 / chip.bf16 + self.bytes / chip.memory) * 1e6

    def tflops(self, us: float) -> float:
        return (self.fp8 + self.bf16) / us * 1e-6

    def gb_s(self, us: float) -> float:
        return self.bytes / us * 1e-3


def work_of(policy: SelectionPolicy, phase: Phase, heads: int, seq_lens: Tensor) -> Work:
    """The work of one layer's call for rows that see `seq_lens` [T] int keys, with `heads` index heads.

    Prefill is arithmetic: kept tokens × scored columns and candidates × all heads in fp8, blocks × all heads in bf16.
    Decode is reading: the kept keys, or the sketches of all and the candidates' keys, and, to keep, to route or to
    sketch by, all page means. Stock DSA keeps all and pools nothing.
    """
    lens = seq_lens.double()
    kept = float(lens.clamp(max=policy.blocks * policy.block_size if policy.blocks else math.inf).sum())
    again = float(lens.clamp(max=policy.candidates).sum()) if policy.candidates else 0.0
    if phase == "decode":
        pages = float((lens // PAGE).sum()) if policy.pooled or policy.sketch else 0.0
        scanned = KEY_BYTES if policy.sketch is None else HEAD_DIM * policy.sketch / 8 + SKETCH_SCALE_BYTES
        reread = again * KEY_BYTES if policy.sketch else 0.0  # otherwise the first pass has read them
        return Work(bytes=kept * scanned + reread + pages * MEAN_BYTES)
    blocks = float((lens // policy.block_size).sum()) if policy.pooled else 0.0
    return Work(fp8=(kept * (policy.columns or heads) + again * heads) * PAIR, bf16=blocks * heads * PAIR)
