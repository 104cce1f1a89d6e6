"""One indexer call of one layer: which rows stock DSA keeps (the gate), and the policy's selection of the rest.

Two engines: `*_scores` is the reference, whose scores SGLang's own top-k finishes; `*_topk` are the GPU kernels, which
select themselves. Nothing here knows SGLang: `patches/indexer.py` brings the tensors of a call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa import reference
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.decode import topk_blocks as decode_blocks
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, PAGE_BYTES
from sglang_misa.kernels.prefill import route, topk_blocks, topk_reranked, topk_routed
from sglang_misa.page_stats import PageStats

WIDTH_STEP = 256  # pages to which the width of decode scratch is rounded up
ROW_STRIDE = 4  # SGLang's top-k kernels want the row stride of fp32 logits to be a multiple of this


@dataclass(frozen=True)
class Span:
    """One request's rows in an extend call, in host numbers."""

    request: int
    first_row: int
    rows: int
    first_key: int  # column of its first key among the gathered keys of all requests
    length: int  # keys its last row sees

    @property
    def last_row(self) -> int:
        return self.first_row + self.rows

    def gate(self, min_len: int) -> int:
        """First row that sees at least `min_len` keys: the rows before it are stock DSA's."""
        seen_by_first = self.length - self.rows + 1
        return self.first_row + min(max(min_len - seen_by_first, 0), self.rows)


def spans(extend_lens: Sequence[int], seq_lens: Sequence[int]) -> list[Span]:
    """The spans of a batch: `extend_lens` rows and `seq_lens` keys a request, both in batch order."""
    result, row, key = [], 0, 0
    for request, (rows, length) in enumerate(zip(extend_lens, seq_lens, strict=True)):
        result.append(Span(request, row, rows, key, length))
        row, key = row + rows, key + length
    return result


@dataclass(frozen=True)
class Run:
    """Consecutive rows of an extend call that select by policy, in host numbers: of one request or of several."""

    spans: tuple[Span, ...]
    first: int
    last: int

    @property
    def keys(self) -> slice:
        """Columns of its requests' keys among the gathered ones."""
        return slice(self.spans[0].first_key, self.spans[-1].first_key + self.spans[-1].length)

    @property
    def longest(self) -> int:
        return max(span.length for span in self.spans)


def runs(spans: Sequence[Span], min_len: int, *, together: bool) -> list[Run]:
    """The rows that see at least `min_len` keys: in as few runs as can be, with `together`, or one a request."""
    result: list[Run] = []
    for span in spans:
        gate = span.gate(min_len)
        if gate == span.last_row:
            continue
        if together and result and result[-1].last == gate:
            result[-1] = Run((*result[-1].spans, span), result[-1].first, span.last_row)
        else:
            result.append(Run((span,), gate, span.last_row))
    return result


@dataclass(frozen=True)
class RaggedCall:
    """The tensors of one extend call, keys of all requests gathered one after another (S in all)."""

    index_q: Tensor  # [T, H, 128] fp8
    head_gates: Tensor  # [T, H] fp32
    index_k: Tensor  # [S, 128] fp8
    k_scale: Tensor  # [S] fp32
    row_lens: Tensor  # [T] int32, keys each row sees
    ks: Tensor  # [T] int32, the column of the first of them
    row_batch: Tensor  # [T] int32, the request of each row
    page_table: Tensor  # [requests, W] int32
    seq_lens: Tensor  # [requests] int32, keys the last row of each request sees

    def keys(self, span: Span) -> Tensor:
        """Dequantised keys fp32 [L, 128] of one request."""
        part = slice(span.first_key, span.first_key + span.length)
        return self.index_k[part].float() * self.k_scale[part].unsqueeze(-1)


