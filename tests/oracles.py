"""What tests of kernels compare with: rows of keys in plain PyTorch, on any device.

Two oracles. `Scores` (of bench.check) bound what a right kernel may find where scores round. `exact_scores` are numbers
that no order of summation rounds, for inputs of small integers and short fractions: whole sets are compared, ties too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.bench.check import PRECISION, Scores, flaw, row_scores
from sglang_misa.bench.inputs import FP8, Inputs
from sglang_misa.kernels.decode.keep_blocks import KeptPages
from sglang_misa.kernels.decode.operands import PagedRows
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.kernels.prefill.operands import Keys, Residual, RoutedHeads, Rows

OUTSIDE, IS_NAN, LOWEST = -1e302, -1e301, -1e300  # ranks of what is no number, in fp64
FP32 = 2.0**-20  # `precision` of kernels that multiply in fp32: of Triton's interpreter


STALE = (2**31 - 1, -(2**31), -1, 10**9)  # page-table entries past a row's end: never to be followed


def ints(values: object, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device).contiguous()


def assert_best(chosen: Tensor, among: Tensor, scores: Scores | Tensor, k: int, what: str = "") -> None:
    """Positions `chosen` [n] are the min(k, m) best of positions `among` [m]; plain scores [L] are taken as fp32's."""
    if isinstance(scores, Tensor):
        largest = scores[among].abs().max() if len(among) else scores.new_zeros(())
        scores = Scores.around(scores, (16 * FP32 * largest).expand_as(scores))
    mask = torch.zeros(len(scores.low), dtype=torch.bool, device=chosen.device)
    mask[among] = True
    problem = flaw(chosen, mask, mask, scores, k)
    assert problem is None, f"{what}: {problem}"


def assert_filled(out: Tensor, counts: Tensor) -> None:
    """Rows of `out` [T, k] hold `counts` [T] different ids from 0 on, then -1."""
    valid = torch.arange(out.shape[1], device=out.device) < counts[:, None]
    assert ((out >= 0) == valid).all(), "a hole, or another number of ids than expected"
    assert (out[~valid] == -1).all(), "something else than -1 behind the last id"
    ordered = out.sort(1).values
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(), "an id twice"


