"""Page means beside SGLang's index-K pages: one bf16 tensor a layer, indexed by physical page id, owned by the pool.

A page's mean is computed from the pool's own bytes when its last token is written. A row only ever uses pages that
are complete at its own length, and positions are (re)written in increasing order, so a used mean is always that of
the bytes in the page: radix sharing, page reuse, retraction and rejected drafts need no bookkeeping and no flags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels import page_means
from sglang_misa.kernels.layout import HEAD_DIM, PAGE


class PageStats:
    """Page means of one KV pool (a draft model's pool has its own)."""

    def __init__(self, index_buffers: Sequence[Tensor], *, kernels: bool = False):
        """`index_buffers`: the pool's index-K, one [num_pages, 8448] uint8 a layer (0 rows without an indexer).

        kernels: update with the Triton kernels (CUDA) instead of the reference.
        """
        self.kernels = kernels
        self.means = [torch.zeros(b.shape[0], HEAD_DIM, dtype=torch.bfloat16, device=b.device) for b in index_buffers]
        self.behind = False  # whether a decode step has selected in a layer and not come to `end_layer`'s last one
        self._layers = page_means.Layers.of(index_buffers, self.means) if kernels else None

    @staticmethod
    def bytes_per_page() -> int:
        """Bytes of one page's mean in one layer: what the KV pool's budget must grow by."""
        return int(HEAD_DIM * torch.bfloat16.itemsize)

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.means)

    def of(self, layer: int, page_table: Tensor) -> Tensor:
        """Means [N, P, 128] of page ids [N, P], for pool-local `layer`. Ids must be valid, not stale."""
        return self.means[layer][page_table.long()]

    def heal(self, layer: int, buffer: Tensor, page_table: Tensor, seq_lens: Tensor, block_size: int) -> Tensor:
        """Recompute every complete page of every request from `buffer` [num_pages, 8448] uint8; returns block means.

        page_table [requests, W] int32, seq_lens [requests] int32; block_size in tokens. Block means are bf16 [requests,
        W * 64 // block_size, 128], undefined beyond a request's complete blocks. The reference syncs with the host:
        prefill only.
        """
        if self.kernels:
            return page_means.update_page_means(buffer, self.means[layer], page_table, seq_lens, block_size)
        block_pages = block_size // PAGE
        shape = len(page_table), page_table.shape[1] // block_pages, HEAD_DIM
        blocks = torch.empty(shape, dtype=torch.bfloat16, device=buffer.device)
        for request, length in enumerate(seq_lens.tolist()):
            pages = page_table[request : request + 1, : length // PAGE]
            self.update_pages(layer, buffer, pages[0])
            complete = reference.block_means(self.of(layer, pages), block_pages)
            blocks[request, : complete.shape[1]] = complete[0]
        return blocks

    def update_pages(self, layer: int, buffer: Tensor, pages: Tensor) -> None:
        """Recompute the means of `pages` [n] (any integer dtype) with the reference."""
        pages = pages.long()
        for part in pages.split(4096):  # 4096 pages are 128 MiB of fp32 keys
            self.means[layer][part] = reference.page_means(buffer[part]).bfloat16()

    def update_written(self, layer: int, buffer: Tensor, slots: Tensor) -> None:
        """Recompute the pages whose last token is among `slots` [n] just written. The reference syncs with the host."""
        if self.kernels:
            page_means.update_slots(buffer, self.means[layer], slots)
        else:
            self.update_pages(layer, buffer, slots[slots % PAGE == PAGE - 1] // PAGE)

    def update_newest(self, layer: int, buffer: Tensor, page_table: Tensor, row_lens: Tensor) -> None:
        """For each decode row, recompute one layer's newest complete page if the row's newest token completed it.

        page_table [R, W], row_lens [R]. The reference; capturable: a row that completed nothing writes the mean of page
        0, SGLang's dummy page, which nobody reads.
        """
        newest = (row_lens.long() // PAGE - 1).clamp_min(0)
        completed = (row_lens > 0) & (row_lens % PAGE == 0)
        pages = torch.where(completed, page_table.gather(1, newest.unsqueeze(1)).squeeze(1), 0).long()
        self.means[layer][pages] = reference.page_means(buffer[pages]).bfloat16()

    def end_layer(self, page_table: Tensor, row_lens: Tensor, *, last: bool) -> None:
        """A decode step's layer has its selection; after the `last` one, `update_newest` of all layers by one kernel.

        That is in time: block pruning reads no mean of a page that the same step completes. Such a page lies in the
        row's newest complete block, which is kept unseen, or in the tail behind it, for a request's rows of one step
        (a token and its drafts) are at most 64.
        """
        self.behind = not last
        if last:
            assert self._layers is not None
            page_means.update_last_page_means(self._layers, page_table, row_lens)
