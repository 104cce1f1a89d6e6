"""The engine on a Hopper GPU: composes the kernels into policies and owns their scratch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa import ladder
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run, Span
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels import page_means
from sglang_misa.kernels.decode.operands import Chosen, PagedRows, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.topk_blocks import DecodeScratch, decode_topk
from sglang_misa.kernels.decode.topk_sketched import SketchScratch, sketch_topk
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES
from sglang_misa.kernels.prefill.block_means import block_means
from sglang_misa.kernels.prefill.operands import Keys, RoutedHeads, Rows
from sglang_misa.kernels.prefill.route import Blocks, block_scores, route
from sglang_misa.kernels.prefill.topk_blocks import topk_blocks
from sglang_misa.kernels.prefill.topk_reranked import topk_reranked
from sglang_misa.kernels.prefill.topk_routed import topk_routed
from sglang_misa.kernels.prefill.workspace import slow_rows
from sglang_misa.metrics import recorder
from sglang_misa.page_stats import PageStats
from sglang_misa.policy import EXACT
from sglang_misa.runtime import Runtime


class KernelEngine:
    """See `engines.Engine`. `admission` says which policies have no kernel."""

    def __init__(self, runtime: Runtime, index_k_pages: Sequence[Tensor], *, keeps: bool = False):
        self.runtime, self.keeps = runtime, keeps
        # The rows of a thread block share their scan of keys, so one that has rows of many requests scans too much.
        self.least_rows = 10 if keeps else 14
        self.index_k_pages = tuple(index_k_pages)
        self.stats = PageStats.allocate(index_k_pages, runtime.config.sketch)
        self.behind = False
        self._layers = page_means.Layers.of(index_k_pages, self.stats.means, self.stats.sketches)

    def extend(self, call: ExtendCall, runs: Sequence[tuple[SelectionPolicy, Run]]) -> None:
        if self.keeps:
            self.extended(call.layer, call.spans, call.page_table, call.request_lens)
        elif any(policy.pooled for policy, _ in runs):
            self._update(call.layer, call.page_table, call.request_lens)
        for policy, run in runs:
            self._select(call, policy, run)

    def extended(self, layer: int, spans: tuple[Span, ...], page_table: Tensor, request_lens: Tensor) -> None:
        self._update(layer, page_table, request_lens, _kept(spans, page_table.device))

    def _update(
        self, layer: int, page_table: Tensor, request_lens: Tensor, kept: page_means.Kept | None = None
    ) -> None:
        stats = self.stats.means[layer], page_table, request_lens, self.stats.sketch(layer)
        page_means.update_page_means(self.index_k_pages[layer], *stats, kept)

    def _select(self, call: ExtendCall, policy: SelectionPolicy, run: Run) -> None:
        windows, keys = _windows(run, call.ks, call.seq_lens, call.row_batch), run.keys
        rows, output = windows.rows, call.output.rows(windows.rows)
        index_q, gates = call.index_q[rows], call.head_gates[rows].contiguous()
        queries, scored = Rows(index_q, gates, windows.ks, windows.ke), Keys(call.index_k[keys], call.k_scale[keys])
        if policy.blocks is not None:
            scores = block_scores(index_q, gates, self._blocks(call, policy, windows))
            topk_blocks(queries, scored, scores, policy.blocks, policy.block_size, output)
        else:
            if policy.heads is None:
                heads = RoutedHeads(_all_heads(*gates.shape, gates.device))
            else:
                blocks = self._blocks(call, policy, windows)
                heads = route(index_q, gates, blocks, policy.heads, policy.router, policy.residual)
            if policy.candidates is None:
                topk_routed(queries, scored, heads, output, longest=run.longest)
            else:
                topk_reranked(queries, scored, heads, policy.candidates, output, longest=run.longest)
        if not isinstance(rows, slice):
            call.output.ids.index_copy_(0, rows, output.ids)

    def _blocks(self, call: ExtendCall, policy: SelectionPolicy, windows: _Windows) -> Blocks:
        means = block_means(self.stats.means[call.layer], call.page_table, call.request_lens, policy.block_size)
        return Blocks(means, policy.block_size, windows.row_batch, windows.row_len)

    def decode(self, call: DecodeCall, policy: SelectionPolicy) -> None:
        self.behind = True
        out = torch.empty_like(call.ids) if call.positions else call.ids
        chosen = Chosen(out, call.ids if call.positions else None)
        queries = PagedRows(
            call.index_q, call.head_gates.contiguous(), call.index_k_pages, call.page_table, call.seq_lens
        )
        rows, width = len(call.ids), -(-self.runtime.row_len // PAGE)
        sketches = self.stats.sketch(call.layer)
        if policy.sketch is not None and sketches is not None:
            stats = PageSketch(self.stats.means[call.layer], sketches)
            scratch = _sketch_room(_rounded(rows), width, self.runtime.index_heads, policy, call.ids.device)
            sketch_topk(queries, stats, scratch=scratch.first(rows), out=chosen)
            return
        assert policy.blocks is not None
        room = _block_room(_rounded(rows), width, policy.blocks, policy.block_size, call.ids.device).first(rows)
        decode_topk(queries, self.stats.means[call.layer], scratch=room, out=chosen)

    def pages_written(self, layer: int, slots: Tensor) -> None:
        page_means.update_slots(self.index_k_pages[layer], self.stats.means[layer], slots, self.stats.sketch(layer))

    def compared(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.stats.means[layer], pages, self.stats.sketch(layer)
        return page_means.compare_pages(self.index_k_pages[layer], *stats)

    def end_step(self, page_table: Tensor, seq_lens: Tensor) -> None:
        self.behind = False
        page_means.update_last_page_means(self._layers, page_table, seq_lens)


@dataclass(frozen=True)
class _Windows:
    """What all layers of a step have of a run: an index of its rows, and of each the keys of the run that it sees.

    ks, ke, row_batch, row_len [T] int32, as in `Rows` and `Blocks`.
    """

    rows: slice | Tensor
    ks: Tensor
    ke: Tensor
    row_batch: Tensor
    row_len: Tensor


@functools.lru_cache(maxsize=8)
def _windows(run: Run, ks: Tensor, seq_lens: Tensor, row_batch: Tensor) -> _Windows:
    """Of a call's tensors, whose numbers follow from the run's spans: written to again, they are the same."""
    rows = run.rows(ks.device)
    first, row_len = ks[rows] - run.keys.start, seq_lens[rows]
    return _Windows(rows, first, first + row_len, row_batch[rows], row_len)


@functools.lru_cache(maxsize=8)  # all layers of a step ask for the same
def _kept(spans: tuple[Span, ...], device: torch.device) -> page_means.Kept:
    """The pages that the steps before the call have completed."""
    pages = [span.cached_pages for span in spans]
    new = max(span.length // PAGE - before for span, before in zip(spans, pages, strict=True))
    return page_means.Kept(torch.tensor(pages, dtype=torch.int32).to(device, non_blocking=True), new)


@functools.lru_cache(maxsize=4)
def _all_heads(rows: int, index_heads: int, device: torch.device) -> Tensor:
    """The ids of all heads for each row, int32 [rows, H]."""
    return torch.arange(index_heads, dtype=torch.int32, device=device).repeat(rows, 1)


# Scratch of a decode step, shared by all layers. Rows are rounded up, as eager decode has a new batch size at almost
# every step; the width is the widest. A shape is warmed up before it is captured, so no allocation is captured; none is
# freed, as graphs keep addresses.


def _rounded(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


@functools.cache
def _block_room(rows: int, width: int, blocks: int, block_size: int, device: torch.device) -> DecodeScratch:
    return DecodeScratch.allocate(rows, width, blocks, block_size, device)


@functools.cache
def _sketch_room(
    rows: int, width: int, index_heads: int, policy: SelectionPolicy, device: torch.device
) -> SketchScratch:
    assert policy.candidates is not None
    step = SketchPolicy(policy.heads, policy.router, policy.residual, policy.candidates)
    return SketchScratch.allocate(rows, width, index_heads, step, device)


def warm_up(runtime: Runtime) -> None:
    """Build and run every kernel of the policies on made-up requests: nothing compiles once users are served."""
    device = torch.device(runtime.device, torch.cuda.current_device())
    pages = -(-2 * runtime.topk // PAGE)
    index_k_pages = torch.zeros(pages, PAGE_BYTES, dtype=torch.uint8, device=device)
    engine = KernelEngine(runtime, [index_k_pages])
    table = torch.arange(pages, dtype=torch.int32, device=device).unsqueeze(0)
    for policy in _prefill_policies(runtime):
        # Few rows and many have launches of their own, and Triton builds apart for 1 and sizes that 16 does not divide.
        for number, rows in enumerate((64, 65, runtime.topk, runtime.topk - 1, 1)):
            engine.extend(*_made_up_extend(runtime, policy, table, rows, number % 2 == 0, device))
    for policy in (policy for policy in runtime.config.policies("decode") if policy.active):
        engine.pages_written(0, torch.arange(pages * PAGE, device=device))
        one = Span(0, 0, 1, 0, pages * PAGE)  # statistics of new pages alone have a program of their own
        engine.extended(0, (one,), table, torch.tensor([one.length], dtype=torch.int32, device=device))
        engine.compared(0, table[0])
        # Each with its own launch sizes, and none that stock selects.
        for rows in dict.fromkeys(max(rows, policy.min_rows) for rows in (1, 4, 32, 64)):
            lens = torch.full((rows,), pages * PAGE, dtype=torch.int32, device=device)
            call = DecodeCall(
                layer=0,
                index_q=torch.zeros(rows, runtime.index_heads, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
                head_gates=torch.ones(rows, runtime.index_heads, device=device),
                index_k_pages=index_k_pages,
                page_table=table.expand(rows, -1).contiguous(),
                seq_lens=lens,
                ids=torch.empty(rows, runtime.topk, dtype=torch.int32, device=device),
                positions=False,
            )
            engine.decode(call, policy)
            engine.end_step(call.page_table, lens)
    counted = slow_rows(device).zero_()  # what was made up is no row of a user's
    recorder.slow_rows = lambda: int(counted.item())
    torch.cuda.synchronize(device)


def _prefill_policies(runtime: Runtime) -> list[SelectionPolicy]:
    """What may select in prefill: policies, what comes after them on their ladders, and DSA for rows under a gate."""
    floor, model = runtime.config.audit.floor, {"index_heads": runtime.index_heads, "topk": runtime.topk}
    every = [rung for each in runtime.config.policies("prefill") for rung in ladder.rungs(each, floor, **model)]
    active = list(dict.fromkeys(policy for policy in every if policy.active))
    return [*active, EXACT] if active else []


def _made_up_extend(
    runtime: Runtime, policy: SelectionPolicy, table: Tensor, rows: int, even: bool, device: torch.device
) -> tuple[ExtendCall, list[tuple[SelectionPolicy, Run]]]:
    """A call of one request whose last `rows` tokens are new, and its only run."""
    seen = table.shape[1] * PAGE - (0 if even else 1)
    span = Span(0, 0, rows, 0, seen)
    row_batch = torch.zeros(rows, dtype=torch.int32, device=device)
    ids = torch.empty(rows, runtime.topk, dtype=torch.int32, device=device)
    call = ExtendCall(
        layer=0,
        spans=(span,),
        index_q=torch.zeros(rows, runtime.index_heads, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
        head_gates=torch.ones(rows, runtime.index_heads, device=device),
        index_k=torch.zeros(seen, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
        k_scale=torch.ones(seen, device=device),
        seq_lens=torch.arange(seen - rows + 1, seen + 1, dtype=torch.int32, device=device),
        ks=row_batch,
        row_batch=row_batch,
        page_table=table,
        request_lens=torch.tensor([seen], dtype=torch.int32, device=device),
        output=Output(ids, table, row_batch) if even else Output(ids),
    )
    return call, [(policy, Run.whole(call.spans))]
