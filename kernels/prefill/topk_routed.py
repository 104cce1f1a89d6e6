"""Routed-head scores of query rows against a flat run of index keys, and the exact top k of them (CUDA, sm_90a).

`topk_routed` never writes the score matrix. In passes over a bounded number of rows:

1. `sample` scores one key in every n; 2. `threshold` takes a low quantile of that sample per row, by score and then
position; 3. `collect` scores all keys and appends what passes to buffers owned by single threads; 4. `select` takes the
exact top k of the appended. Rows that collected fewer than k or overflowed a buffer are listed on the device and, at
the end, 5. `redo` scores them into memory and selects there. So the result is the top k by (score, then smaller
position) whatever the threshold was; a NaN ranks below every number.

No order of the keys is in step with the sample, for the place of a sampled key among its n is hashed; nor with the
buffers, which their threads hand on in turn. Scores that tie at the threshold pass as far as a position, so keys that
are all the same bring no more of them than others. `slow_rows` counts what `redo` had to do none the less.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sglang_misa.kernels.build import build, stream_of
from sglang_misa.kernels.layout import ROUTED_HEADS
from sglang_misa.kernels.prefill.operands import Keys, Output, RoutedHeads, Rows, inputs
from sglang_misa.kernels.prefill.plan import SCRATCH_BYTES, aligned, plan
from sglang_misa.kernels.prefill.workspace import Call, multiprocessors
from sglang_misa.kernels.structs import RoutedPlan, Sample


def module(columns: int, residual: bool = False) -> Any:
    """The compiled kernels for so many columns a row: its routed heads and, if there is one, the residual."""
    if columns not in ROUTED_HEADS:
        raise ValueError(
            f"head_ids: expected one of {ROUTED_HEADS} columns a row, got {columns - residual} routed heads"
            f"{' and a residual' if residual else ''}; choose another h"
        )
    return build("topk_routed", columns=columns, residual=residual)


class RoutedCall(Call):
    """One `topk_routed` call."""

    def __init__(
        self,
        rows: Rows,
        keys: Keys,
        heads: RoutedHeads,
        output: Output,
        longest: int | None = None,
        budget: int = SCRATCH_BYTES,
    ):
        """longest: keys that a row sees at most; all, unless given."""
        super().__init__(rows, keys, heads, output)
        longest = keys.seen(longest)
        processors = multiprocessors(rows.device)
        self.plan = plan(len(rows), longest, output.topk, heads.columns, processors, budget, len(keys))
        self.ld = aligned(longest, 4)  # of scores that `redo` writes
        # The whole budget at once: a warm-up before the KV pool is sized then leaves nothing to grow while serving.
        self.reserve(len(rows), max(budget, self.plan.bulk_offset + 4 * self.ld))

    def module(self) -> Any:
        return module(self.heads.columns, self.heads.residual is not None)

    def division(self) -> RoutedPlan:
        p = self.plan
        return RoutedPlan(
            rows=p.rows,
            workers=p.workers,
            runs=p.runs,
            buffers=p.buffers,
            rank=p.rank,
            spare=p.spare,
            entries=p.entries,
            room=p.room,
            sampled=p.sampled,
            ld=self.ld,
            failed=self.failed(p.bulk_offset, self.ld),
            sample=Sample(keys=self.part(p.sample_offset), scale=self.part(p.scale_offset), stride=p.stride),
            thresholds=self.part(0),
            division=self.part(p.division_offset),
            counts=self.part(p.counts_offset),
            bulk=self.part(p.bulk_offset),
        )


def topk_routed(
    rows: Rows,
    keys: Keys,
    heads: RoutedHeads,
    output: Output,
    *,
    longest: int | None = None,
    budget: int = SCRATCH_BYTES,
) -> None:
    """Write the exact top k of k_scale[l] · Σ_{j in head_ids[t]} head_gates[t, j] · ReLU(index_q[t, j] · index_k[l]).

    l runs over [ks[t], ke[t]). A residual adds its own column to the sum, and counts as one of the h in `ROUTED_HEADS`.
    `output` gets, in no order, positions relative to ks[t], or what stands for them there: slots are
    64 · page_table[row_batch[t], position // 64] + position % 64. Rows of at most k keys get all of them and -1 behind.
    Among equal scores the smaller position wins; NaN scores come last. `longest`, at least as large as every window,
    spares time where requests share a call. Scratch, held per device, is at most `budget` bytes plus the row lists and
    one row of scores. Never synchronises. Raises ValueError on shapes, dtypes or layout.
    Mirrors SGLang's fp8_mqa_logits + topk_transform; MISA (2605.07363).
    """
    if not len(keys):
        output.ids.fill_(-1)
    elif len(rows):
        RoutedCall(rows, keys, heads, output, longest, budget).run()


def routed_logits(rows: Rows, keys: Keys, heads: RoutedHeads, first: int, count: int) -> torch.Tensor:
    """The scores that `topk_routed` ranks, fp32 [count, S], bit for bit; -inf outside [ks[t], ke[t]).

    Of `count` rows from `first` on, so that a caller bounds the matrix.
    """
    out = torch.full((count, aligned(len(keys), 4)), -math.inf, device=rows.device)[:, : len(keys)]
    if count and len(keys):
        call = bytes(inputs(rows, keys, heads))
        kernels = module(heads.columns, heads.residual is not None)
        kernels.logits(call, first, count, out.data_ptr(), out.stride(0), stream_of(rows.device))
    return out
