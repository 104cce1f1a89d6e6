"""Exact top k of the scores of a row's kept or listed tokens, as physical slots: a decode step's last launch (CUDA)."""

from __future__ import annotations

import torch

from sglang_misa.kernels.build import build, stream_of
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.decode.keep_blocks import KeptPages
from sglang_misa.kernels.decode.operands import Chosen
from sglang_misa.kernels.layout import MAX_KEPT_DECODE, PAGE
from sglang_misa.kernels.structs import Kept, Listed, Scored

VECTOR = 4  # scores that are loaded at once
LOWEST = torch.finfo(torch.float32).min


def topk_kept(logits: torch.Tensor, kept: KeptPages, out: Chosen) -> None:
    """Write the k best of each row's first `kept.lens` scores.

    Exact: ties fall to the older token; NaN and -inf rank as the lowest finite number. Rows with no more than k tokens
    get all of them, their scores are not read. It reads lengths and pages before it waits for the launch in front of
    it, so nothing but the scoring may come between it and `keep_blocks`.

    logits: fp32 [R, room], contiguous, room = (blocks + 1) · block_size <= MAX_KEPT_DECODE
    kept:   the pages that the scores belong to

    Mirrors SGLang's `topk_transform_512_v2` with `out_raw_indices`.
    """
    rows, room = _check_scores(logits, out)
    expect("kept.pages", kept.pages, (rows, room // PAGE), torch.int32, device=logits.device)
    expect("kept.blocks", kept.blocks, (rows, None), torch.int32, device=logits.device)
    expect("kept.lens", kept.lens, (rows,), torch.int32, device=logits.device)
    if logits.device.type == "cpu":
        _topk_on_cpu(logits, kept, out)
    elif rows:
        tokens = Kept(pages=kept.pages, blocks=kept.blocks, room=room, block=kept.block_size)
        stream = stream_of(logits.device)
        build("topk_kept").topk_kept(bytes(_scored(logits, kept.lens, out)), bytes(tokens), rows, stream)


def topk_listed(
    logits: torch.Tensor, listed: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, out: Chosen
) -> None:
    """The same of the scores of listed tokens: those at a row's first min(len, C) positions, which ascend.

    It reads lengths, the list and the page table before it waits for the launch in front of it, so nothing but the
    scoring may come between it and `list_candidates`.

    logits:     fp32 [R, C], contiguous, C <= MAX_KEPT_DECODE and divisible by 4
    listed:     int32 [R, C], contiguous: positions in the row
    page_table: int32 [R, W], unit column stride; seq_lens: int32 [R]
    """
    rows, room = _check_scores(logits, out)
    expect("listed", listed, (rows, room), torch.int32, device=logits.device)
    expect("page_table", page_table, (rows, None), torch.int32, row_stride=True, device=logits.device)
    expect("seq_lens", seq_lens, (rows,), torch.int32, device=logits.device)
    if logits.device.type == "cpu":
        _topk_listed_on_cpu(logits, listed, page_table, seq_lens, out)
    elif rows:
        tokens = Listed(positions=listed, table=page_table, pitch=page_table.stride(0), room=room)
        stream = stream_of(logits.device)
        build("topk_kept").topk_listed(bytes(_scored(logits, seq_lens, out)), bytes(tokens), rows, stream)


def _check_scores(logits: torch.Tensor, out: Chosen) -> tuple[int, int]:
    """Rows and scores of a row. Raises ValueError unless `logits` are scores, and `out` has room for their best."""
    expect("logits", logits, (len(logits), None), torch.float32)
    rows, room = logits.shape
    if room > MAX_KEPT_DECODE or room % VECTOR:
        raise ValueError(
            f"logits: expected at most {MAX_KEPT_DECODE} scores a row, a multiple of {VECTOR}, got {room}; keep or "
            "list fewer"
        )
    out.check(rows, logits.device)
    return rows, room


def _scored(logits: torch.Tensor, lens: torch.Tensor, out: Chosen) -> Scored:
    return Scored(scores=logits, lens=lens, slots=out.slots, positions=out.positions, k=out.topk)


def _best_on_cpu(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ascending places of the k largest of a row; all of no more."""
    if len(logits) <= k:
        return torch.arange(len(logits))
    ranked = logits.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
    return ranked.sort(descending=True, stable=True).indices[:k].sort().values


def _topk_listed_on_cpu(
    logits: torch.Tensor, listed: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, out: Chosen
) -> None:
    """The same in PyTorch: what the interpreted kernels around it are tested with."""
    out.clear()
    for row, length in enumerate(seq_lens.tolist()):
        token = listed[row, _best_on_cpu(logits[row, :length], out.topk)]
        out.write(row, page_table[row, token // PAGE] * PAGE + token % PAGE, token)


def _topk_on_cpu(logits: torch.Tensor, kept: KeptPages, out: Chosen) -> None:
    """The same in PyTorch."""
    out.clear()
    for row, count in enumerate(kept.lens.tolist()):
        token = _best_on_cpu(logits[row, :count], out.topk)
        position = kept.blocks[row, token // kept.block_size] * kept.block_size + token % kept.block_size
        out.write(row, kept.pages[row, token // PAGE] * PAGE + token % PAGE, position)
