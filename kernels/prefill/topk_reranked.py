"""MISA† (arXiv 2605.07363): the best C keys of a row by its routed heads, and of those the exact top k by all (CUDA).

    routed[t,l] = k_scale[l] · Σ_{j in head_ids[t]} w[t,j] · ReLU(q[t,j]·k[l])     full[t,l]: the same over all heads

where a residual, if there is one, adds its column to `routed`.

In passes over a bounded number of rows: 1. `sample` and 2. `threshold` as in topk_routed, for C; 3. `mark` scores all
keys with the routed heads and sets one bit for each that passes; 4. `rerank`, a thread block a row, lists the marked
keys, gathers each once from L2 and multiplies it with all heads, the routed ones first, so that both scores fall out
of one product; it cuts the list to the best C by the one and takes the top k by the other. 5. `redo` marks the rows
that came out short, or longer than a block can list, with exactly their best C and goes through 4 again.

Requests share a call: each four rows have marks for the keys around their own windows.

A listed key costs 8 bytes of shared memory: its low 16 bits (keys are listed in segments of 65536), its full score,
and its routed score in 16 bits of a window that `threshold` puts around the cut; where several keys share the last
place there, they are scored once more and ranked in full. So neither set depends on the threshold, but for this: a row
that is marked anew has its C keys by the scorer's sums, which round otherwise than those of step 4.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from sglang_misa.kernels.build import build
from sglang_misa.kernels.layout import HEAD_DIM, INDEX_HEADS, MAX_CANDIDATES, ROUTED_HEADS
from sglang_misa.kernels.prefill.operands import Keys, Output, RoutedHeads, Rows
from sglang_misa.kernels.prefill.plan import (
    SAMPLED_AT_MOST,
    SCRATCH_BYTES,
    THRESHOLD_BYTES,
    TILE,
    aligned,
    block_rows,
    division_bytes,
    most_hits,
    threshold_rank,
)
from sglang_misa.kernels.prefill.workspace import Call, multiprocessors
from sglang_misa.kernels.structs import RerankedPlan, Sample

KEYS = (1 << 22) - 31  # that a row sees at most: 64 segments, from the 32 keys on in which its window begins

SAMPLE = 4096  # keys of a row that are sampled, unless the stride's bounds say otherwise
STRIDES = (8, 24)  # one key in so many
SAMPLED_BYTES = HEAD_DIM + 4  # of a sampled key and its scale
SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10  # of a multiprocessor, and the system's of each block on it
FIXED_BYTES, LISTED_BYTES = 12288, 8  # of a block, and for each key that it can list
MARKED_ROWS, MARKED_KEYS, MARK_BYTES = 4, 64, 32  # of a product of the scorer


def module(columns: int, index_heads: int, residual: bool = False) -> Any:
    """The compiled kernels for h routed of H index heads, which with a residual are `columns`."""
    if index_heads not in INDEX_HEADS or columns not in ROUTED_HEADS or columns > index_heads:
        raise ValueError(
            f"heads: expected h of {ROUTED_HEADS}, a residual counted, at most H of {INDEX_HEADS}, got h={columns}, "
            f"H={index_heads}; choose another h"
        )
    return build("topk_reranked", columns=columns, residual=residual, index_heads=index_heads)


def listable(blocks: int) -> int:
    """Keys that each of `blocks` thread blocks on one multiprocessor can list."""
    return (SHARED_BYTES // blocks - RESERVED_BYTES - FIXED_BYTES) // LISTED_BYTES // 32 * 32


@dataclass(frozen=True)
class Plan:
    """Division of one call's work into passes of `rows` rows; `scheduler.cuh` divides a pass among thread blocks."""

    rows: int
    stride: int  # one key in so many is sampled
    rank: int  # of the threshold in the sample
    room: int  # keys of a row that a block can list
    sampled: int  # columns of the sampled scores
    spans_offset: int  # in bytes: thresholds lie before
    division_offset: int
    sample_offset: int  # of the sampled keys
    scale_offset: int  # of their scales
    marks_offset: int
    scores_offset: int  # of failed rows' scores, `ld` columns apart
    ld: int
    pitch: int  # products of 64 keys from the marks of four rows to the next ones'


