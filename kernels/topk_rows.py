"""Exact top k of rows of scores in memory, each with its id (CUDA): the finish of re-ranking and block selection."""

from __future__ import annotations

import torch

from sglang_misa.kernels.cuda_host import Target, build
from sglang_misa.kernels.layout import expect

MAX_COLUMNS = 49152  # scores of a row that shared memory holds


def topk_rows(
    scores: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    k: int,
    *,
    out: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    row_batch: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ids of the k largest of the first counts[t] scores of each row, in no order, -1 behind min(k, counts[t]).

    scores fp32 [T, C] and ids int32 [T, C] with unit column stride and any row stride, C at most `MAX_COLUMNS`, ids
    not negative and distinct in a row; counts int32 [T]; out int32 [T, k]. With `page_table` [B, W] and `row_batch` [T]
    writes page_table[row_batch[t], id], with `offsets` [T] id + offsets[t]. Equal scores: the smaller id wins; -inf and
    then NaN come last and still fill places. Raises ValueError on shapes, dtypes or layout.
    Mirrors SGLang's fast_topk_transform.
    """
    rows, columns = scores.shape
    for name, tensor, dtype in (("scores", scores, torch.float32), ("ids", ids, torch.int32)):
        fits = tensor.shape == (rows, columns) and columns <= MAX_COLUMNS and (columns < 2 or tensor.stride(1) == 1)
        if not (fits and tensor.dtype == dtype and tensor.is_cuda):
            raise ValueError(
                f"{name}: expected a CUDA tensor [{rows}, {columns}] of {dtype} with unit column stride and at most "
                f"{MAX_COLUMNS} columns, got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}, strides "
                f"{tensor.stride()}; convert or split it first"
            )
    expect("counts", counts, (rows,), torch.int32, cuda=True)
    if out is None:
        out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    target = Target(out, page_table, row_batch, offsets)
    target.check(rows, k)
    if rows > 0:
        stream = torch.cuda.current_stream(scores.device).cuda_stream
        build("topk_rows.cu").topk_rows(
            scores.data_ptr(),
            scores.stride(0),
            ids.data_ptr(),
            ids.stride(0),
            counts.data_ptr(),
            rows,
            columns,
            target.arguments(),
            stream,
        )
    return out
