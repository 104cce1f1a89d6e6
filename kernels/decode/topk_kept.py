"""Exact top k of the scores of a row's kept tokens, as physical slots: a decode step's last launch (CUDA, sm_90)."""

from __future__ import annotations

import torch

from sglang_misa.kernels.build import build
from sglang_misa.kernels.decode.keep_blocks import KeptPages
from sglang_misa.kernels.layout import PAGE

MAX_ROW = 32768  # scores of a row: a thread block holds them in registers
LOWEST = torch.finfo(torch.float32).min


def topk_kept(
    logits: torch.Tensor,
    kept: KeptPages,
    *,
    block_size: int,
    out: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> None:
    """Write the slots of the k best of each row's first `kept.lens` scores, in the row's order, then -1.

    Exact: ties fall to the older token; NaN and -inf rank as the lowest finite number. Rows with no more than k tokens
    get all of them, their scores are not read. It reads lengths and pages before it waits for the launch in front of
    it, so nothing but the scoring may come between it and `keep_blocks`.

    logits:    fp32 [R, room], contiguous, room = (blocks + 1) · block_size <= MAX_ROW
    kept:      the pages that the scores belong to
    out:       int32 [R, k], contiguous: page · 64 + offset
    positions: int32 [R, k], contiguous, optional: the same tokens as positions in the row

    Mirrors SGLang's `topk_transform_512_v2` with `out_raw_indices`.
    """
    if logits.device.type == "cpu":
        _topk_on_cpu(logits, kept, block_size, out, positions)
        return
    rows, room = logits.shape
    if rows == 0:
        return
    build("sm90/topk_kept.cu").topk(
        logits.data_ptr(),
        kept.lens.data_ptr(),
        kept.pages.data_ptr(),
        kept.blocks.data_ptr(),
        out.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        rows,
        room,
        block_size,
        out.shape[1],
        torch.cuda.current_stream().cuda_stream,
    )


def _topk_on_cpu(
    logits: torch.Tensor, kept: KeptPages, block_size: int, out: torch.Tensor, positions: torch.Tensor | None
) -> None:
    """The same in PyTorch: what the interpreted kernels around it are tested with."""
    out.fill_(-1)
    if positions is not None:
        positions.fill_(-1)
    for row, count in enumerate(kept.lens.tolist()):
        token = torch.arange(count)
        if count > out.shape[1]:
            ranked = logits[row, :count].nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
            token = ranked.sort(descending=True, stable=True).indices[: out.shape[1]].sort().values
        out[row, : len(token)] = kept.pages[row, token // PAGE] * PAGE + token % PAGE
        if positions is not None:
            positions[row, : len(token)] = kept.blocks[row, token // block_size] * block_size + token % block_size
