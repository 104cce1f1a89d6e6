"""Page statistics by themselves: what they cost, and rows that share a page. Their life: test_lifecycle.py."""

import torch
from pools import reference_engine

from sglang_misa import reference_pages
from sglang_misa.kernels.layout import PAGE, statistics_bytes
from sglang_misa.page_stats import PageStats


def test_a_layer_without_indexer_costs_nothing() -> None:
    stats = PageStats.allocate([torch.zeros(0, 8448, dtype=torch.uint8), torch.zeros(3, 8448, dtype=torch.uint8)])
    assert stats.nbytes == 3 * statistics_bytes(None) == 3 * 256
    pools = [torch.zeros(5, 8448, dtype=torch.uint8)]
    for bits in (1, 2):
        assert PageStats.allocate(pools, bits).nbytes == 5 * statistics_bytes(bits)
        assert statistics_bytes(bits) <= 40 * PAGE


def test_verify_rows_of_one_request_share_its_newest_page() -> None:
    """Rows of 63, 64 and 65 tokens: the second completes the page, the third must not undo it."""
    buffer = torch.zeros(3, 8448, dtype=torch.uint8)
    buffer[1:, :8192] = torch.randn(2, 8192).to(torch.float8_e4m3fn).view(torch.uint8)
    buffer[1:, 8192:] = torch.ones(2, 64).view(torch.uint8)
    engine = reference_engine([buffer])
    engine.end_step(torch.tensor([[1, 2]] * 3), torch.tensor([63, 64, 65], dtype=torch.int32))
    assert torch.equal(engine.stats.means[0][1], reference_pages.page_means(buffer[1:2])[0].bfloat16())


def test_a_padded_slot_is_of_no_page() -> None:
    """-1 is the last place of a page, as it divides, of the last page of the pool."""
    engine = reference_engine([torch.ones(4, 8448, dtype=torch.uint8)])
    engine.stats.means[0].fill_(7.0)
    engine.pages_written(0, torch.tensor([2 * PAGE - 1, 2 * PAGE, -1]))
    assert [bool((page == 7.0).all()) for page in engine.stats.means[0]] == [True, False, True, True]
