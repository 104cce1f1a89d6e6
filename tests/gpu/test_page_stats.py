"""Page means and block means of a 128K prefix, in a pool with NaN in its free pages."""

from __future__ import annotations

import torch
from oracles import ints
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.kernels.layout import HEAD_DIM, PAGE
from sglang_misa.kernels.page_means import (
    Layers,
    compare_pages,
    update_last_page_means,
    update_page_means,
    update_slots,
)
from sglang_misa.kernels.prefill.block_means import block_means

DEVICE = "cuda"
LENGTH, BLOCK = 131072, 256
PAGES = LENGTH // PAGE


def test_the_whole_prefix_the_newest_pages_and_written_slots_give_the_same_bits(prefix: tuple[Tensor, Tensor]) -> None:
    pool, table = prefix
    means = torch.full((len(pool), HEAD_DIM), 7.0, dtype=torch.bfloat16, device=DEVICE)
    update_page_means(pool, means, table, ints([LENGTH], DEVICE))
    pooled = block_means(means, table, ints([LENGTH], DEVICE), BLOCK)
    index_k, k_scale = reference_pages.unpack_pages(pool[table[0].long()])
    expected = (index_k.float() * k_scale[:, None]).view(PAGES, PAGE, HEAD_DIM).mean(1)
    torch.testing.assert_close(means[table[0]].float(), expected, rtol=2**-8, atol=1e-6)
    free = torch.ones(len(pool), dtype=torch.bool, device=DEVICE)
    free[table[0].long()] = False
    assert (means[free] == 7.0).all(), "a free page was written"
    blocks = means[table[0]].float().view(1, -1, BLOCK // PAGE, HEAD_DIM).mean(2)
    torch.testing.assert_close(pooled.float(), blocks, rtol=2**-8, atol=1e-6)

    decoded, stored = torch.zeros_like(means), torch.zeros_like(means)
    rows = torch.arange(1, PAGES + 1, device=DEVICE)
    tables = table.expand(PAGES, -1).contiguous()
    update_last_page_means(Layers.of([pool], [decoded]), tables, ints(rows * PAGE, DEVICE))
    update_slots(pool, stored, (table[0].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten())
    for name, other in (("decode", decoded), ("slots", stored)):
        assert torch.equal(other[table[0]], means[table[0]]), f"{name}: other bits than the full pass"
    assert not compare_pages(pool, means, table[0])[1].any(), "computed anew: other bits than the full pass"