def sample_stride(keys: int, total: int, candidates: int, budget: int) -> int:
    """One key in so many is sampled: so many that two blocks a multiprocessor can list what passes, where any do.

    And so few that `threshold` holds a row's scores, and half of the budget the sampled keys of all requests.
    """
    least, most = STRIDES
    wanted = min(max(keys // SAMPLE, least), most)
    fits = [n for n in range(least, wanted + 1) if most_hits(threshold_rank(candidates, n), n) <= listable(2)]
    held = math.ceil(total * SAMPLED_BYTES / (budget / 2))
    return max(max(fits, default=most), math.ceil(keys / SAMPLED_AT_MOST), held)


@functools.lru_cache(maxsize=256)
def plan(
    rows: int,
    keys: int,
    candidates: int,
    rows_each: int,
    processors: int,
    budget: int = SCRATCH_BYTES,
    total: int | None = None,
) -> Plan:
    """Choose the sample, and as few passes as `budget` bytes of scratch allow; rows see at most `keys` of `total` keys.

    Scratch of a pass = rows · max(keys / 8, 4 · keys / stride) + 20 · rows bytes, total / 2 bytes where requests share
    the call, and the sampled keys. Raises ValueError when one block of rows does not fit.
    """
    total = keys if total is None else total
    stride = sample_stride(keys, total, candidates, budget)
    rank = threshold_rank(candidates, stride)
    room = listable(2) if most_hits(rank, stride) <= listable(2) else listable(1)
    sampled = aligned(keys / stride + 1, 4)
    sample_keys = math.ceil(total / stride)
    # Marks of four rows lie as far apart as the longest window, which may begin and end within a tile, and behind the
    # last ones' place the keys of all other requests follow.
    every = aligned(total, TILE) // MARKED_KEYS
    pitch = min((aligned(keys, TILE) + TILE) // MARKED_KEYS, every)
    row_bytes = max(pitch * MARK_BYTES // MARKED_ROWS, 4 * sampled)
    row_fixed = THRESHOLD_BYTES + 8
    fixed = 4096 + division_bytes(0, processors) + SAMPLED_BYTES * sample_keys + (every - pitch) * MARK_BYTES
    block_bytes = rows_each * (row_bytes + row_fixed) + 4
    fitting = (budget - fixed) // block_bytes
    if fitting < 1:
        raise ValueError(
            f"scratch budget: expected at least {block_bytes + fixed} bytes for {keys} of {total} keys a row, "
            f"got {budget}; raise it"
        )
    blocks = math.ceil(rows / rows_each)
    pass_blocks = math.ceil(blocks / math.ceil(blocks / fitting))
    rows = pass_blocks * rows_each
    spans = aligned(THRESHOLD_BYTES * rows)
    division = spans + aligned(8 * rows)
    sample = division + division_bytes(pass_blocks, processors)
    scale = sample + aligned(HEAD_DIM * sample_keys)
    marks = scale + aligned(4 * sample_keys)
    return Plan(
        rows=rows,
        stride=stride,
        rank=rank,
        room=room,
        sampled=sampled,
        spans_offset=spans,
        division_offset=division,
        sample_offset=sample,
        scale_offset=scale,
        marks_offset=marks,
        scores_offset=marks + aligned(rows * row_bytes + (every - pitch) * MARK_BYTES),
        ld=aligned(keys, 4),
        pitch=pitch,
    )


class RerankedCall(Call):
    """One `topk_reranked` call."""

    def __init__(
        self,
        rows: Rows,
        keys: Keys,
        heads: RoutedHeads,
        candidates: int,
        output: Output,
        longest: int | None = None,
        budget: int = SCRATCH_BYTES,
    ):
        """longest: keys that a row sees at most; all, unless given."""
        super().__init__(rows, keys, heads, output)
        longest = keys.seen(longest)
        self.candidates, self.processors = candidates, multiprocessors(rows.device)
        rows_each = block_rows(heads.columns)
        self.plan = plan(len(rows), longest, candidates, rows_each, self.processors, budget, len(keys))
        self.reserve(self.plan.rows, max(budget, self.plan.scores_offset + 4 * self.plan.ld))

    def module(self) -> Any:
        return module(self.heads.columns, self.rows.index_heads, self.heads.residual is not None)

    def division(self) -> RerankedPlan:
        p = self.plan
        return RerankedPlan(
            rows=p.rows,
            workers=self.processors,
            rank=p.rank,
            candidates=self.candidates,
            room=p.room,
            pitch=p.pitch,
            sampled=p.sampled,
            ld=p.ld,
            failed=self.failed(p.scores_offset, p.ld),
            sample=Sample(keys=self.part(p.sample_offset), scale=self.part(p.scale_offset), stride=p.stride),
            thresholds=self.part(0),
            spans=self.part(p.spans_offset),
            division=self.part(p.division_offset),
            marks=self.part(p.marks_offset),
            scores=self.part(p.scores_offset),
        )


def topk_reranked(
    rows: Rows,
    keys: Keys,
    heads: RoutedHeads,
    candidates: int,
    output: Output,
    *,
    longest: int | None = None,
    budget: int = SCRATCH_BYTES,
) -> None:
    """Write, of each row's best C = `candidates` keys by its routed heads, the exact top k by all heads.

    A residual adds its own column to the score by the routed heads, and counts as one of them in `ROUTED_HEADS`.
    Windows, what is written and scratch as in `topk_routed.topk_routed`, but head_ids ascend in each row and H is one
    of `INDEX_HEADS`. k ≤ C ≤ `MAX_CANDIDATES`; a row sees at most `KEYS` keys. Rows of at most C keys are scored with
    all heads throughout. Ties: the smaller position wins, and NaN scores come last, in either choice. `longest`, at
    least as large as every window, spares time and scratch where requests share a call: then their rows are in the
    order of their keys. Never synchronises. Raises ValueError on shapes, dtypes, layout or limits.
    Mirrors SGLang's fp8_mqa_logits + topk_transform; MISA (2605.07363).
    """
    if not output.topk <= candidates <= MAX_CANDIDATES:
        raise ValueError(
            f"candidates: expected k={output.topk} to {MAX_CANDIDATES}, got {candidates}; choose another C"
        )
    seen = keys.seen(longest)
    if seen > KEYS:
        raise ValueError(f"longest window: expected at most {KEYS} keys, got {seen}; score them with all heads")
    if not len(keys):
        output.ids.fill_(-1)
    elif len(rows):
        RerankedCall(rows, keys, heads, candidates, output, longest, budget).run()
