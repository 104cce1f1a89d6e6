"""Routed-head scores of query rows against a flat run of index keys, and the exact top k of them (CUDA, sm_90a).

`topk_routed` never writes the score matrix. In passes over a bounded number of rows:

1. `sample` scores one key in every n; 2. `threshold` takes a low quantile of that sample per row, by score and then
position; 3. `collect` scores all keys and appends what passes to buffers owned by single threads; 4. `select` takes the
exact top k of the appended. Rows that collected fewer than k or overflowed a buffer are listed on the device and, at
the end, 5. `redo` scores them into memory and selects there. So the result is the top k by (score, then smaller
position) whatever the threshold was; a NaN ranks below every number.

Statistics (`plan`): the r-th largest of a 1/n sample leaves about n·Gamma(r) keys above it. r solves r - z√r = k/n with
z = 4.5, so a row comes out short with probability 3e-6. A row's room lies z standard deviations above what is expected,
a buffer's 6.5 or 8, for a call has a quarter of a million of them. Buffers also get what the budget leaves: hits that
come in clusters are not shared out by chance.

No order of the keys is in step with the sample, for the place of a sampled key among its n is hashed; nor with the
buffers, which their threads hand on in turn. Scores that tie at the threshold pass as far as a position, so keys that
are all the same bring no more of them than others. `slow_rows` counts what `redo` had to do none the less.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from sglang_misa.kernels.build import Target, build
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.layout import HEAD_DIM, ROUTED_HEADS
from sglang_misa.kernels.prefill.residual import Residual

SCRATCH_BYTES = 256 << 20
MOST_BYTES = 1 << 30  # whatever the budget
LISTS_BYTES = 1 << 20  # step in which the row lists grow

SAMPLED_AT_MOST = 49152  # scores that `threshold` holds
SIGMAS = 4.5  # z: standard deviations of room on either side of a row's expected count
BUFFER_SIGMAS = {32: 6.5, 16: 8.0}  # the same for a private buffer, as in topk_routed.cu
THRESHOLD_BYTES = 12  # of a row: a score, one that ties, and where the tied end
COUNTS = 2048  # private buffers of a row at most: `select` brings each one's entries by a copy of its own
TILE = 128  # keys that the scorer takes at once
SECTOR = 4  # entries that are written at once
BURST = 4  # entries that one tile may bring to a private buffer
SPARE = 64  # entries at most that a private buffer gets of what the budget leaves
MANY = 0.07  # share of keys that pass above which hits are written by sectors, for 8 routed heads


def block_rows(heads: int) -> int:
    """Query rows of one thread block of the scorer: two warpgroups of 256 columns, of 4 heads three of 128."""
    return 2 * 256 // heads if heads > 4 else 3 * 128 // heads


def buffers(heads: int, density: float) -> int:
    """Private buffers of a row in each thread block that scores it, where `density` of its keys are expected to pass.

    Each thread writes its hits as they come (32), or, where that would hold the scorer up, two share a buffer and write
    by sectors (16). On an H100 with h = 8: 2.2 and 2.5 ms at 128K (3 % pass), 0.98 and 0.65 ms at 32K (9 %).
    """
    return 16 if heads < 64 and density * 8 / heads > MANY else 32


def sample_stride(keys: int, heads: int) -> int:
    """One key in so many is sampled: a denser sample costs scores, and saves hits that a sparser one lets pass.

    Of few heads or keys, storing hits limits the collector, and fewer of them pay. One H100, h = 8, 64K, in parts: 1 in
    16 instead of 32 costs 60 us more and saves some 170.
    """
    stores_limit = max(46 << 10, (640 << 10) // heads)
    wanted = 8 if keys <= 22 << 10 else 16 if keys <= stores_limit else 32
    return max(wanted, math.ceil(keys / SAMPLED_AT_MOST))


def module(columns: int, residual: bool = False) -> Any:
    """The compiled kernels for so many columns a row: its routed heads and, if there is one, the residual."""
    if columns not in ROUTED_HEADS:
        raise ValueError(
            f"head_ids: expected one of {ROUTED_HEADS} columns a row, got {columns - residual} routed heads"
            f"{' and a residual' if residual else ''}; choose another h"
        )
    return build("sm90/topk_routed.cu", MISA_HEADS=columns, MISA_RESIDUAL=int(residual))


@dataclass(frozen=True)
class Plan:
    """Division of one call's work into passes of `rows` rows; `scheduler.cuh` divides a pass among thread blocks."""

    rows: int
    workers: int  # thread blocks that collect
    buffers: int  # of a row in each of them that has keys of it
    stride: int  # one key in so many is sampled
    rank: int  # of the threshold in the sample
    spare: int  # entries of a private buffer beyond what is expected at most: a tile's, and what the budget leaves
    entries: int  # that a private buffer holds, summed over the workers
    room: int  # entries of a row that `select` can hold
    sampled: int  # columns of the sampled scores
    division_offset: int  # in bytes: thresholds lie before
    counts_offset: int
    sample_offset: int  # of the sampled keys
    scale_offset: int  # of their scales
    bulk_offset: int  # of entries or scores
    bytes: int  # of scratch, lists included

    @property
    def runs(self) -> int:
        """Workers that share a row's keys, at most."""
        return COUNTS // self.buffers


