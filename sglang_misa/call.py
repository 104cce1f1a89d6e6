"""One indexer call of one layer in this package's terms: tensors, host numbers, and where the selection goes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.prefill.operands import Output

__all__ = ["DecodeCall", "ExtendCall", "Output", "Run", "Span", "spans"]


@dataclass(frozen=True)
class Span:
    """One request's rows in an extend call, in host numbers."""

    request: int
    first_row: int
    rows: int
    first_key: int  # column of its first key among the gathered keys of all requests
    length: int  # keys its last row sees
    left: int | None = None  # tokens of its prompt behind its last row, None if not known

    @property
    def ends(self) -> bool:
        """Whether its last row is the prompt's last."""
        return self.left == 0

    @property
    def last_row(self) -> int:
        return self.first_row + self.rows

    @property
    def cached_pages(self) -> int:
        """Pages that were complete before the call, without that of the token before it.

        A session that drafts may go on behind a token that no step has verified, whose page no step has completed.
        """
        return max(self.length - self.rows - 1, 0) // PAGE

    def gate(self, min_len: int) -> int:
        """First row that sees more than `min_len` keys."""
        seen_by_first = self.length - self.rows + 1
        return self.first_row + min(max(min_len - seen_by_first + 1, 0), self.rows)

    def parts(self, min_len: int, tail: int) -> tuple[range, range, range]:
        """Rows that see at most `min_len` keys, those that see more, and of these the prompt's last `tail`."""
        gate = self.gate(min_len)
        tails = 0 if self.left is None else max(tail - self.left, 0)
        end = max(gate, self.last_row - tails)
        return range(self.first_row, gate), range(gate, end), range(end, self.last_row)

    def seen_by(self, row: int) -> int:
        """Keys that row `row` of the call sees."""
        return self.length - (self.last_row - 1 - row)


def spans(extend_lens: Sequence[int], seq_lens: Sequence[int], prompt_lens: Sequence[int] = ()) -> tuple[Span, ...]:
    """The spans of a batch: `extend_lens` rows and `seq_lens` keys a request, both in batch order.

    prompt_lens: tokens of each request's whole prompt, as far as they are known.
    """
    result, row, key = [], 0, 0
    for request, (rows, length) in enumerate(zip(extend_lens, seq_lens, strict=True)):
        left = max(prompt_lens[request] - length, 0) if request < len(prompt_lens) else None
        result.append(Span(request, row, rows, key, length, left))
        row, key = row + rows, key + length
    return tuple(result)


@dataclass(frozen=True)
class Run:
    """Rows of an extend call that are selected alike, in host numbers: a range of each of some requests, in order."""

    spans: tuple[Span, ...]
    ranges: tuple[range, ...]

    @classmethod
    def of(cls, spans: Sequence[Span], ranges: Sequence[range]) -> Run:
        """Of the spans whose range is not empty."""
        some = [(span, rows) for span, rows in zip(spans, ranges, strict=True) if rows]
        return cls(tuple(span for span, _ in some), tuple(rows for _, rows in some))

    @classmethod
    def whole(cls, spans: Sequence[Span]) -> Run:
        """All rows of a call."""
        return cls.of(spans, [range(span.first_row, span.last_row) for span in spans])

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def rows(self, device: torch.device) -> slice | Tensor:
        """An index of its rows: a slice where they are consecutive, which copies nothing, else int64 on `device`."""
        first, last = self.ranges[0].start, self.ranges[-1].stop
        return slice(first, last) if last - first == len(self) else _index(self.ranges, device)

    @functools.cached_property
    def keys(self) -> slice:
        """Columns of its requests' keys among the gathered ones, and of those between them."""
        return slice(self.spans[0].first_key, self.spans[-1].first_key + self.spans[-1].length)

    def by_request(self) -> Iterator[tuple[Span, range]]:
        """Its rows, those of one request after another."""
        return zip(self.spans, self.ranges, strict=True)

    @functools.cached_property
    def longest(self) -> int:
        """Keys that a row sees, at most."""
        return max(span.seen_by(rows[-1]) for span, rows in self.by_request())