def ragged_scores(
    policy: SelectionPolicy, call: RaggedCall, run: Run, stats: PageStats, layer: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores of a run of one request, in row chunks: (start, end, fp32 [end - start, L padded to 4])."""
    (span,) = run.spans
    keys = torch.nn.functional.pad(call.keys(span), (0, 0, 0, -span.length % ROW_STRIDE)).unsqueeze(0)
    means = stats.of(layer, call.page_table[span.request : span.request + 1, : span.length // PAGE])
    for start, end in reference.row_chunks(run.last - run.first, keys.shape[1]):
        rows = slice(run.first + start, run.first + end)
        scores = reference.policy_scores(
            policy,
            call.index_q[rows].unsqueeze(0),
            call.head_gates[rows].unsqueeze(0),
            keys,
            means,
            call.row_lens[rows].unsqueeze(0),
        )
        yield rows.start, rows.stop, scores.squeeze(0)


@dataclass(frozen=True)
class OutputSpace:
    """What is written for a chosen position: its physical slot, its place among the gathered keys, or itself."""

    pages: Tensor | None = None  # [requests, W] int32, the page table
    offsets: Tensor | None = None  # [T] int32, added to positions


def ragged_topk(
    policy: SelectionPolicy, call: RaggedCall, run: Run, block_means: Tensor, space: OutputSpace, out: Tensor
) -> None:
    """Select for the rows of a run with the GPU kernels, into their rows of `out` [T, k] int32.

    block_means bf16 [requests, M, 128] from `PageStats.heal`. MISA takes the top k of the routed heads' scores
    at once. MISA† re-scores the best C of them, HISA the tokens of the kept blocks, with all heads. `admission`
    says what has no kernel.
    """
    rows, keys = slice(run.first, run.last), run.keys
    index_q, gates = call.index_q[rows], call.head_gates[rows].contiguous()
    index_k, k_scale = call.index_k[keys], call.k_scale[keys]
    row_lens, row_batch, ks = call.row_lens[rows], call.row_batch[rows], call.ks[rows]
    if keys.start > 0:
        ks = ks - keys.start
    ke = ks + row_lens
    target = {
        "out": out[rows],
        "page_table": space.pages,
        "row_batch": None if space.pages is None else row_batch,
        "offsets": None if space.offsets is None else space.offsets[rows],
    }
    found, topk = (index_q, gates, block_means, row_batch, row_lens), out.shape[1]
    if policy.heads is None:
        assert policy.blocks is not None
        scores = route.block_scores(*found, policy.block_size)
        tensors = (index_q, gates, index_k, k_scale, scores, ks, ke)
        topk_blocks.topk_blocks(*tensors, policy.blocks, policy.block_size, topk, **target)
        return
    head_ids = route.route(*found, policy.heads, policy.block_size, policy.router)
    routed = (index_q, gates, head_ids, index_k, k_scale, ks, ke)
    if policy.candidates is None:
        topk_routed.topk_routed(*routed, topk, longest=run.longest, **target)
    else:
        topk_reranked.topk_reranked(*routed, policy.candidates, topk, **target)


def warm_up(policy: SelectionPolicy, index_heads: int, topk: int, device: str) -> None:
    """Build and run every prefill kernel of `policy` on a made-up request, so that no user waits for a compiler."""
    length = 2 * topk
    pages = -(-length // PAGE)
    buffer = torch.zeros(pages, PAGE_BYTES, dtype=torch.uint8, device=device)
    stats = PageStats([buffer], kernels=True)
    table = torch.arange(pages, dtype=torch.int32, device=device).unsqueeze(0)
    # Few rows and many have launches of their own, and Triton builds apart for sizes that 16 does not divide.
    shapes = itertools.product((64, 65, topk, topk - 1), (length, length - 1))
    for (rows, seen), space in zip(shapes, itertools.cycle((OutputSpace(), OutputSpace(pages=table)))):
        lens = torch.tensor([seen], dtype=torch.int32, device=device)
        only = torch.zeros(rows, dtype=torch.int32, device=device)  # every row is of the one request
        block_means = stats.heal(0, buffer, table, lens, policy.block_size)
        call = RaggedCall(
            index_q=torch.zeros(rows, index_heads, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
            head_gates=torch.ones(rows, index_heads, device=device),
            index_k=torch.zeros(seen, HEAD_DIM, device=device).to(torch.float8_e4m3fn),
            k_scale=torch.ones(seen, device=device),
            row_lens=torch.arange(seen - rows + 1, seen + 1, dtype=torch.int32, device=device),
            ks=only,
            row_batch=only,
            page_table=table,
            seq_lens=lens,
        )
        out = torch.empty(rows, topk, dtype=torch.int32, device=device)
        ragged_topk(policy, call, Run((Span(0, 0, rows, 0, seen),), 0, rows), block_means, space, out)
    torch.cuda.synchronize()


def _decode_scratch(
    rows: int, width: int, blocks: int, block_size: int, device: torch.device
) -> decode_blocks.DecodeScratch:
    """Scratch for `rows` rows of `width` pages, shared by all layers.

    Sizes are rounded up, for eager decode brings a new batch size or width at almost every step. SGLang warms a shape
    up before capturing it, so no scratch is captured; none is freed, for captured graphs keep its address.
    """
    room = _decode_room(1 << (rows - 1).bit_length(), -(-width // WIDTH_STEP) * WIDTH_STEP, blocks, block_size, device)
    return room.first(rows)


@functools.cache
def _decode_room(
    rows: int, width: int, blocks: int, block_size: int, device: torch.device
) -> decode_blocks.DecodeScratch:
    return decode_blocks.DecodeScratch.allocate(rows, width, blocks, block_size, device)


def paged_topk(
    policy: SelectionPolicy,
    index_q: Tensor,
    head_gates: Tensor,
    buffer: Tensor,
    page_table: Tensor,
    row_lens: Tensor,
    stats: PageStats,
    layer: int,
    topk: int,
    *,
    positions: bool = False,
) -> Tensor:
    """Select for R decode rows with the GPU kernels: physical slots int32 [R, topk], or `positions` in the row.

    Shapes as in `paged_scores`. Any policy that keeps blocks, scores with all heads and takes the top k at once. A row
    with at most `blocks` complete blocks equals DSA. The length gate is the step's (`decode_gate`), not a row's.
    """
    assert policy.blocks is not None
    rows, width = page_table.shape
    out = torch.empty(rows, topk, dtype=torch.int32, device=index_q.device)
    where = torch.empty_like(out) if positions else None
    decode_blocks.decode_topk(
        index_q,
        head_gates.contiguous(),
        buffer,
        stats.means[layer],
        page_table,
        row_lens,
        block_size=policy.block_size,
        scratch=_decode_scratch(rows, width, policy.blocks, policy.block_size, index_q.device),
        out=out,
        positions=where,
    )
    return out if where is None else where


def paged_scores(
    policy: SelectionPolicy,
    index_q: Tensor,
    head_gates: Tensor,
    buffer: Tensor,
    page_table: Tensor,
    row_lens: Tensor,
    stats: PageStats,
    layer: int,
) -> Tensor:
    """Scores fp32 [R, W * 64] of R decode rows, straight from the pages; capturable in a CUDA graph.

    index_q [R, H, 128] fp8, head_gates [R, H] fp32, buffer [num_pages, 8448] uint8, page_table [R, W] int32 (stale past
    ceil(len / 64)), row_lens [R] int32.
    """
    rows, width = page_table.shape
    scores = torch.empty(rows, width * PAGE, dtype=torch.float32, device=buffer.device)
    page = torch.arange(width, device=buffer.device)
    for row in range(rows):
        length = row_lens[row : row + 1]
        pages = page_table[row].long().masked_fill(page * PAGE >= length, 0)
        keys = reference.dequantize_pages(buffer[pages]).reshape(1, -1, HEAD_DIM)
        scores[row] = reference.policy_scores(
            policy,
            index_q[row].view(1, 1, *index_q.shape[1:]),
            head_gates[row].view(1, 1, -1),
            keys,
            stats.of(layer, pages.unsqueeze(0)),
            length.unsqueeze(0),
        ).flatten()
    return scores
