"""Rows of decode on hostile pages of index keys, for tests of the kernels that select from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES

TOLERANCE = 1e-5  # of the largest score: fp32 sums in another order


@dataclass(frozen=True)
class Batch:
    index_q: Tensor
    head_gates: Tensor
    pool: Tensor
    page_means: Tensor
    page_table: Tensor
    seq_lens: Tensor

    def keys(self, row: int) -> Tensor:
        """The row's keys fp32 [len, 128], in logical order."""
        length = int(self.seq_lens[row])
        pages = self.pool[self.page_table[row, : -(-length // PAGE)].long()]
        keys = pages[:, : PAGE * DIM].contiguous().view(torch.float8_e4m3fn).float().view(-1, PAGE, DIM)
        scales = pages[:, PAGE * DIM :].contiguous().view(torch.float32)
        return (keys * scales.unsqueeze(-1)).flatten(0, 1)[:length]

    def means(self, row: int) -> Tensor:
        return self.page_means[self.page_table[row, : int(self.seq_lens[row]) // PAGE].long()].float()


def make(
    lens: tuple[int, ...], *, heads: int = 32, width: int | None = None, seed: int = 0, device: str = "cpu"
) -> Batch:
    """Random rows. Whatever must not be read is hostile: pages that nobody owns are NaN, so are the means of incomplete
    pages and of a row's newest complete one, which this step or its drafts may have completed, and page-table entries
    past a row's end are huge or negative."""
    random = torch.Generator().manual_seed(seed)
    used = [-(-length // PAGE) for length in lens]
    width = width or max(*used, 1)
    num_pages = sum(used) + 5
    ids = torch.randperm(num_pages - 1, generator=random)[: sum(used)] + 1  # page 0 belongs to padded rows
    pool = torch.full((num_pages, PAGE_BYTES), 0x7F, dtype=torch.uint8)  # fp8 and fp32 NaN
    pool[ids, : PAGE * DIM] = (
        torch.randn(len(ids), PAGE * DIM, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    scales = torch.rand(len(ids), PAGE, generator=random) + 0.5
    pool[ids, PAGE * DIM :] = scales.view(torch.uint8)
    means = torch.full((num_pages, DIM), float("nan"), dtype=torch.bfloat16)
    table = (
        torch.tensor([2**31 - 1, -(2**31), -1, 10**9], dtype=torch.int32).repeat(len(lens), width)[:, :width].clone()
    )
    start = 0
    for row, (length, count) in enumerate(zip(lens, used, strict=True)):
        own = ids[start : start + count]
        table[row, :count] = own.int()
        full = own[: length // PAGE]
        keys = pool[full, : PAGE * DIM].view(torch.float8_e4m3fn).float().view(-1, PAGE, DIM)
        means[full] = (keys * pool[full, PAGE * DIM :].view(torch.float32).unsqueeze(-1)).mean(1).bfloat16()
        means[full[-1:]] = float("nan")
        start += count
    index_q = torch.randn(len(lens), heads, DIM, generator=random).to(torch.float8_e4m3fn)
    gates = torch.randn(len(lens), heads, generator=random)
    parts = (index_q, gates, pool, means, table, torch.tensor(lens, dtype=torch.int32))
    return Batch(*(part.to(device) for part in parts))


def assert_best(chosen: Tensor, among: Tensor, ranked: Tensor, k: int) -> None:
    """`chosen` are the min(k, n) positions of `among` with the highest `ranked` scores, up to rounding at the edge."""
    assert len(chosen) == min(k, len(among)) == len(chosen.unique())
    mask = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    mask[among] = True
    assert mask[chosen].all()
    left = mask.clone()
    left[chosen] = False
    if len(chosen) and left.any():
        assert ranked[chosen].min() >= ranked[left].max() - TOLERANCE * ranked[mask].abs().max()
