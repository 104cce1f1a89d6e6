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

from sglang_misa.kernels.layout import HEAD_DIM, sketch_bytes


@dataclass(frozen=True)
class PageStats:
    """Statistics of one KV pool's pages (a draft model's pool has its own).

    Each tensor is one layer's, with 0 rows in a layer without an indexer.
    means: bf16 [num_pages, 128]: the mean of a page's dequantised keys
    sketches: uint8 [num_pages, layout.sketch_bytes(bits)], or None where no policy reads them
    """

    means: tuple[Tensor, ...]
    sketches: tuple[Tensor, ...] | None

    @classmethod
    def allocate(cls, index_k_pages: Sequence[Tensor], bits: int | None = None) -> PageStats:
        """Room for the pages of a pool: `index_k_pages` uint8 [num_pages, 8448] a layer; `bits` of the sketches."""

        def zeros(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(torch.zeros(len(pages), width, dtype=dtype, device=pages.device) for pages in index_k_pages)

        sketches = None if bits is None else zeros(sketch_bytes(bits), torch.uint8)
        return cls(zeros(HEAD_DIM, torch.bfloat16), sketches)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.means, *(self.sketches or ())))

    def of(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        """Copies of what `pages` [n] of a layer have: means [n, 128], and sketches [n, bytes] where there are any."""
        return tuple(kind[pages] for kind in self.kinds(layer))

    def kinds(self, layer: int) -> tuple[Tensor, ...]:
        """The means of one layer's pages, and their sketches where there are any."""
        return (self.means[layer],) if self.sketches is None else (self.means[layer], self.sketches[layer])

    def sketch(self, layer: int) -> Tensor | None:
        """The sketches of one layer, or None without any."""
        return None if self.sketches is None else self.sketches[layer]
