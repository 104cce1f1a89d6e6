"""What a prefill call is made of: query rows, keys, the heads that score them, and where the selection goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.kernels import structs
from sglang_misa.kernels.checks import expect
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

FP8 = (torch.float8_e4m3fn, torch.uint8)


@dataclass(frozen=True)
class Rows:
    """Query rows, and the window [ks, ke) of keys that each of them sees.

    index_q [T, H, 128] fp8 e4m3; head_gates [T, H] fp32; ks and ke [T] int32.
    """

    index_q: Tensor
    head_gates: Tensor
    ks: Tensor
    ke: Tensor

    def __len__(self) -> int:
        return int(self.index_q.shape[0])

    @property
    def index_heads(self) -> int:
        return int(self.index_q.shape[1])

    @property
    def device(self) -> torch.device:
        return self.index_q.device


@dataclass(frozen=True)
class Keys:
    """The keys of all requests, one request behind another: index_k [S, 128] fp8 e4m3, k_scale [S] fp32."""

    index_k: Tensor
    k_scale: Tensor

    def __len__(self) -> int:
        return int(self.index_k.shape[0])

    def seen(self, longest: int | None) -> int:
        """Keys that a row sees at most: all, unless `longest` says otherwise."""
        return len(self) if longest is None else min(longest, len(self))


@dataclass(frozen=True)
class Residual:
    """One query, without ReLU and without a gate, in the place of the heads that a row is not routed to.

    Its column is k_scale[l] · scale[t] · (query[t] · k[l]). query [T, 128] fp8 e4m3; scale [T] fp32, positive; as
    `route` makes them.
    """

    query: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Residual:
        """Room for the residuals of `rows` queries."""
        query = torch.empty(rows, HEAD_DIM, dtype=torch.uint8, device=device)
        return cls(query.view(torch.float8_e4m3fn), torch.empty(rows, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class RoutedHeads:
    """The heads that score a row, head_ids [T, h] int32 ascending, and the residual of the others, if it scores too."""

    head_ids: Tensor
    residual: Residual | None = None

    @property
    def columns(self) -> int:
        return int(self.head_ids.shape[1]) + (self.residual is not None)


@dataclass(frozen=True)
class Output:
    """Where the chosen tokens go, and what stands for one: its slot, its place among the gathered keys, or itself.

    ids [T, k] int32, -1 behind the last; page_table [requests, W] int32 with row_batch [T] int32: physical slots;
    offsets [T] int32: position + offset; neither: the position in the row.
    """

    ids: Tensor
    page_table: Tensor | None = None
    row_batch: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def empty(cls, rows: Rows, k: int, page_table: Tensor | None = None, row_batch: Tensor | None = None) -> Output:
        """Room for k tokens of each row."""
        return cls(torch.empty(len(rows), k, dtype=torch.int32, device=rows.device), page_table, row_batch)

    @property
    def topk(self) -> int:
        return int(self.ids.shape[1])

    def rows(self, rows: slice | Tensor) -> Output:
        """The same output for some rows: a view of a slice, and of an int64 index room of its own, not yet written."""
        if isinstance(rows, slice):
            ids = self.ids[rows]
        else:
            ids = torch.empty(len(rows), self.topk, dtype=torch.int32, device=rows.device)
        return Output(
            ids,
            self.page_table,
            None if self.row_batch is None else self.row_batch[rows],
            None if self.offsets is None else self.offsets[rows],
        )

    def of(self, positions: Tensor) -> Tensor:
        """What stands for positions [T, n] int64 of the rows; -1 stays."""
        result = positions
        if self.page_table is not None and self.row_batch is not None:
            table = self.page_table[self.row_batch.long()].long()
            page = (positions.clamp_min(0) // PAGE).clamp_max(table.shape[1] - 1)
            result = table.gather(1, page) * PAGE + positions % PAGE
        elif self.offsets is not None:
            result = positions + self.offsets.unsqueeze(1)
        return torch.where(positions >= 0, result, -1).int()

    def struct(self, rows: int, *, cuda: bool = True) -> structs.Output:
        """As the kernels have it. Raises ValueError unless it is one of `rows` rows, on a GPU if `cuda`."""
        expect("ids", self.ids, (rows, None), torch.int32, cuda=cuda)
        if (self.page_table is None) != (self.row_batch is None):
            raise ValueError(
                "page_table and row_batch: expected both or neither; pass the request of each row beside its table"
            )
        if self.page_table is not None and self.offsets is not None:
            raise ValueError("page_table and offsets: expected at most one, got both; choose PAGED or RAGGED output")
        if self.page_table is not None and self.row_batch is not None:
            expect("page_table", self.page_table, (None, None), torch.int32, row_stride=True, cuda=cuda)
            expect("row_batch", self.row_batch, (rows,), torch.int32, cuda=cuda)
        if self.offsets is not None:
            expect("offsets", self.offsets, (rows,), torch.int32, cuda=cuda)
        return structs.Output(
            out=self.ids,
            k=self.topk,
            page_table=self.page_table,
            row_batch=self.row_batch,
            page_pitch=0 if self.page_table is None else self.page_table.stride(0),
            offsets=self.offsets,
        )


def inputs(rows: Rows, keys: Keys, heads: RoutedHeads | None = None, *, cuda: bool = True) -> structs.Inputs:
    """As the kernels have them; without `heads` all score.

    Raises ValueError unless they fit together, on a GPU if `cuda`.
    """
    count, index_heads = len(rows), rows.index_heads
    expect("index_q", rows.index_q, (count, index_heads, HEAD_DIM), *FP8, cuda=cuda)
    expect("head_gates", rows.head_gates, (count, index_heads), torch.float32, cuda=cuda)
    expect("ks", rows.ks, (count,), torch.int32, cuda=cuda)
    expect("ke", rows.ke, (count,), torch.int32, cuda=cuda)
    expect("index_k", keys.index_k, (None, HEAD_DIM), *FP8, cuda=cuda)
    expect("k_scale", keys.k_scale, (len(keys),), torch.float32, cuda=cuda)
    residual = None if heads is None else heads.residual
    if heads is not None:
        expect("head_ids", heads.head_ids, (count, None), torch.int32, cuda=cuda)
    if residual is not None:
        expect("residual.query", residual.query, (count, HEAD_DIM), *FP8, cuda=cuda)
        expect("residual.scale", residual.scale, (count,), torch.float32, cuda=cuda)
    return structs.Inputs(
        index_q=rows.index_q,
        head_gates=rows.head_gates,
        head_ids=heads and heads.head_ids,
        index_k=keys.index_k,
        k_scale=keys.k_scale,
        ks=rows.ks,
        ke=rows.ke,
        residual=structs.ResidualColumn(query=residual and residual.query, scale=residual and residual.scale),
        rows=count,
        index_heads=index_heads,
        keys=len(keys),
    )