@dataclass(frozen=True)
class Extend:
    """The rows of an extend call; keys of all requests lie one behind another, and row t sees [ks[t], ke[t])."""

    index_q: Tensor  # [T, H, 128] fp8
    head_gates: Tensor  # [T, H] fp32
    head_ids: Tensor  # [T, h] int32, the routed heads
    index_k: Tensor  # [S, 128] fp8
    k_scale: Tensor  # [S] fp32
    ks: Tensor  # [T] int32
    ke: Tensor  # [T] int32
    residual: Residual | None = None  # one more column: query [T, 128] fp8, scale [T] fp32

    @property
    def rows(self) -> int:
        return len(self.ks)

    @property
    def keys(self) -> int:
        return len(self.k_scale)

    @property
    def lens(self) -> Tensor:
        return (self.ke.clamp(max=self.keys) - self.ks.clamp(min=0)).clamp(min=0)

    @property
    def operands(self) -> tuple[Rows, Keys, RoutedHeads]:
        """All of them, as the kernels take them."""
        rows = Rows(self.index_q, self.head_gates, self.ks, self.ke)
        return rows, Keys(self.index_k, self.k_scale), RoutedHeads(self.head_ids, self.residual)

    def inside(self, rows: slice) -> Tensor:
        """Mask bool [rows, S] of the keys that each row sees."""
        column = torch.arange(self.keys, device=self.ks.device)
        return (column >= self.ks[rows, None]) & (column < self.ke[rows, None])

    def scores(self, rows: slice, *, routed: bool, precision: float = PRECISION) -> Scores:
        """Bounds [rows, S] of the scores by the routed heads or by all; -inf outside the windows."""
        q, gates, k = self.index_q[rows].float(), self.head_gates[rows], self.index_k.float()
        if routed:
            ids = self.head_ids[rows].long()
            q, gates = q.gather(1, ids[..., None].expand(-1, -1, q.shape[-1])), gates.gather(1, ids)
        value = q.new_zeros(len(q), self.keys)
        slack = torch.zeros_like(value)
        size = k.norm(dim=1)
        for j in range(gates.shape[1]):
            dots = q[:, j] @ k.T
            margin = precision * q[:, j].norm(dim=1, keepdim=True) * size
            value += gates[:, j, None] * dots.relu()
            slack += gates[:, j, None].abs() * margin * (dots > -margin)
        if routed and self.residual is not None:
            query, scale = self.residual.query[rows].float(), self.residual.scale[rows, None]
            value += scale * (query @ k.T)
            slack += scale * precision * query.norm(dim=1, keepdim=True) * size
        found = Scores.around(value * self.k_scale, slack * self.k_scale.abs())
        inside = self.inside(rows)
        return Scores(*(bound.masked_fill(~inside, -torch.inf) for bound in (found.low, found.high)))

    def exact_scores(self, row: int, *, routed: bool) -> Tensor:
        """Ranks fp64 [S] of one row by the routed heads or by all: OUTSIDE < IS_NAN < LOWEST (-inf) < numbers."""
        ids = self.head_ids[row].long() if routed else slice(None)
        dots = torch.relu(self.index_q[row].float()[ids] @ self.index_k.float().T)
        score = (self.head_gates[row][ids, None] * dots).sum(0)
        if routed and self.residual is not None:
            score = score + self.residual.scale[row] * (self.index_k.float() @ self.residual.query[row].float())
        score = score * self.k_scale
        ranks = (score.double() + 0.0).nan_to_num(nan=IS_NAN, neginf=LOWEST, posinf=-LOWEST)
        return ranks.masked_fill(~self.inside(slice(row, row + 1))[0], OUTSIDE)


def stable_best(ranks: Tensor, count: int) -> Tensor:
    """Ascending ids of the `count` best of `ranks` [S], or of all there are: ties to the smaller."""
    order = ranks.sort(descending=True, stable=True).indices[: min(count, int((ranks > OUTSIDE).sum()))]
    return order.sort().values


