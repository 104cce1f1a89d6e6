"""The engine in plain PyTorch: the algorithms of `reference.py` on any device, far slower than stock."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_misa import reference, reference_pages
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run, Span
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.page_stats import PageStats
from sglang_misa.runtime import Runtime

_PAGES_AT_ONCE = 4096  # 128 MiB of fp32 keys


class ReferenceEngine:
    """See `engines.Engine`. Extend calls sync with the host; decode can be captured in a CUDA graph."""

    least_rows = 1

    def __init__(self, runtime: Runtime, index_k_pages: Sequence[Tensor], *, keeps: bool = False):
        self.keeps = keeps
        self.index_k_pages = tuple(index_k_pages)
        self.stats = PageStats.allocate(index_k_pages)
        self.behind = False

    def extend(self, call: ExtendCall, runs: Sequence[tuple[SelectionPolicy, Run]]) -> None:
        if self.keeps:
            self.extended(call.layer, call.spans, call.page_table, call.request_lens)
        else:
            for span in call.spans:
                self._update(call.layer, call.page_table[span.request, : span.length // PAGE])
        for policy, run in runs:
            for span, rows in run.by_request():
                self._select(call, policy, span, rows)

    def extended(self, layer: int, spans: tuple[Span, ...], page_table: Tensor, request_lens: Tensor) -> None:
        for span in spans:
            self._update(layer, page_table[span.request, span.cached_pages : span.length // PAGE])

    def _select(self, call: ExtendCall, policy: SelectionPolicy, span: Span, chosen: range) -> None:
        """Select for some rows of a request."""
        keys, k_scale = (part.unsqueeze(0) for part in call.keys(span))
        pages = call.page_table[span.request, : span.length // PAGE].long()
        for start, end in reference.row_chunks(len(chosen), span.length):
            rows = slice(chosen.start + start, chosen.start + end)
            scores = reference.policy_scores(
                policy,
                call.index_q[rows].unsqueeze(0),
                call.head_gates[rows].unsqueeze(0),
                keys,
                k_scale,
                self.stats.means[call.layer][pages].unsqueeze(0),
                call.seq_lens[rows].unsqueeze(0),
            )
            _write(call.output.rows(rows), scores.squeeze(0))

    def decode(self, call: DecodeCall, policy: SelectionPolicy) -> None:
        self.behind = True
        self._update_newest(call.layer, call.page_table, call.seq_lens)
        scores = reference.decode_scores(
            policy,
            call.index_q,
            call.head_gates,
            call.index_k_pages,
            self.stats.means[call.layer],
            call.page_table,
            call.seq_lens,
        )
        _write(call.output, scores)

    def pages_written(self, layer: int, slots: Tensor) -> None:
        self._update(layer, slots[(slots >= 0) & (slots % PAGE == PAGE - 1)] // PAGE)

    def compared(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        at = pages.clamp_min(0)
        expected = reference_pages.page_means(self.index_k_pages[layer][at]).bfloat16()
        seen = torch.stack((self.stats.means[layer][at], expected)).view(torch.int32)
        return seen, (seen[0] != seen[1]).any(1).int().masked_fill(pages < 0, -1)

    def end_step(self, page_table: Tensor, seq_lens: Tensor) -> None:
        self.behind = False
        for layer, pages in enumerate(self.index_k_pages):
            if len(pages):
                self._update_newest(layer, page_table, seq_lens)

    def _update(self, layer: int, pages: Tensor) -> None:
        """Recompute the statistics of `pages` [n] (any integer dtype)."""
        for part in pages.long().split(_PAGES_AT_ONCE):
            self.stats.means[layer][part] = reference_pages.page_means(self.index_k_pages[layer][part]).bfloat16()

    def _update_newest(self, layer: int, page_table: Tensor, seq_lens: Tensor) -> None:
        """The same for the page that each row's newest token completed, without a look at the host.

        A row that completed nothing writes the statistics of page 0, SGLang's dummy page, which nobody reads.
        """
        newest = (seq_lens.long() // PAGE - 1).clamp_min(0)
        completed = (seq_lens > 0) & (seq_lens % PAGE == 0)
        pages = torch.where(completed, page_table.gather(1, newest.unsqueeze(1)).squeeze(1), 0)
        self._update(layer, pages)


def _write(output: Output, scores: Tensor) -> None:
    """The top k of `scores` [T, L] into `output`."""
    output.ids.copy_(output.of(reference.top_tokens(scores, output.topk)))
