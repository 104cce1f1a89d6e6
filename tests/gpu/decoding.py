"""Decode calls at full size, with everything that they write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracles import Paged, ints
from torch import Tensor

from sglang_misa.bench.inputs import FP8, pack_pages
from sglang_misa.kernels.decode.operands import Chosen
from sglang_misa.kernels.decode.topk_blocks import DecodeScratch, decode_topk
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES

DEVICE = "cuda"
TABLE_WIDTH = 2188  # pages of a 140,000-token context: the table is that wide however short the rows are
TOPK, BLOCKS, BLOCK_SIZE = 2048, 64, 128
POOL_PAGES = (1 << 17) + 64  # 1.1 GB: 64 rows of 128K


@dataclass(frozen=True)
class Pool:
    """Index-K pages and their means; page 0 is NaN and belongs to nobody."""

    pages: Tensor
    means: Tensor

    @classmethod
    def random(cls, count: int) -> Pool:
        """Keys with a drift over the pages, so that blocks differ."""
        pages = torch.empty(count, PAGE_BYTES, dtype=torch.uint8, device=DEVICE)
        means = torch.empty(count, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        for part in torch.arange(count).split(1 << 13):
            drift = 0.7 * torch.randn(len(part), 1, HEAD_DIM, device=DEVICE)
            keys = (torch.randn(len(part), PAGE, HEAD_DIM, device=DEVICE) + drift).to(FP8)
            scales = torch.rand(len(part), PAGE, device=DEVICE) + 0.5
            pages[part] = pack_pages(keys.flatten(0, 1), scales.flatten())
            means[part] = (keys.float() * scales.unsqueeze(-1)).mean(1).bfloat16()
        pages[0], means[0] = 0x7F, torch.nan
        return cls(pages, means)

    def rows(self, lens: list[int], heads: int, seed: int, width: int = TABLE_WIDTH) -> Paged:
        """Rows of `lens` tokens on random pages; the table's stale tails name pages that do not exist."""
        torch.manual_seed(seed)
        used = [-(-length // PAGE) for length in lens]
        ids = torch.randperm(len(self.pages) - 1, device=DEVICE)[: sum(used)] + 1
        table = torch.full((len(lens), width), 2**31 - 1, dtype=torch.int32, device=DEVICE)
        table[:, 1::2] = -(2**31)
        for row, own in enumerate(ids.split(used)):
            table[row, : len(own)] = own.int()
        return Paged(
            torch.randn(len(lens), heads, HEAD_DIM, device=DEVICE).to(FP8),
            torch.randn(len(lens), heads, device=DEVICE) * 0.1 + 0.05,
            self.pages,
            self.means,
            table,
            ints(lens, DEVICE),
        )


@dataclass(frozen=True)
class Call:
    """One decode call by HISA's block filter."""

    batch: Paged
    scratch: DecodeScratch
    out: Tensor
    positions: Tensor

    @classmethod
    def of(cls, batch: Paged) -> Call:
        scratch = DecodeScratch.allocate(
            batch.rows, batch.page_table.shape[1], BLOCKS, BLOCK_SIZE, batch.page_table.device
        )
        scratch.logits.fill_(torch.nan)
        scratch.kept.scores.fill_(torch.nan)
        for left in (scratch.kept.pages, scratch.kept.blocks, scratch.kept.lens):
            left.fill_(2**31 - 1)
        out = torch.full((batch.rows, TOPK), -7, dtype=torch.int32, device=batch.page_table.device)
        return cls(batch, scratch, out, out.clone())

    def run(self) -> None:
        chosen = Chosen(self.out, self.positions)
        decode_topk(self.batch.operands, self.batch.page_means, scratch=self.scratch, out=chosen)