@functools.lru_cache(maxsize=8)  # all layers of a step ask for the same
def _index(ranges: tuple[range, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(rows.start, rows.stop, device=device) for rows in ranges])


@dataclass(frozen=True)
class ExtendCall:
    """The rows of an extend call, with the keys of all requests gathered one after another (S in all).

    index_q [T, H, 128] fp8; head_gates [T, H] fp32; index_k [S, 128] fp8; k_scale [S] fp32; seq_lens [T] int32: keys
    each row sees; ks [T] int32: the column of the first of them; row_batch [T] int32: its request; page_table
    [requests, W] int32; request_lens [requests] int32: keys the last row of each sees.
    """

    layer: int  # of the pool
    spans: tuple[Span, ...]
    index_q: Tensor
    head_gates: Tensor
    index_k: Tensor
    k_scale: Tensor
    seq_lens: Tensor
    ks: Tensor
    row_batch: Tensor
    page_table: Tensor
    request_lens: Tensor
    output: Output

    def keys(self, span: Span) -> tuple[Tensor, Tensor]:
        """Keys fp8 [L, 128] and scales fp32 [L] of one request."""
        part = slice(span.first_key, span.first_key + span.length)
        return self.index_k[part], self.k_scale[part]

    def alone(self, span: Span, row: int) -> ExtendCall:
        """The call of one row of `span` alone, which writes positions into an output of its own."""
        seen, rows, request = span.seen_by(row), slice(row, row + 1), slice(span.request, span.request + 1)
        keys = slice(span.first_key, span.first_key + seen)
        return ExtendCall(
            layer=self.layer,
            spans=(Span(0, 0, 1, 0, seen),),
            index_q=self.index_q[rows],
            head_gates=self.head_gates[rows],
            index_k=self.index_k[keys],
            k_scale=self.k_scale[keys],
            seq_lens=self.seq_lens[rows],
            ks=torch.zeros_like(self.ks[rows]),
            row_batch=torch.zeros_like(self.row_batch[rows]),
            page_table=self.page_table[request],
            request_lens=self.seq_lens[rows],
            output=Output(torch.empty_like(self.output.ids[rows])),
        )


@dataclass(frozen=True)
class DecodeCall:
    """R decode, verify or draft rows over their pages; the call may be captured in a CUDA graph.

    index_q [R, H, 128] fp8; head_gates [R, H] fp32; index_k_pages [num_pages, 8448] uint8; page_table [R, W] int32,
    stale past ceil(len / 64); seq_lens [R] int32; ids [R, k] int32: slots, or positions in the row.
    """

    layer: int  # of the pool
    index_q: Tensor
    head_gates: Tensor
    index_k_pages: Tensor
    page_table: Tensor
    seq_lens: Tensor
    ids: Tensor
    positions: bool  # write positions, not slots

    def queries_at(self, rows: Tensor) -> DecodeCall:
        """The queries and ids of `rows` int64 [n] alone, beside the page table and lengths of all."""
        return replace(
            self,
            index_q=self.index_q.view(torch.uint8)[rows].view(self.index_q.dtype),  # fp8 has no index kernel
            head_gates=self.head_gates[rows],
            ids=self.ids[rows],
        )

    def at(self, rows: Tensor) -> DecodeCall:
        """The call of `rows` int64 [n] alone, with what it wrote for them."""
        return self.queries_at(rows).steps_at(rows)

    def steps_at(self, rows: Tensor) -> DecodeCall:
        """The page table and lengths of `rows` int64 [n] alone, for a call that has their queries already."""
        return replace(self, page_table=self.page_table[rows], seq_lens=self.seq_lens[rows])

    @property
    def output(self) -> Output:
        if self.positions:
            return Output(self.ids)
        rows = torch.arange(len(self.ids), dtype=torch.int32, device=self.ids.device)
        return Output(self.ids, self.page_table, rows)
