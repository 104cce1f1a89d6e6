"""What a decode call is made of: query rows over index-K pages, their pages' sketches, and where the selection goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sglang_misa.kernels.checks import expect, expect_router
from sglang_misa.kernels.layout import HEAD_DIM, MAX_CANDIDATES, PAGE, PAGE_BYTES, ROUTED_HEADS, Router, sketch_bits

MIN_CANDIDATES = 2 * PAGE  # the newest complete page and the one behind it have no sketch to read yet


@dataclass(frozen=True)
class PagedRows:
    """Query rows over their pages; one row a query, so verify rows bring their own length.

    index_q:       float8_e4m3fn [R, H, 128], contiguous; H = 16, 32, 64, …
    head_gates:    fp32 [R, H], contiguous; the query's scale and the softmax scale folded in
    index_k_pages: uint8 [P, 8448]: 64 keys of 128 fp8, then their 64 fp32 scales
    page_table:    int32 [R, W], unit column stride; entries past ceil(len / 64) are stale and never followed
    seq_lens:      int32 [R], 0 <= len <= 64 · W
    """

    index_q: Tensor
    head_gates: Tensor
    index_k_pages: Tensor
    page_table: Tensor
    seq_lens: Tensor

    def __len__(self) -> int:
        return len(self.index_q)

    @property
    def index_heads(self) -> int:
        return int(self.index_q.shape[1])

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter stands in for a GPU."""
        return bool(self.index_q.device.type == "cpu")

    def check(self, page_means: Tensor) -> None:
        """Raise ValueError unless all this is as above, on one device, and page_means those of its pages."""
        rows, pages, device = len(self), len(self.index_k_pages), self.index_q.device
        expect("index_q", self.index_q, (rows, self.index_heads, HEAD_DIM), torch.float8_e4m3fn)
        expect("head_gates", self.head_gates, (rows, self.index_heads), torch.float32, device=device)
        expect("index_k_pages", self.index_k_pages, (pages, PAGE_BYTES), torch.uint8, device=device)
        self.check_table(device)
        expect("page_means", page_means, (pages, HEAD_DIM), torch.bfloat16, device=device)

    def check_table(self, device: torch.device) -> None:
        """Raise ValueError unless the page table and the lengths are as above, on this device."""
        expect("page_table", self.page_table, (len(self), None), torch.int32, row_stride=True, device=device)
        expect("seq_lens", self.seq_lens, (len(self),), torch.int32, device=device)


@dataclass(frozen=True)
class Chosen:
    """Where chosen tokens go, in the order of the row, -1 behind the last.

    slots:     int32 [R, k], contiguous: page · 64 + offset
    positions: int32 [R, k], contiguous, optional: the same tokens as positions in the row
    """

    slots: Tensor
    positions: Tensor | None = None

    @property
    def topk(self) -> int:
        return int(self.slots.shape[1])

    def check(self, rows: int, device: torch.device) -> None:
        """Raise ValueError unless there is room for so many rows, on this device."""
        expect("out.slots", self.slots, (rows, None), torch.int32, device=device)
        if self.positions is not None:
            expect("out.positions", self.positions, (rows, self.topk), torch.int32, device=device)

    def clear(self) -> None:
        """Nothing is chosen."""
        self.slots.fill_(-1)
        if self.positions is not None:
            self.positions.fill_(-1)

    def write(self, row: int, slots: Tensor, positions: Tensor) -> None:
        """The tokens [n] of one row."""
        self.slots[row, : len(slots)] = slots
        if self.positions is not None:
            self.positions[row, : len(positions)] = positions


@dataclass(frozen=True)
class PageSketch:
    """Statistics of an index-K pool's pages in one layer, by physical page. Valid for complete pages.

    means:    bf16 [P, 128]
    sketches: uint8 [P, sketch_bytes(bits)], see `layout.sketch_bytes`
    """

    means: Tensor
    sketches: Tensor

    @property
    def bits(self) -> Literal[1, 2]:
        """Bits a coordinate."""
        return sketch_bits(int(self.sketches.shape[1]))


@dataclass(frozen=True)
class SketchPolicy:
    """What a step over sketches does, fixed for all its calls.

    heads:      routed heads h, or None: all heads score the sketches; h + residual is one of ROUTED_HEADS
    router:     "mean", "peak", "signed", "weight" or, with a residual, "error", see `route_pages`
    residual:   whether the other heads score too, as one linear column
    candidates: tokens C that all heads score on the stored keys, k <= C
    """

    heads: int | None
    router: Router
    residual: bool
    candidates: int

    def __post_init__(self) -> None:
        columns = None if self.heads is None else self.heads + self.residual
        if columns is None and self.residual:
            raise ValueError("residual: expected routed heads beside it, got all heads; leave it out")
        if columns is not None and columns not in ROUTED_HEADS:
            raise ValueError(f"heads + residual: expected one of {ROUTED_HEADS}, got {columns}")
        expect_router(self.router, routed=self.heads is not None, residual=self.residual)
        if not MIN_CANDIDATES <= self.candidates <= MAX_CANDIDATES or self.candidates % PAGE:
            raise ValueError(
                f"candidates: expected a multiple of {PAGE} from {MIN_CANDIDATES} to {MAX_CANDIDATES}, "
                f"got {self.candidates}"
            )
