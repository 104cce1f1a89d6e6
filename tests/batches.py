"""Requests in a pool of random pages, and their extend and decode calls."""

from __future__ import annotations

import torch
from pools import reference_runtime

from sglang_misa import reference_pages
from sglang_misa.call import DecodeCall, ExtendCall, Output, spans
from sglang_misa.config import MisaConfig
from sglang_misa.kernels.layout import PAGE
from sglang_misa.selection import Selector

TOPK = 64


class Batch:
    """Requests in a pool of random pages, in shuffled order, with stale garbage in the page table's tails."""

    def __init__(self, seed: int, lens: list[int], width: int):
        self.g = torch.Generator().manual_seed(seed)
        used = sum(-(-n // PAGE) for n in lens)
        keys = torch.randn(used + 1, PAGE, 128, generator=self.g).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
        scales = (torch.rand(used + 1, PAGE, generator=self.g) + 0.1).view(torch.uint8)
        self.index_k_pages = torch.cat([keys, scales], dim=1)
        order, start = (torch.randperm(used, generator=self.g) + 1).int(), 0
        self.table, self.lens = torch.full((len(lens), width), 1 << 30, dtype=torch.int32), lens
        for row, length in enumerate(lens):
            pages = -(-length // PAGE)
            self.table[row, :pages] = order[start : start + pages]
            start += pages

    def keys(self, request: int) -> torch.Tensor:
        pages = self.table[request, : -(-self.lens[request] // PAGE)].long()
        return reference_pages.dequantize_pages(self.index_k_pages[pages]).reshape(-1, 128)[: self.lens[request]]

    def queries(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.randn(rows, 32, 128, generator=self.g).to(torch.float8_e4m3fn)
        return q, torch.randn(rows, 32, generator=self.g)

    def extend(self, rows: list[int], queries: tuple[torch.Tensor, torch.Tensor], output: str = "slots") -> ExtendCall:
        """The last `rows` tokens of each request as one call."""
        row_batch = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).int()
        first_key = torch.tensor([0, *self.lens]).cumsum(0)[:-1]
        ids = torch.full((sum(rows), TOPK), -7, dtype=torch.int32)
        outputs = {
            "slots": Output(ids, self.table, row_batch),
            "offsets": Output(ids, offsets=first_key[row_batch].int()),
            "positions": Output(ids),
        }
        seen = [torch.arange(n - t + 1, n + 1) for t, n in zip(rows, self.lens, strict=True)]
        return ExtendCall(
            layer=0,
            spans=spans(rows, self.lens),
            index_q=queries[0],
            head_gates=queries[1],
            index_k=torch.cat([self.keys(request) for request in range(len(rows))]),
            k_scale=torch.ones(sum(self.lens)),
            seq_lens=torch.cat(seen).int(),
            ks=first_key[row_batch].int(),
            row_batch=row_batch,
            page_table=self.table,
            request_lens=torch.tensor(self.lens, dtype=torch.int32),
            output=outputs[output],
        )

    def decode(self, queries: tuple[torch.Tensor, torch.Tensor], *, positions: bool = False) -> DecodeCall:
        return DecodeCall(
            layer=0,
            index_q=queries[0],
            head_gates=queries[1],
            index_k_pages=self.index_k_pages,
            page_table=self.table,
            seq_lens=torch.tensor(self.lens, dtype=torch.int32),
            ids=torch.full((len(self.lens), TOPK), -7, dtype=torch.int32),
            positions=positions,
        )


def selector(batch: Batch, **settings: object) -> Selector:
    """What selects for a batch's pool, of one layer."""
    return Selector(reference_runtime(MisaConfig(**settings), TOPK), [batch.index_k_pages])


def sets(ids: torch.Tensor) -> list[set[int]]:
    """The tokens of each row."""
    return [set(row.tolist()) - {-1} for row in ids]
