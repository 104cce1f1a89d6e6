"""The length gate by row, and decode rows read straight from pages."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa import indexer, reference
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.prefill import route, topk_routed
from sglang_misa.page_stats import PageStats


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=4), st.integers(0, 120))
def test_gate_splits_rows_by_their_own_length(requests: list[tuple[int, int]], min_len: int) -> None:
    extend, lens = [rows for rows, _ in requests], [rows + prefix for rows, prefix in requests]
    spans = indexer.spans(extend, lens)
    assert spans[-1].last_row == sum(extend)
    for span, (rows, prefix) in zip(spans, requests, strict=True):
        seen = [prefix + i + 1 for i in range(rows)]
        assert span.gate(min_len) - span.first_row == sum(length < min_len for length in seen)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5),
    st.integers(0, 120),
    st.booleans(),
)
def test_runs_are_the_rows_above_the_gate(requests: list[tuple[int, int]], min_len: int, together: bool) -> None:
    spans = indexer.spans([rows for rows, _ in requests], [rows + prefix for rows, prefix in requests])
    seen = [prefix + i + 1 for rows, prefix in requests for i in range(rows)]
    request = [i for i, (rows, _) in enumerate(requests) for _ in range(rows)]
    runs = indexer.runs(spans, min_len, together=together)
    assert [row for run in runs for row in range(run.first, run.last)] == [
        row for row, length in enumerate(seen) if length >= min_len
    ]
    for run in runs:
        rows = range(run.first, run.last)
        assert [span.request for span in run.spans] == sorted({request[row] for row in rows})
        assert run.longest == max(seen[row] for row in rows)
        assert run.keys.stop - run.keys.start == sum(span.length for span in run.spans)
    if together:
        assert all(before.last < after.first for before, after in itertools.pairwise(runs))
    else:
        assert all(len(run.spans) == 1 for run in runs)


def route_in_torch(index_q, head_gates, block_means, row_batch, row_len, heads, block_size, router):
    """What `route.route` promises, by the reference: the kernel needs a GPU."""
    statistics = reference.block_statistics(
        index_q[:, None], head_gates[:, None], block_means[row_batch].float(), (row_len // block_size)[:, None], router
    )
    return reference.top_heads(statistics.heads, heads)[:, 0].int()


def topk_in_torch(
    index_q, head_gates, head_ids, index_k, k_scale, ks, ke, k, *, longest, out, page_table, row_batch, offsets
):
    """What `topk_routed.topk_routed` promises."""
    assert offsets is None
    gates = torch.zeros_like(head_gates).scatter_(1, head_ids.long(), head_gates.gather(1, head_ids.long()))
    for row, (start, end) in enumerate(zip(ks.tolist(), ke.tolist(), strict=True)):
        assert 0 <= start < end <= len(index_k)
        assert end - start <= longest
        keys = index_k[start:end].float() * k_scale[start:end, None]
        scores = reference.index_scores(index_q[row, None, None], gates[row, None, None], keys[None]).flatten()
        best = scores.topk(min(k, end - start)).indices
        out[row] = -1
        out[row, : len(best)] = page_table[row_batch[row], best // PAGE] * PAGE + best % PAGE
    return out


def test_requests_of_one_run_select_what_each_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = SelectionPolicy(heads=4, block_size=64, min_len=120)
    monkeypatch.setattr(route, "route", route_in_torch)
    monkeypatch.setattr(topk_routed, "topk_routed", topk_in_torch)
    extend, lens, k = [20, 7, 30, 5], [90, 300, 200, 150], 64  # the first request stays under the gate
    _, _, buffer, table, _, stats = paged_case(3, lens, width=6)
    g = torch.Generator().manual_seed(4)
    rows = sum(extend)
    keys = [
        reference.dequantize_pages(buffer[table[i, : -(-n // PAGE)]]).reshape(-1, 128)[:n] for i, n in enumerate(lens)
    ]
    first_key = torch.tensor([0, *lens]).cumsum(0)[:-1]
    row_batch = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(extend)).int()
    call = indexer.RaggedCall(
        index_q=torch.randn(rows, 32, 128, generator=g).to(torch.float8_e4m3fn),
        head_gates=torch.randn(rows, 32, generator=g),
        index_k=torch.cat(keys),
        k_scale=torch.ones(sum(lens)),
        row_lens=torch.cat([torch.arange(n - t + 1, n + 1) for t, n in zip(extend, lens, strict=True)]).int(),
        ks=first_key[row_batch].int(),
        row_batch=row_batch,
        page_table=table.int(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
    )
    block_means = torch.zeros(len(lens), 6, 128, dtype=torch.bfloat16)
    for i, n in enumerate(lens):
        block_means[i, : n // PAGE] = reference.block_means(stats.of(0, table[i : i + 1, : n // PAGE]), 1)[0].bfloat16()
    out = torch.full((rows, k), -7, dtype=torch.int32)
    (run,) = indexer.runs(indexer.spans(extend, lens), policy.min_len, together=True)
    indexer.ragged_topk(policy, call, run, block_means, indexer.OutputSpace(pages=call.page_table), out)

    assert run.first == extend[0]
    assert (out[: run.first] == -7).all()
    alone = policy.model_copy(update={"min_len": 0})
    for row in range(run.first, run.last):
        i, n = int(row_batch[row]), int(call.row_lens[row])
        means = stats.of(0, table[i : i + 1, : n // PAGE])
        scores = reference.policy_scores(
            alone,
            call.index_q[row, None, None],
            call.head_gates[row, None, None],
            keys[i][None, :n],
            means,
            torch.tensor([[n]]),
        )
        best = scores.flatten().topk(k).indices
        assert set(out[row].tolist()) == set((table[i, best // PAGE] * PAGE + best % PAGE).tolist())


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
    stats = PageStats([buffer])
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
    moved = PageStats([buffer])
    moved.means[0][order] = stats.means[0]
    shuffled = torch.empty_like(buffer)
    shuffled[order] = buffer
    valid = table < len(buffer)
    table[valid] = order[table[valid]]
    after = indexer.paged_scores(POLICY, q, gates, shuffled, table, row_lens, moved, 0)
    assert torch.equal(before, after)
