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

from sglang_misa.kernels.build import Target, build
from sglang_misa.kernels.layout import ROUTED_HEADS
from sglang_misa.kernels.prefill.plan import SCRATCH_BYTES, aligned, plan
from sglang_misa.kernels.prefill.residual import Residual
from sglang_misa.kernels.prefill.workspace import Call, Problem, multiprocessors
from sglang_misa.kernels.structs import RoutedPlan, Sample


def module(columns: int, residual: bool = False) -> Any:
    """The compiled kernels for so many columns a row: its routed heads and, if there is one, the residual."""
    if columns not in ROUTED_HEADS:
        raise ValueError(
            f"head_ids: expected one of {ROUTED_HEADS} columns a row, got {columns - residual} routed heads"
            f"{' and a residual' if residual else ''}; choose another h"
        )
    return build("topk_routed", columns=columns, residual=residual)


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
            bytes(problem.struct()), first, rows, out.data_ptr(), out.stride(0), stream
        )
    return out
