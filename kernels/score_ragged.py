"""Routed-head scores of query rows against a flat run of index keys, and the exact top k of them (CUDA, sm_90a).

`topk_ragged` never writes the score matrix. In passes over a bounded number of rows:

1. `sample` scores every n-th key; 2. `threshold` takes a low quantile of that sample per row; 3. `collect` scores all
keys and appends what is above the threshold to buffers owned by single threads; 4. `select` takes the exact top k of
the appended. Rows that collected fewer than k or overflowed a buffer are listed on the device and, at the end,
5. `redo` scores them into memory and selects there. So the result is the top k by (score, then smaller position)
whatever the threshold was; a NaN ranks below every number.

Statistics (`plan`): the r-th largest of a 1/n sample leaves about n·Gamma(r) keys above it. r solves r - z√r = k/n with
z = 4.5, so a row comes out short with probability 3e-6; buffers hold z standard deviations more than the expected hits.
An order of keys that defeats the sample (periodic in n keys) costs time in `redo`, not exactness.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEAD_DIM = 128
ROUTED_HEADS = (4, 8, 16, 32, 64)  # h that the kernel is built for; 64 serves full-head modes
SCRATCH_BYTES = 256 << 20

SAMPLE = 4096  # keys sampled at least, where one in 32 makes so many
STRIDES = (8, 32)  # one key in so many is sampled, by length
SAMPLED_AT_MOST = 49152  # scores that `threshold` holds
SIGMAS = 4.5  # z: standard deviations of room on either side of an expected count
SUBS = 32  # private buffers of a row in each split
CHECK_ROOM = 8  # entries that a buffer keeps free between two looks at its end
SOURCES = ("score_ragged.cu", "select.cuh", "sm90.cuh")


@dataclass(frozen=True)
class Variant:
    """How the scorer is built: consumer warpgroups, keys of a ring stage, ring stages, two accumulators a warpgroup, two products a tile."""

    groups: int = 3
    tile: int = 64
    stages: int = 8
    double: bool = False
    split: bool = False

    def rows(self, heads: int) -> int:
        """Query rows of one thread block."""
        return self.groups * (128 // min(heads, 32))


@dataclass(frozen=True)
class Plan:
    """Division of one call's work: `rows` rows a pass, each row's keys in `splits` interleaved shares."""

    rows: int
    splits: int
    stride: int  # one key in so many is sampled
    rank: int  # of the threshold in the sample
    capacity: int  # entries of a private buffer
    room: int  # entries of a row that `select` can hold
    sampled: int  # columns of the sampled scores
    bytes: int  # of scratch, lists included

    @property
    def counts_offset(self) -> int:
        return _aligned(4 * self.rows)

    @property
    def bulk_offset(self) -> int:
        """Where entries or logits begin; thresholds and counts lie before."""
        return self.counts_offset + _aligned(4 * self.rows * self.splits * SUBS)


def _aligned(count: float, to: int = 256) -> int:
    return math.ceil(count / to) * to


@functools.lru_cache(maxsize=256)
def plan(rows: int, keys: int, k: int, block_rows: int, multiprocessors: int, budget: int = SCRATCH_BYTES) -> Plan:
    """Choose passes and splits that fill the chip within `budget` bytes of scratch.

    Scratch of a pass = rows · max(splits · 32 · capacity · 8, 4 · keys / 32) + rows · (4 + splits · 128) bytes.
    Raises ValueError when one block of rows does not fit.
    """
    least, most = STRIDES
    stride = min(max(1 << round(math.log2(max(keys, 1) / SAMPLE)) if keys > SAMPLE else least, least), most)
    stride = max(stride, math.ceil(keys / SAMPLED_AT_MOST))
    root = (SIGMAS + math.sqrt(SIGMAS**2 + 4 * k / stride)) / 2
    rank = math.ceil(root**2)
    hits = (rank + SIGMAS * math.sqrt(rank)) * stride  # hardly ever more
    sampled = _aligned(keys / stride, 4)
    room = _aligned(hits)
    # Beside its scan a pass costs launches and a tail, and every split costs the samplers and `select` a share;
    # in units of one scan of 128K keys by one block, as measured on an H100.
    pass_cost, split_cost = (cost * 131072 / max(keys, 1) for cost in (0.02, 0.026 * rows / 8192))

    best: tuple[float, Plan] | None = None
    blocks = math.ceil(rows / block_rows)
    for splits in range(1, 17):
        share = hits / (SUBS * splits)
        capacity = _aligned(share + SIGMAS * math.sqrt(share) + CHECK_ROOM, 4)
        row_bytes = max(splits * SUBS * capacity * 8, 4 * sampled)
        for pass_blocks in range(1, blocks + 1):
            pass_rows = pass_blocks * block_rows
            candidate = Plan(pass_rows, splits, stride, rank, capacity, room, sampled, 0)
            total = candidate.bulk_offset + pass_rows * row_bytes
            if total > budget:
                break
            full, rest = divmod(blocks, pass_blocks)
            waves = full * math.ceil(pass_blocks * splits / multiprocessors) + math.ceil(
                rest * splits / multiprocessors
            )
            cost = waves / splits + pass_cost * (full + (rest > 0)) + split_cost * splits
            if best is None or cost < best[0] - 1e-9:
                best = cost, Plan(pass_rows, splits, stride, rank, capacity, room, sampled, total)
    if best is None:
        need = block_rows * max(SUBS * _aligned(hits / SUBS, 4) * 8, 4 * sampled)
        raise ValueError(
            f"scratch budget: expected at least about {need} bytes for k={k}, {keys} keys; got {budget}; raise it"
        )
    return best[1]


@functools.cache
def module(heads: int, variant: Variant = Variant()) -> Any:
    """The compiled kernels for h routed heads; built at first use with nvcc and kept in tvm-ffi's cache."""
    from tvm_ffi.cpp import load

    if heads not in ROUTED_HEADS:
        raise ValueError(f"routed heads: expected one of {ROUTED_HEADS}, got {heads}")
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    defines = {
        "HEADS": heads,
        "GROUPS": variant.groups,
        "TILE": variant.tile,
        "STAGES": variant.stages,
        "DOUBLE": int(variant.double),
        "SPLIT": int(variant.split),
    }
    name = "_".join(["misa_score_ragged", digest, *(f"{key.lower()}{value}" for key, value in defines.items())])
    key, before = "TVM_FFI_CUDA_ARCH_LIST", os.environ.get("TVM_FFI_CUDA_ARCH_LIST")
    os.environ[key] = "9.0a"  # wgmma and setmaxnreg exist under this name alone
    try:
        return load(
            name,
            cuda_files=[str(here / "score_ragged.cu")],
            extra_cuda_cflags=["-O3", *(f"-DMISA_{key}={value}" for key, value in defines.items())],
            extra_include_paths=[str(here)],
        )
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_scratch: dict[torch.device, torch.Tensor] = {}


