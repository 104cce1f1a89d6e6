"""The scored columns of decode rows: the routed heads of each row, and the residual of its other heads (CUDA, sm_90).

One launch, a cluster of thread blocks a row. Queries leave as signed bytes, which is what the scan of sketches
multiplies. Bytes: at most 64 KiB of means a row, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.kernels.build import build, stream_of
from sglang_misa.kernels.checks import expect, expect_index_heads
from sglang_misa.kernels.decode.operands import PagedRows, SketchPolicy
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, ROUTED_PAGES, ROUTERS, SPREAD
from sglang_misa.kernels.structs import PageRoute

INT8_MAX = 127
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Columns:
    """What a row's keys are multiplied with; unwritten in rows that do not choose.

    queries: int8 [R, columns, 128]  the routed heads in ascending order, then the residual, each with 127 at its
             largest number
    gates:   fp32 [R, columns]  times what a unit of the column's query stands for
    """

    queries: Tensor
    gates: Tensor

    @classmethod
    def allocate(cls, rows: int, columns: int, device: torch.device) -> Columns:
        """Room for `rows` rows. Allocate outside of graph capture; one object must not serve two streams at once."""
        return cls(
            queries=torch.empty(rows, columns, HEAD_DIM, dtype=torch.int8, device=device),
            gates=torch.empty(rows, columns, dtype=torch.float32, device=device),
        )

    def first(self, rows: int) -> Columns:
        """The same memory for the first `rows` rows."""
        return Columns(self.queries[:rows], self.gates[:rows])


def route_pages(rows: PagedRows, page_means: Tensor, policy: SketchPolicy, *, out: Columns) -> None:
    """Fill `out` with the columns of every row of more tokens than the policy's candidates.

    `heads` None takes all of them. Fewer rank by |w| · mean ReLU(q·k̃) (`mean`), |w| · max ReLU(q·k̃) (`peak`),
    w · mean ReLU(q·k̃) (`signed`), |w| (`weight`) or |w| · σ'·√(φ'(1 − φ')) (`error`), over the means k̃ of the row's
    complete pages but the newest, of more than ROUTED_PAGES pages only every so many-th; ties fall to the lower head,
    NaN never wins.
    The residual is Σ w · φ · q of the heads that are not routed, φ = Φ(μ/σ), μ and σ of their products; for the error
    σ' = max(σ, SPREAD · |μ|) and φ' = Φ(μ/σ'). A head whose μ or σ is not finite has no error, and adds nothing, as
    one does whose w is not finite. NaN in a query counts as 0.
    A row's columns depend on the row alone, bit by bit.

    page_means: bf16 [P, 128], contiguous
    out:        of `heads` columns, and one more for a residual

    Raises ValueError for H other than those of `layout.INDEX_HEADS`, and for more columns than heads.
    """
    rows.check(page_means)
    count, index_heads = len(rows), rows.index_heads
    expect_index_heads(index_heads)
    heads = index_heads if policy.heads is None else policy.heads
    columns = heads + policy.residual
    if columns > index_heads:
        raise ValueError(f"heads: expected at most the model's {index_heads}, a residual counted, got {columns}")
    expect("out.queries", out.queries, (count, columns, HEAD_DIM), torch.int8, device=page_means.device)
    expect("out.gates", out.gates, (count, columns), torch.float32, device=page_means.device)
    if rows.interpreted:
        _route_on_cpu(rows, page_means, policy, out)
    elif count:
        call = PageRoute(
            index_q=rows.index_q,
            head_gates=rows.head_gates,
            means=page_means,
            pages=rows.page_table,
            lens=rows.seq_lens,
            queries=out.queries,
            gates=out.gates,
            pitch=rows.page_table.stride(0),
            heads=heads,
            router=ROUTERS.index(policy.router),
            residual=int(policy.residual),
            candidates=policy.candidates,
        )
        build("sketch_route", index_heads=index_heads).route(bytes(call), count, stream_of(rows.index_q.device))


def _route_on_cpu(rows: PagedRows, page_means: Tensor, policy: SketchPolicy, out: Columns) -> None:
    """The same in PyTorch: what the interpreted kernels behind it are tested with."""
    # The statistics are written here again: kernels import no reference, and tests hold the two to each other.
    for row, length in enumerate(rows.seq_lens.tolist()):
        if length <= policy.candidates:
            continue
        q, gates, ids = rows.index_q[row].float(), rows.head_gates[row], torch.arange(rows.index_heads)
        if policy.heads is not None:
            known = length // PAGE - 1
            pages = rows.page_table[row, : known : -(-known // ROUTED_PAGES)].long()
            products = q @ page_means[pages].float().T  # [H, pages]
            share, error = _linear_part(products)
            statistic = _statistic(products, gates, error, policy)
            ids = statistic.sort(descending=True, stable=True).indices[: policy.heads].sort().values
            if policy.residual:
                weights = gates * share
                weights = torch.where(weights.isfinite(), weights, 0.0).index_fill(0, ids, 0.0)
                out.queries[row, -1], out.gates[row, -1] = _to_int8(weights @ q.nan_to_num())
        numbers, units = _to_int8(q[ids])
        out.queries[row, : len(ids)], out.gates[row, : len(ids)] = numbers, gates[ids] * units


def _statistic(products: Tensor, gates: Tensor, error: Tensor, policy: SketchPolicy) -> Tensor:
    """What heads are ranked by, NaN below all numbers."""
    weight, active = gates.abs(), products.relu()
    statistic = {
        "mean": weight * active.mean(1),
        "peak": weight * active.amax(1),
        "signed": gates * active.mean(1),
        "weight": weight,
        "error": weight * error if products.shape[1] > 1 else weight,
    }[policy.router]
    return statistic.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=LOWEST)


def _linear_part(products: Tensor) -> tuple[Tensor, Tensor]:
    """φ = Φ(μ/σ) and the error of each head, 0 where μ or σ is not finite."""
    variance, mean = torch.var_mean(products, 1, correction=0)
    deviation = variance.sqrt()
    share = torch.where(deviation > 0, _tail(-mean / deviation), (mean.sign() + 1) / 2)
    spread = torch.maximum(deviation, mean.abs() * SPREAD)
    tail = _tail((mean / spread).abs())
    error = torch.where(spread > 0, spread * (tail * (1 - tail)).sqrt(), 0.0)
    finite = mean.isfinite() & variance.isfinite()
    return torch.where(finite, share, 0.0), torch.where(finite, error, 0.0)


def _tail(z: Tensor) -> Tensor:
    """1 − Φ(z), which `torch.special.ndtr` does not have far out."""
    return torch.special.erfc(z * 0.5**0.5) / 2


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [..., 128] in whole units, 127 of which are the largest, and units; NaN counts as 0."""
    x = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    most = x.abs().amax(-1)
    usable = most.isfinite() & (most > 0)
    per_unit = torch.where(usable, torch.full_like(most, INT8_MAX) / most, 0.0)  # a scalar would be times a reciprocal
    numbers = (torch.where(usable.unsqueeze(-1), x, 0.0) * per_unit.unsqueeze(-1)).round()
    return numbers.to(torch.int8), torch.where(usable, most * (1 / INT8_MAX), 0.0)