def causal(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """(ks, ke) of the last `rows` rows of one request of `keys` keys."""
    ends = torch.arange(keys - rows + 1, keys + 1).clamp(min=min(1, keys))
    return torch.zeros_like(ends), ends


def requests(sizes: Sequence[tuple[int, int]], padding: int = 0) -> tuple[tuple[Tensor, Tensor], int, int]:
    """((ks, ke), rows, keys) of several requests: (new rows, keys after them) each, keys one behind another.

    The last `padding` rows lie beyond the real tokens: they see nothing.
    """
    ks, ke, at = [], [], 0
    for rows, keys in sizes:
        ks += [at] * rows
        ke += [at + keys - rows + 1 + t for t in range(rows)]
        at += keys
    for t in range(len(ks) - padding, len(ks)):
        ks[t] = ke[t] = 0
    return (torch.tensor(ks), torch.tensor(ke)), len(ks), at


def extend(
    inputs: Inputs,
    routed: int,
    *,
    residual: bool = False,
    windows: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Extend:
    """The rows of `inputs`, routed to random heads; windows of one request unless given.

    residual: a query of -1, 0 and 1 with a scale of ½ or 1, so that exact scores stay exact.
    """
    rows, heads = inputs.head_gates.shape
    device = str(inputs.head_gates.device)
    g = torch.Generator(device).manual_seed(seed)
    ids = torch.rand(rows, heads, device=device, generator=g).argsort(1)[:, :routed].sort(1).values
    ks, ke = windows or causal(rows, len(inputs.k_scale))
    query = torch.randint(3, (rows, HEAD_DIM), device=device, generator=g) - 1.0
    scale = 0.5 + 0.5 * torch.randint(2, (rows,), device=device, generator=g)
    return Extend(
        inputs.index_q,
        inputs.head_gates.contiguous(),
        ints(ids, device),
        inputs.index_k,
        inputs.k_scale.contiguous(),
        ints(ks, device),
        ints(ke, device),
        Residual(query.to(FP8), scale) if residual else None,
    )


def integers(rows: int, keys: int, heads: int = 64, *, scales: int = 64, seed: int = 0, device: str = "cuda") -> Inputs:
    """Keys and queries of -1, 0, 1, gates of ±1 and 2, `scales` different scales in [1, 2): their scores are exact."""
    g = torch.Generator(device).manual_seed(seed)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=device, generator=g)

    gates = torch.tensor([1.0, 2.0, 1.0, -1.0], device=device)[below(4, rows, heads)]
    codes = (below(3, rows, heads, 128) - 1.0).to(FP8), (below(3, keys, 128) - 1.0).to(FP8)
    return Inputs(codes[0], gates, codes[1], 1 + below(scales, keys) / 64.0)


def hostile_integers(name: str, *, residual: bool = False, device: str = "cuda") -> Extend:
    """70 rows of 6000 keys whose scores are exact, changed to be hostile: see HOSTILE_INTEGERS."""
    rows, keys = 70, 180_000 if name == "one buffer" else 6000
    routed = 8 - residual
    x = extend(integers(rows, keys, seed=5, device=device), routed, residual=residual, seed=5)
    scale = x.k_scale.clone()
    gates = x.head_gates.clone()
    ones = torch.ones(x.index_k.shape, device=device).to(FP8)
    if name == "many ties":
        return extend(integers(rows, keys, scales=1, seed=6, device=device), routed, residual=residual, seed=6)
    if name == "all equal":
        return replace(x, index_k=ones, k_scale=torch.full_like(scale, 0.5))
    if name == "all zero":
        nothing = torch.zeros(rows, HEAD_DIM, device=device).to(FP8)
        zeros = None if x.residual is None else Residual(nothing, x.residual.scale)
        return replace(x, index_q=torch.zeros(x.index_q.shape, device=device).to(FP8), residual=zeros)
    if name in ("ascending", "descending"):
        ramp = torch.arange(1, keys + 1, device=device) / 1024.0
        return replace(x, index_k=ones, k_scale=ramp if name == "ascending" else ramp.flip(0).contiguous())
    if name == "outliers":
        scale[[20, 4321]] = 2.0**40
    if name == "mostly zero":
        scale[torch.randperm(keys, generator=torch.Generator().manual_seed(0))[: keys - 500].to(device)] = 0
    if name.startswith("defeats the sample"):
        scale[4::8] *= 64.0 if "high" in name else 2.0**-6
    if name == "one buffer":  # every hit in one private buffer
        scale[0::64] *= 1024.0
    if name in GATES:
        gates[::3] = GATES[name]
        gates[1::3, ::2] = GATES[name]
    if name == "NaN in one gate":
        gates.scatter_(1, (x.head_ids[:, :1].long() + 1) % 64, torch.nan)
    if name == "negative gates":
        gates = -gates.abs()
    if name in ("NaN keys", "NaN and -inf keys"):
        scale[::2] = torch.nan
    if name == "NaN and -inf keys":
        scale[1::2] = -torch.inf
    if name == "negative scales":
        scale[::2] *= -1
    if name == "denormal scales":
        scale *= 2.0**-140
    return replace(x, k_scale=scale, head_gates=gates)


GATES = {"NaN gates": torch.nan, "inf gates": torch.inf, "-inf gates": -torch.inf}
HOSTILE_INTEGERS = (
    *("many ties", "all equal", "all zero", "ascending", "descending", "outliers", "mostly zero"),
    *("defeats the sample (high)", "defeats the sample (low)", "one buffer", *GATES, "NaN in one gate"),
    *("negative gates", "NaN keys", "NaN and -inf keys", "negative scales", "denormal scales"),
)


@dataclass(frozen=True)
class Paged:
    """The rows of a decode call on index-K pages."""

    index_q: Tensor  # [R, H, 128] fp8
    head_gates: Tensor  # [R, H] fp32
    index_k_pages: Tensor  # [num_pages, 8448] uint8
    page_means: Tensor  # [num_pages, 128] bf16
    page_table: Tensor  # [R, W] int32, stale past a row's end
    seq_lens: Tensor  # [R] int32

    @property
    def rows(self) -> int:
        return len(self.seq_lens)

    @property
    def operands(self) -> PagedRows:
        """Its rows as the kernels take them."""
        return PagedRows(self.index_q, self.head_gates, self.index_k_pages, self.page_table, self.seq_lens)

    def pages(self, row: int) -> Tensor:
        """Ids int64 of the pages that a row's tokens lie in."""
        return self.page_table[row, : -(-int(self.seq_lens[row]) // PAGE)].long()

    def keys(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's keys fp8 [len, 128] and scales fp32 [len], in logical order."""
        index_k, k_scale = reference_pages.unpack_pages(self.index_k_pages[self.pages(row)])
        return index_k[: int(self.seq_lens[row])], k_scale[: int(self.seq_lens[row])]

    def scores(self, row: int, precision: float = PRECISION) -> Scores:
        """Bounds [len] of a row's scores by all heads."""
        return row_scores(self.index_q[row], self.head_gates[row], *self.keys(row), precision=precision)

    def block_scores(self, row: int, block_size: int, precision: float = PRECISION) -> Scores:
        """Bounds of the scores of a row's complete blocks, by the means of their pages."""
        complete = int(self.seq_lens[row]) // block_size
        means = self.page_means[self.pages(row)[: complete * block_size // PAGE]].float()
        pooled = means.view(complete, -1, HEAD_DIM).mean(1).bfloat16()
        ones = torch.ones(complete, device=means.device)
        return row_scores(self.index_q[row], self.head_gates[row], pooled, ones, precision=precision)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        """Physical slots of positions [n] of a row."""
        return self.page_table[row, positions // PAGE].long() * PAGE + positions % PAGE


def assert_block_filter(
    batch: Paged,
    row: int,
    kept: KeptPages,
    slots: Tensor,
    positions: Tensor,
    *,
    blocks: int,
    block_size: int,
    precision: float = PRECISION,
) -> None:
    """HISA's decode of one row: kept blocks are the best by page means, tokens the best of those, slots their places.

    slots and positions [k] int32 of the row.
    """
    length, k = int(batch.seq_lens[row]), len(positions)
    what, count = f"row {row} of {length} tokens", min(length, k)
    taken = positions[:count].long()
    assert (positions[count:] == -1).all(), f"{what}: padding of the positions"
    assert (slots[count:] == -1).all(), f"{what}: padding of the slots"
    if length == 0:
        return
    assert (taken >= 0).all(), f"{what}: a hole"
    assert (taken.diff() > 0).all(), f"{what}: not in the order of the row"
    assert torch.equal(batch.slots(row, taken), slots[:count].long()), f"{what}: slots name other pages"
    complete, tail = divmod(length, block_size)
    listed = kept.blocks[row, : min(complete, blocks) + (tail > 0)].long()
    assert int(kept.lens[row]) == min(complete, blocks) * block_size + tail, f"{what}: kept length"
    if complete > blocks:
        full = listed[listed < complete]
        assert full[0] == 0, f"{what}: the first block is not kept"
        assert full[-1] == complete - 1, f"{what}: the newest complete block is not kept"
        middle = torch.arange(1, complete - 1, device=taken.device)
        scores = batch.block_scores(row, block_size, precision)
        assert_best(full[1:-1], middle, scores, blocks - 2, f"{what}: blocks")
    else:
        assert torch.equal(listed, torch.arange(len(listed), device=taken.device)), f"{what}: all blocks"
    position = torch.arange(length, device=taken.device)
    visible = position[torch.isin(position // block_size, listed)]
    assert_best(taken, visible, batch.scores(row, precision), k, f"{what}: tokens")