def _scratch_of(device: torch.device, size: int) -> torch.Tensor:
    """One buffer a device, grown when a call needs more; calls on one stream follow each other through it."""
    held = _scratch.get(device)
    if held is None or held.numel() < size:
        _scratch.pop(device, None)
        del held
        _scratch[device] = torch.empty(size, dtype=torch.uint8, device=device)
    return _scratch[device]


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    right = tensor.dim() == len(shape) and all(w is None or w == g for w, g in zip(shape, tensor.shape, strict=False))
    if not (right and tensor.dtype in dtypes and tensor.is_contiguous() and tensor.is_cuda):
        raise ValueError(
            f"{name}: expected a contiguous CUDA tensor {list(shape)} of {' or '.join(map(str, dtypes))}, got "
            f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}; convert it first"
        )


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, checked. Shapes and dtypes as in `topk_ragged`."""

    index_q: torch.Tensor
    head_gates: torch.Tensor
    head_ids: torch.Tensor
    index_k: torch.Tensor
    k_scale: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor

    def __post_init__(self) -> None:
        rows, heads = self.head_gates.shape
        fp8 = (torch.float8_e4m3fn, torch.uint8)
        _expect("index_q", self.index_q, (rows, heads, HEAD_DIM), *fp8)
        _expect("head_gates", self.head_gates, (rows, heads), torch.float32)
        _expect("head_ids", self.head_ids, (rows, None), torch.int32)
        _expect("index_k", self.index_k, (None, HEAD_DIM), *fp8)
        _expect("k_scale", self.k_scale, (self.index_k.shape[0],), torch.float32)
        _expect("ks", self.ks, (rows,), torch.int32)
        _expect("ke", self.ke, (rows,), torch.int32)

    @property
    def rows(self) -> int:
        return int(self.head_ids.shape[0])

    @property
    def routed(self) -> int:
        return int(self.head_ids.shape[1])

    @property
    def keys(self) -> int:
        return int(self.index_k.shape[0])

    @property
    def device(self) -> torch.device:
        return self.index_q.device

    def arguments(self) -> list[int]:
        tensors = (self.index_q, self.head_gates, self.head_ids, self.index_k, self.k_scale, self.ks, self.ke)
        return [*(t.data_ptr() for t in tensors), int(self.head_gates.shape[1]), self.keys]


@dataclass(frozen=True)
class Target:
    """Where the chosen keys go and what is written for them."""

    out: torch.Tensor  # [T, k] int32
    page_table: torch.Tensor | None = None  # [B, W] int32: physical slot of a position
    row_batch: torch.Tensor | None = None  # [T] int32: the row's request
    offsets: torch.Tensor | None = None  # [T] int32: added to positions

    def check(self, rows: int, k: int) -> None:
        _expect("out", self.out, (rows, k), torch.int32)
        if (self.page_table is None) != (self.row_batch is None):
            raise ValueError(
                "page_table and row_batch: expected both or neither; pass the request of each row beside its table"
            )
        if self.page_table is not None and self.offsets is not None:
            raise ValueError("page_table and offsets: expected at most one, got both; choose PAGED or RAGGED output")
        if self.page_table is not None and self.row_batch is not None:
            _expect("page_table", self.page_table, (None, None), torch.int32)
            _expect("row_batch", self.row_batch, (rows,), torch.int32)
        if self.offsets is not None:
            _expect("offsets", self.offsets, (rows,), torch.int32)

    def arguments(self) -> list[int]:
        def address(tensor: torch.Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        width = 0 if self.page_table is None else int(self.page_table.shape[1])
        return [
            address(self.out),
            int(self.out.shape[1]),
            address(self.page_table),
            address(self.row_batch),
            width,
            address(self.offsets),
        ]


Launch = tuple[str, Callable[[], Any]]


class Ragged:
    """The launches of one `topk_ragged` call, by stage, so that a bench can time what serving runs."""

    def __init__(self, problem: Problem, target: Target, budget: int = SCRATCH_BYTES, variant: Variant = Variant()):
        self.problem, self.target = problem, target
        self.kernels = module(problem.routed, variant)
        self.k = int(target.out.shape[1])
        multiprocessors = _multiprocessors(problem.device)
        self.plan = plan(problem.rows, problem.keys, self.k, variant.rows(problem.routed), multiprocessors, budget)
        # [number of failed rows, their list …, meeting counter of `redo`] then the plan's parts.
        self.lists = _aligned(4 * (problem.rows + 2))
        self.ld = _aligned(problem.keys, 4)  # of scores that `redo` writes
        size = self.lists + max(self.plan.bytes, self.plan.bulk_offset + 4 * self.ld)
        self.scratch = _scratch_of(problem.device, size)
        self.failed = self.scratch.data_ptr()

    def redone(self) -> int:
        """Rows that the last run had to redo (synchronises)."""
        return int(self.scratch[:4].view(torch.int32).item())

    def launches(self) -> Iterator[Launch]:
        problem, p, kernels = self.problem, self.plan, self.kernels
        inputs, output = problem.arguments(), self.target.arguments()
        stream = torch.cuda.current_stream(problem.device).cuda_stream
        thresholds = self.failed + self.lists
        counts, bulk = thresholds + p.counts_offset, thresholds + p.bulk_offset
        stride, phase = p.stride, p.stride // 2
        for first in range(0, problem.rows, p.rows):
            rows = min(p.rows, problem.rows - first)
            start = self.failed if first == 0 else 0
            yield (
                "sample",
                functools.partial(
                    kernels.logits, inputs, first, rows, p.splits, stride, phase, bulk, p.sampled, True, stream
                ),
            )
            yield (
                "threshold",
                functools.partial(
                    kernels.thresholds,
                    inputs,
                    first,
                    rows,
                    stride,
                    phase,
                    bulk,
                    p.sampled,
                    p.rank,
                    self.k,
                    thresholds,
                    start,
                    stream,
                ),
            )
            yield (
                "collect",
                functools.partial(
                    kernels.collect, inputs, first, rows, p.splits, thresholds, bulk, counts, p.capacity, stream
                ),
            )
            yield (
                "select",
                functools.partial(
                    kernels.select,
                    inputs,
                    output,
                    first,
                    rows,
                    p.splits,
                    bulk,
                    counts,
                    p.capacity,
                    p.room,
                    self.failed,
                    stream,
                ),
            )
        at_once = min(problem.rows, (self.scratch.numel() - self.lists - p.bulk_offset) // (4 * self.ld))
        meeting = self.failed + 4 * (problem.rows + 1)
        yield (
            "redo",
            functools.partial(kernels.redo, inputs, output, bulk, self.ld, at_once, self.failed, meeting, stream),
        )

    def run(self) -> None:
        for _, launch in self.launches():
            launch()


def topk_ragged(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    head_ids: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k: int,
    *,
    out: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    row_batch: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    budget: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """Exact top k of k_scale[l] · Σ_{j in head_ids[t]} head_gates[t, j] · ReLU(index_q[t, j] · index_k[l]).

    l runs over [ks[t], ke[t]); index_q fp8 e4m3 [T, H, 128], head_gates fp32 [T, H], head_ids int32 [T, h] with h in
    `ROUTED_HEADS`, index_k fp8 [S, 128], k_scale fp32 [S], ks and ke int32 [T]; out int32 [T, k].
    Returns, in no order, positions relative to ks[t]; with `page_table` [B, W] and `row_batch` [T] the slots
    page_table[row_batch[t], position]; with `offsets` [T] position + offsets[t]. Rows of at most k keys get all of them
    and -1 behind. Among equal scores the smaller position wins; NaN scores come last. Scratch, held per device, is at
    most `budget` bytes plus the row lists and one row of scores. Never synchronises.
    Raises ValueError on shapes, dtypes or layout.
    Mirrors SGLang's fp8_mqa_logits + topk_transform; MISA (2605.07363).
    """
    problem = Problem(index_q, head_gates, head_ids, index_k, k_scale, ks, ke)
    if out is None:
        out = torch.empty(problem.rows, k, dtype=torch.int32, device=problem.device)
    target = Target(out, page_table, row_batch, offsets)
    target.check(problem.rows, k)
    if problem.keys == 0:
        return out.fill_(-1)
    if problem.rows > 0:
        Ragged(problem, target, budget).run()
    return out


def score_ragged_logits(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    head_ids: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    first: int = 0,
    rows: int | None = None,
    out: torch.Tensor | None = None,
    variant: Variant = Variant(),
) -> torch.Tensor:
    """The scores that `topk_ragged` ranks, fp32 [rows, S], bit for bit; -inf outside [ks[t], ke[t]). Inputs as there.

    `first` and `rows` choose query rows, so that a caller bounds the matrix. `out`, if given, must be filled with what
    the columns outside the windows shall hold.
    """
    problem = Problem(index_q, head_gates, head_ids, index_k, k_scale, ks, ke)
    rows = problem.rows - first if rows is None else rows
    if out is None:
        out = torch.full((rows, _aligned(problem.keys, 4)), -math.inf, device=problem.device)[:, : problem.keys]
    if rows > 0 and problem.keys > 0:
        blocks = math.ceil(rows / variant.rows(problem.routed))
        splits = max(1, min(_multiprocessors(problem.device) // blocks, math.ceil(problem.keys / variant.tile)))
        stream = torch.cuda.current_stream(problem.device).cuda_stream
        module(problem.routed, variant).logits(
            problem.arguments(), first, rows, splits, 1, 0, out.data_ptr(), out.stride(0), False, stream
        )
    return out
