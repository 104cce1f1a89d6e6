"""Rows of decode on hostile pages of index keys, for tests of the kernels that select from them."""

from __future__ import annotations

import torch
from oracles import FP32, STALE, Paged

from sglang_misa import reference_pages
from sglang_misa.bench.check import PRECISION as TENSOR_CORES
from sglang_misa.bench.inputs import pack_pages
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES

PRECISION = TENSOR_CORES if torch.cuda.is_available() else FP32


def make(
    lens: tuple[int, ...], *, heads: int = 32, width: int | None = None, seed: int = 0, device: str = "cpu"
) -> Paged:
    """Random rows. Whatever must not be read is hostile: pages that nobody owns are NaN, so are the means of incomplete
    pages and of a row's newest complete one, which this step or its drafts may have completed, and page-table entries
    past a row's end are huge or negative."""
    random = torch.Generator().manual_seed(seed)
    used = [-(-length // PAGE) for length in lens]
    width = width or max(*used, 1)
    num_pages = sum(used) + 5
    ids = torch.randperm(num_pages - 1, generator=random)[: sum(used)] + 1  # page 0 belongs to padded rows
    pool = torch.full((num_pages, PAGE_BYTES), 0x7F, dtype=torch.uint8)  # fp8 and fp32 NaN
    keys = torch.randn(len(ids) * PAGE, DIM, generator=random).to(torch.float8_e4m3fn)
    pool[ids] = pack_pages(keys, torch.rand(len(ids) * PAGE, generator=random) + 0.5)
    means = torch.full((num_pages, DIM), float("nan"), dtype=torch.bfloat16)
    table = torch.tensor(STALE, dtype=torch.int32).repeat(len(lens), width)[:, :width].clone()
    start = 0
    for row, (length, count) in enumerate(zip(lens, used, strict=True)):
        own = ids[start : start + count]
        table[row, :count] = own.int()
        full = own[: length // PAGE]
        index_k, k_scale = reference_pages.unpack_pages(pool[full])
        means[full] = (index_k.float() * k_scale[:, None]).view(-1, PAGE, DIM).mean(1).bfloat16()
        means[full[-1:]] = float("nan")
        start += count
    index_q = torch.randn(len(lens), heads, DIM, generator=random).to(torch.float8_e4m3fn)
    gates = torch.randn(len(lens), heads, generator=random)
    parts = (index_q, gates, pool, means, table, torch.tensor(lens, dtype=torch.int32))
    return Paged(*(part.to(device) for part in parts))
