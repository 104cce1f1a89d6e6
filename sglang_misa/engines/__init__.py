"""Engines select tokens: `kernels` on a GPU, `reference` anywhere. One is chosen for each pool, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sglang_misa.call import DecodeCall, ExtendCall, Run, Span
from sglang_misa.config import SelectionPolicy
from sglang_misa.page_stats import PageStats
from sglang_misa.runtime import Runtime


class Engine(Protocol):
    """What selects for the layers of one KV pool, and keeps the statistics of its pages."""

    stats: PageStats
    keeps: bool  # whether what it has of a page is right in every call behind the one that completed it
    least_rows: int  # of a request in an extend call, on average, from which selecting pays
    behind: bool  # whether a decode step has begun whose pages `end_step` has not seen

    def extend(self, call: ExtendCall, runs: Sequence[tuple[SelectionPolicy, Run]]) -> None:
        """Compute statistics of the call's pages, then select for the rows of each run into `call.output`."""

    def decode(self, call: DecodeCall, policy: SelectionPolicy) -> None:
        """Select for every row into `call.ids`: its tokens, then -1. Capturable in a CUDA graph."""

    def extended(self, layer: int, spans: tuple[Span, ...], page_table: Tensor, request_lens: Tensor) -> None:
        """Update the pages of `layer` that an extend call completed, and that of the token before it.

        As `extend` does; for a call that stock DSA selects for. Arguments as in `ExtendCall`.
        """

    def pages_written(self, layer: int, slots: Tensor) -> None:
        """Update the pages whose last token is among `slots` [n] int64, just written in `layer` from elsewhere.

        A negative slot is padding.
        """

    def compared(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics of `pages` [n] integer, as stored and as computed anew from the pool's bytes, and a verdict.

        int32 [2, n, words], by bits, and int32 [n]: 1 where the two differ, 0 where not, -1 for a negative page.
        """

    def end_step(self, page_table: Tensor, seq_lens: Tensor) -> None:
        """Update, in every layer, the page that each row's newest token completed. Capturable in a CUDA graph."""


def engine_for(runtime: Runtime, index_k_pages: Sequence[Tensor], *, keeps: bool) -> Engine:
    """The engine of a pool with `index_k_pages` uint8 [num_pages, 8448] a layer.

    keeps: whether the hooks have it compute the statistics of every page that is completed, as decode needs them. Then
    an extend call computes those of its new pages alone, else those of all pages of its requests.
    """
    if runtime.kernels:
        from sglang_misa.engines.kernels import KernelEngine

        return KernelEngine(runtime, index_k_pages, keeps=keeps)
    from sglang_misa.engines.reference import ReferenceEngine

    return ReferenceEngine(runtime, index_k_pages, keeps=keeps)
