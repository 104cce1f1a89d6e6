"""Page statistics beside SGLang's index-K pages: one tensor a layer and kind, indexed by physical page id.

They are computed from the pool's own bytes when a page's last token is written. A row only ever uses pages that are
complete at its own length, and positions are (re)written in increasing order, so what a row uses is always that of the
bytes in the page: radix sharing, page reuse, retraction and rejected drafts need no bookkeeping and no flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.kernels.layout import HEAD_DIM


@dataclass(frozen=True)
class PageStats:
    """Statistics of one KV pool's pages (a draft model's pool has its own).

    means: bf16 [num_pages, 128] a layer (0 rows in a layer without an indexer): the mean of a page's dequantised keys
    """

    means: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, index_k_pages: Sequence[Tensor]) -> PageStats:
        """Room for the pages of a pool: `index_k_pages` uint8 [num_pages, 8448] a layer."""
        return cls(
            tuple(torch.zeros(p.shape[0], HEAD_DIM, dtype=torch.bfloat16, device=p.device) for p in index_k_pages)
        )

    @staticmethod
    def bytes_per_page() -> int:
        """Bytes of one page's statistics in one layer: what the KV pool's budget must grow by."""
        return int(HEAD_DIM * torch.bfloat16.itemsize)

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.means)
