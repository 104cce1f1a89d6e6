"""The length gate by row, and decode rows read straight from pages."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa import indexer, reference
from sglang_misa.block_stats import BlockStats
from sglang_misa.config import PAGE, SelectionPolicy


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=4), st.integers(0, 120))
def test_gate_splits_rows_by_their_own_length(requests: list[tuple[int, int]], min_len: int) -> None:
    extend, lens = [rows for rows, _ in requests], [rows + prefix for rows, prefix in requests]
    spans = indexer.spans(extend, lens)
    assert spans[-1].last_row == sum(extend)
    for span, (rows, prefix) in zip(spans, requests, strict=True):
        seen = [prefix + i + 1 for i in range(rows)]
        assert span.gate(min_len) - span.first_row == sum(length < min_len for length in seen)


def paged_case(seed: int, lens: list[int], width: int):
    """A pool of random pages, a page table with stale garbage past each row's end, and page means."""
    g = torch.Generator().manual_seed(seed)
    used = sum(-(-n // PAGE) for n in lens)
    keys = torch.randn(used + 1, PAGE, 128, generator=g).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    scales = (torch.rand(used + 1, PAGE, generator=g) + 0.1).view(torch.uint8)
    buffer = torch.cat([keys, scales], dim=1)
    order, table, start = torch.randperm(used, generator=g) + 1, torch.full((len(lens), width), 1 << 30), 0
    for row, length in enumerate(lens):
        pages = -(-length // PAGE)
        table[row, :pages] = order[start : start + pages]
        start += pages
    stats = BlockStats([buffer])
    stats.update_pages(0, buffer, torch.arange(used + 1))
    q = torch.randn(len(lens), 32, 128, generator=g).to(torch.float8_e4m3fn)
    gates = torch.randn(len(lens), 32, generator=g)
    return q, gates, buffer, table, torch.tensor(lens, dtype=torch.int32), stats


POLICY = SelectionPolicy(heads=4, blocks=3, block_size=64)


@given(st.integers(0, 1000), st.lists(st.integers(0, 600), min_size=1, max_size=3))
def test_decode_rows_select_what_extend_rows_of_the_same_length_select(seed: int, lens: list[int]) -> None:
    q, gates, buffer, table, row_lens, stats = paged_case(seed, lens, width=10)
    scores = indexer.paged_scores(POLICY, q, gates, buffer, table, row_lens, stats, 0)
    for row, length in enumerate(lens):
        pages = table[row, : -(-length // PAGE)]
        keys = reference.dequantize_pages(buffer[pages]).reshape(1, -1, 128)
        alone = reference.policy_scores(
            POLICY,
            q[row, None, None],
            gates[row, None, None],
            keys,
            stats.of(0, pages[None]),
            row_lens[row, None, None],
        )
        torch.testing.assert_close(scores[row, : keys.shape[1]], alone[0, 0])
        assert torch.isinf(scores[row, keys.shape[1] :]).all()


def test_permuting_physical_pages_changes_nothing() -> None:
    q, gates, buffer, table, row_lens, stats = paged_case(3, [300, 65, 512], width=9)
    before = indexer.paged_scores(POLICY, q, gates, buffer, table, row_lens, stats, 0)
    order = torch.randperm(len(buffer))
    moved = BlockStats([buffer])
    moved.means[0][order] = stats.means[0]
    shuffled = torch.empty_like(buffer)
    shuffled[order] = buffer
    valid = table < len(buffer)
    table[valid] = order[table[valid]]
    after = indexer.paged_scores(POLICY, q, gates, shuffled, table, row_lens, moved, 0)
    assert torch.equal(before, after)