def aligned(count: float, to: int = 256) -> int:
    return math.ceil(count / to) * to


def division_bytes(row_blocks: int, workers: int) -> int:
    """Of a Division, as scorer.cuh lays it out."""
    return aligned(4 * (1 + row_blocks + 1 + workers + workers + 1))


@functools.lru_cache(maxsize=256)
def plan(
    rows: int,
    keys: int,
    k: int,
    heads: int,
    multiprocessors: int,
    budget: int = SCRATCH_BYTES,
    total: int | None = None,
) -> Plan:
    """Choose the sample, and as few passes as `budget` bytes of scratch allow; rows see at most `keys` of `total` keys.

    Scratch of a pass: thresholds, division, counts, sampled keys, and max(8 · rows of a block · buffers · entries,
    4 · rows · keys / stride) bytes. Raises ValueError when one block of rows does not fit.
    """
    stride = sample_stride(keys, heads)
    root = (SIGMAS + math.sqrt(SIGMAS**2 + 4 * k / stride)) / 2
    rank = math.ceil(root**2)
    hits = (rank + SIGMAS * math.sqrt(rank)) * stride  # hardly ever more
    sampled = aligned(keys / stride + 1, 4)  # a window's ends may each cut through the keys that one stands for
    sample_keys = math.ceil((keys if total is None else total) / stride)
    block, subs = block_rows(heads), buffers(heads, rank * stride / max(keys, 1))
    blocks = math.ceil(rows / block)
    for passes in range(1, blocks + 1):
        pass_blocks = math.ceil(blocks / passes)
        workers = min(multiprocessors, pass_blocks * (COUNTS // subs - 1))
        # Shares of rows vary, but what holds least a row is sharing evenly: the room is a concave function of the part.
        expected = rank * stride / subs * pass_blocks / workers
        capacity = expected + BUFFER_SIGMAS[subs] * math.sqrt(expected + expected**2 / rank) + SECTOR
        entry_bytes = 8 * block * subs  # of one entry of each buffer of a worker
        pass_rows = pass_blocks * block
        division = aligned(THRESHOLD_BYTES * pass_rows)
        counts = division + division_bytes(pass_blocks, workers)
        sample = counts + aligned(8 * (pass_rows + workers * block) * subs)
        scale = sample + aligned(HEAD_DIM * sample_keys)
        bulk = scale + aligned(4 * sample_keys)
        entries = aligned(workers * (capacity + BURST), SECTOR)
        total = bulk + max(entry_bytes * entries, 4 * pass_rows * sampled)
        if total <= budget:
            left = (budget - bulk - entry_bytes * entries) // (entry_bytes * workers)
            spare = BURST + min(max(left, 0), SPARE) // SECTOR * SECTOR
            entries = aligned(workers * (capacity + spare), SECTOR)
            return Plan(
                rows=pass_rows,
                workers=workers,
                buffers=subs,
                stride=stride,
                rank=rank,
                spare=spare,
                entries=entries,
                room=aligned(hits),
                sampled=sampled,
                division_offset=division,
                counts_offset=counts,
                sample_offset=sample,
                scale_offset=scale,
                bulk_offset=bulk,
                bytes=bulk + max(entry_bytes * entries, 4 * pass_rows * sampled),
            )
    raise ValueError(f"scratch budget: expected at least {total} bytes for k={k}, {keys} keys; got {budget}; raise it")


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

    def arguments(self) -> list[int]:
        tensors = (self.index_q, self.head_gates, self.head_ids, self.index_k, self.k_scale, self.ks, self.ke)
        residual = (self.residual.query, self.residual.scale) if self.residual is not None else ()
        addresses = [t.data_ptr() for t in (*tensors, *residual)]
        return [*addresses[:7], int(self.head_gates.shape[1]), self.keys, *(addresses[7:] or (0, 0))]


SAMPLE_STAGE, THRESHOLD_STAGE, COLLECT_STAGE, SELECT_STAGE, REDO_STAGE = 1, 2, 4, 8, 16
ALL_STAGES = 31


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
    def division(self) -> list[int]:
        """What the kernels' `Plan` reads: numbers, then addresses."""

    def parts(self, *offsets: int) -> list[int]:
        """Addresses: of the failed rows, two counters (see `Failed`), and of the plan's parts at `offsets` bytes."""
        start = self.scratch.data_ptr()
        failed = (start, start + 4 * (self.listed + 1), self.slow_rows.data_ptr())
        return [*failed, *(start + self.lists + offset for offset in offsets)]

    def at_once(self, offset: int, ld: int) -> int:
        """Failed rows whose scores, `ld` apart, have room from the plan's part at `offset` on."""
        return min(self.problem.rows, int(self.scratch.numel() - self.lists - offset) // (4 * ld))

    def redone(self) -> int:
        """Rows that the last run, or its last pass, had to redo (synchronises)."""
        return int(self.scratch[:4].view(torch.int32).item())

    def run(self, stages: int = ALL_STAGES) -> None:
        """Launch everything in one call of the host's side; `stages` is a sum of *_STAGE."""
        problem = self.problem
        stream = torch.cuda.current_stream(problem.device).cuda_stream
        self.module().topk(problem.arguments(), self.target.arguments(), self.division(), problem.rows, stages, stream)


class Ragged(Call):
    """One `topk_routed` call."""

    def __init__(self, problem: Problem, target: Target, budget: int = SCRATCH_BYTES, longest: int | None = None):
        """longest: keys that a row sees at most; all, unless given."""
        self.k = int(target.out.shape[1])
        longest = problem.keys if longest is None else min(longest, problem.keys)
        processors = multiprocessors(problem.device)
        self.plan = plan(problem.rows, longest, self.k, problem.columns, processors, budget, problem.keys)
        self.ld = aligned(longest, 4)  # of scores that `redo` writes
        # The whole budget at once: a warm-up before the KV pool is sized then leaves nothing to grow while serving.
        super().__init__(problem, target, problem.rows, max(budget, self.plan.bulk_offset + 4 * self.ld))

    def module(self) -> Any:
        return module(self.problem.columns, self.problem.residual is not None)

    def division(self) -> list[int]:
        p = self.plan
        numbers = (p.rows, p.workers, p.runs, p.buffers, p.stride, p.rank, p.spare, p.entries, p.room, p.sampled)
        offsets = (0, p.division_offset, p.counts_offset, p.sample_offset, p.scale_offset, p.bulk_offset)
        return [*numbers, self.at_once(p.bulk_offset, self.ld), self.ld, *self.parts(*offsets)]


def topk_routed(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    head_ids: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k: int,
    *,
    residual: Residual | None = None,
    out: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    row_batch: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    longest: int | None = None,
    budget: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """Exact top k of k_scale[l] · Σ_{j in head_ids[t]} head_gates[t, j] · ReLU(index_q[t, j] · index_k[l]).

    `residual` adds its own column to the sum, which then counts as one of the h in `ROUTED_HEADS`.
    l runs over [ks[t], ke[t]); index_q fp8 e4m3 [T, H, 128], head_gates fp32 [T, H], head_ids int32 [T, h] with h in
    `ROUTED_HEADS`, index_k fp8 [S, 128], k_scale fp32 [S], ks and ke int32 [T]; out int32 [T, k].
    Returns, in no order, positions relative to ks[t]; with `page_table` [B, W] and `row_batch` [T] the slots
    64 · page_table[row_batch[t], position // 64] + position % 64; with `offsets` [T] position + offsets[t]. Rows of at
    most k keys get all of them and -1 behind. Among equal scores the smaller position wins; NaN scores come last.
    `longest`, at least as large as every window, spares time where requests share a call. Scratch, held per device, is
    at most `budget` bytes plus the row lists and one row of scores. Never synchronises.
    Raises ValueError on shapes, dtypes or layout.
    Mirrors SGLang's fp8_mqa_logits + topk_transform; MISA (2605.07363).
    """
    problem = Problem(index_q, head_gates, head_ids, index_k, k_scale, ks, ke, residual)
    if out is None:
        out = torch.empty(problem.rows, k, dtype=torch.int32, device=problem.device)
    target = Target(out, page_table, row_batch, offsets)
    target.check(problem.rows, k)
    if problem.keys == 0:
        return out.fill_(-1)
    if problem.rows > 0:
        Ragged(problem, target, budget, longest).run()
    return out


def routed_logits(
    index_q: torch.Tensor,
    head_gates: torch.Tensor,
    head_ids: torch.Tensor,
    index_k: torch.Tensor,
    k_scale: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    residual: Residual | None = None,
    first: int = 0,
    rows: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scores that `topk_routed` ranks, fp32 [rows, S], bit for bit; -inf outside [ks[t], ke[t]). Inputs as there.

    `first` and `rows` choose query rows, so that a caller bounds the matrix. `out`, if given, must be filled with what
    the columns outside the windows shall hold.
    """
    problem = Problem(index_q, head_gates, head_ids, index_k, k_scale, ks, ke, residual)
    rows = problem.rows - first if rows is None else rows
    if out is None:
        out = torch.full((rows, aligned(problem.keys, 4)), -math.inf, device=problem.device)[:, : problem.keys]
    if rows > 0 and problem.keys > 0:
        stream = torch.cuda.current_stream(problem.device).cuda_stream
        module(problem.columns, residual is not None).logits(
            problem.arguments(), first, rows, out.data_ptr(), out.stride(0), stream
        )
    return out
