"""The length gate by row, and what is selected in one call and in several."""

from dataclasses import replace

import pytest
import torch
from batches import TOPK, Batch, selector, sets
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import reference_runtime

from sglang_misa import decode_gate, reference, reference_pages, selection
from sglang_misa.call import Run, spans
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy
from sglang_misa.engines import kernels
from sglang_misa.engines.reference import ReferenceEngine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.prefill.operands import RoutedHeads
from sglang_misa.ladder import WINDOW
from sglang_misa.policy import EXACT, STOCK
from sglang_misa.selection import Selector

requests_ = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=5)


@given(requests_, st.integers(0, 120))
def test_the_gate_splits_rows_by_their_own_length(requests: list[tuple[int, int]], min_len: int) -> None:
    extend, lens = [rows for rows, _ in requests], [rows + prefix for rows, prefix in requests]
    batch = spans(extend, lens)
    assert batch[-1].last_row == sum(extend)
    for span, (rows, prefix) in zip(batch, requests, strict=True):
        seen = [prefix + i + 1 for i in range(rows)]
        assert [span.seen_by(row) for row in range(span.first_row, span.last_row)] == seen
        assert span.gate(min_len) - span.first_row == sum(length <= min_len for length in seen)


@given(requests_, st.integers(0, 120), st.integers(0, 60), st.lists(st.integers(0, 70), max_size=5))
def test_every_row_is_in_one_run_of_the_policy_or_of_dsa(
    requests: list[tuple[int, int]], min_len: int, tail: int, left: list[int]
) -> None:
    policy = SelectionPolicy(heads=4, min_len=min_len, tail=tail)
    lens = [rows + prefix for rows, prefix in requests]
    prompts = [length + more for length, more in zip(lens, left, strict=False)]  # of the last ones, none is known
    batch = spans([rows for rows, _ in requests], lens, prompts)
    seen = [prefix + i + 1 for rows, prefix in requests for i in range(rows)]
    is_end = [
        n < len(prompts) and prefix + i >= prompts[n] - tail
        for n, (rows, prefix) in enumerate(requests)
        for i in range(rows)
    ]
    request = [i for i, (rows, _) in enumerate(requests) for _ in range(rows)]
    call, device = torch.arange(len(seen)), torch.device("cpu")
    runs = [(by, run, call[run.rows(device)].tolist()) for by, run in selection.runs(policy, batch)]
    assert sorted(row for _, _, rows in runs for row in rows) == call.tolist()
    for by, run, rows in runs:
        assert all((seen[row] > min_len and not is_end[row]) == (by is policy) for row in rows)
        assert len({seen[row] > min_len for row in rows}) == 1, "short rows beside long ones"
        assert rows == sorted(rows) == [row for _, one in run.by_request() for row in one]
        assert [span.request for span in run.spans] == sorted({request[row] for row in rows})
        assert run.longest == max(seen[row] for row in rows)
        first, last = run.spans[0], run.spans[-1]
        assert (run.keys.start, run.keys.stop) == (first.first_key, last.first_key + last.length)


@pytest.mark.parametrize(
    ("extend_lens", "seq_lens", "reason"),
    [
        ([300], [300], None),
        ([1], [300], "few-rows"),
        ([5, 7], [300, 300], None),  # six on average
        ([5, 6], [300, 300], "few-rows"),
        ([5, 100], [300, 128], "few-rows"),  # the rows under the gate do not count
        ([100, 1], [128, 128], "under-min-len"),
    ],
)
def test_stock_takes_calls_that_are_short_or_have_few_rows_a_request(extend_lens, seq_lens, reason, monkeypatch):
    one = selector(Batch(1, [300], 5), prefill=SelectionPolicy(heads=2, min_len=128))
    assert one.why_stock(0, spans([1], [300])) is None, "the reference has no scan to share"
    monkeypatch.setattr(one.engine, "least_rows", 6)
    assert one.why_stock(0, spans(extend_lens, seq_lens)) == reason


@pytest.mark.parametrize("decode", [SelectionPolicy(), SelectionPolicy(blocks=4, block_size=64)])
def test_a_call_computes_the_statistics_that_nothing_has_kept(decode: SelectionPolicy) -> None:
    """Nor that of the token before the call, which may have been written over."""
    rows, kept, batch = [70, 30, 70], [230 // PAGE, 170 // PAGE, 3], Batch(2, [300, 200, 4 * PAGE + 70], width=6)
    one = selector(batch, prefill=SelectionPolicy(heads=2, block_size=64, min_len=128), decode=decode)
    means = one.engine.stats.means[0].fill_(7)
    one.extend(batch.extend(rows, batch.queries(sum(rows))))
    pages = [batch.table[row, : length // PAGE].long() for row, length in enumerate(batch.lens)]
    old = torch.cat([own[:count] for own, count in zip(pages, kept, strict=True)])
    new = torch.cat([own[count:] for own, count in zip(pages, kept, strict=True)])
    right = reference_pages.page_means(batch.index_k_pages).bfloat16()
    assert torch.equal(means[new], right[new])
    assert (means[old] == 7).all() if decode.active else torch.equal(means[old], right[old])


@pytest.mark.parametrize(
    ("rows", "lens", "prompts", "reason"),
    [
        ([300], [300], [300], None),  # 172 rows see more than 128 keys, and 10 of them end the prompt
        ([10], [300], [300], "few-rows"),
        ([10], [300], [301], None),  # one is no end
        ([10], [300], [], None),
        ([10, 11], [300, 300], [300, 300], "few-rows"),  # half a row a request
        ([10, 12], [300, 300], [300, 300], None),
    ],
)
def test_a_call_of_prompts_ends_alone_is_left_to_stock(rows, lens, prompts, reason):
    one = selector(Batch(1, [300], 5), prefill=SelectionPolicy(heads=2, min_len=128, tail=10))
    assert one.why_stock(0, spans(rows, lens, prompts)) == reason


@pytest.mark.parametrize("lens", [[300, 100], [100, 90]])
def test_what_a_sunk_layer_would_select_is_seen_where_rows_pass_its_gate(lens, monkeypatch):
    rows, batch = [40, 50], Batch(3, lens, width=5)
    audit = Audit(rows=4, every=1, floor=0.9)
    one = selector(batch, prefill=SelectionPolicy(heads=2, block_size=64, min_len=128), audit=audit)
    for _ in range(2):  # over faithful to DSA
        one.ladders.observe("prefill", 0, [0.0] * WINDOW, probed=False)
        one.ladders.meet()
    call, made = batch.extend(rows, batch.queries(sum(rows))), []
    monkeypatch.setattr(one.ladders, "observe", lambda *_, probed: made.append(probed))
    one.left_to_stock(0, call.spans, lambda: call)
    assert made == ([True] if max(lens) > 128 else [])


def test_the_end_of_a_prompt_is_selected_as_stock_does() -> None:
    rows, batch = [40, 30], Batch(3, [200, 150], width=6)
    queries = batch.queries(sum(rows))

    def selected(**policy: object) -> list[set[int]]:
        call = batch.extend(rows, queries)
        prompts = [batch.lens[0], 10**6]  # the second goes on in a later call
        call = replace(call, spans=spans(rows, batch.lens, prompts))
        selector(batch, prefill=SelectionPolicy(heads=1, block_size=64, **policy)).extend(call)
        return sets(call.output.ids)

    ended, whole, dsa = selected(min_len=120, tail=7), selected(min_len=120), selected(min_len=10**6)
    assert ended == [*whole[:33], *dsa[33:40], *whole[40:]]
    assert whole[33:40] != dsa[33:40]


POLICIES = [
    SelectionPolicy(heads=4, block_size=64, min_len=120),
    SelectionPolicy(heads=7, router="peak", residual=True, block_size=64, candidates=100, min_len=120),
    SelectionPolicy(blocks=3, block_size=64, min_len=120),
    SelectionPolicy(exact=True, min_len=120),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_row_selects_the_same_alone_in_chunks_and_beside_others(policy: SelectionPolicy) -> None:
    rows, batch = [20, 7, 30, 5], Batch(3, [90, 300, 200, 150], width=6)
    queries = batch.queries(sum(rows))
    whole = batch.extend(rows, queries)
    selector(batch, prefill=policy).extend(whole)
    first = 0
    for request, count in enumerate(rows):
        for chunk in (slice(first, first + count // 2), slice(first + count // 2, first + count)):
            alone = Batch.__new__(Batch)
            alone.index_k_pages, alone.table = batch.index_k_pages, batch.table[request : request + 1]
            alone.lens = [batch.lens[request] - (first + count - chunk.stop)]
            part = alone.extend([chunk.stop - chunk.start], (queries[0][chunk], queries[1][chunk]))
            selector(batch, prefill=policy).extend(part)
            assert sets(part.output.ids) == sets(whole.output.ids[chunk])
        first += count


def test_rows_under_the_gate_take_dsa_and_short_rows_take_all() -> None:
    rows, batch = [20, 64, 150], Batch(5, [110, 64, 300], width=6)
    call = batch.extend(rows, batch.queries(sum(rows)), "positions")
    selector(batch, prefill=SelectionPolicy(heads=1, block_size=64, min_len=200)).extend(call)
    for row, length in enumerate(call.seq_lens.tolist()):
        chosen = sets(call.output.ids)[row]
        request = int(call.row_batch[row])
        if length <= TOPK:
            assert chosen == set(range(length))
        elif length <= 200:
            scores = reference.index_scores(
                call.index_q[row, None, None], call.head_gates[row, None, None], batch.keys(request)[None, :length]
            )
            assert chosen == set(scores.flatten().topk(TOPK).indices.tolist())


def test_outputs_say_the_same_tokens() -> None:
    rows, batch = [3, 40], Batch(1, [200, 260], width=5)
    queries = batch.queries(sum(rows))
    calls = {name: batch.extend(rows, queries, name) for name in ("positions", "offsets", "slots")}
    for call in calls.values():
        selector(batch, prefill=POLICIES[0]).extend(call)
    positions = calls["positions"].output.ids.long()
    for name in ("offsets", "slots"):
        output = calls[name].output
        assert sets(output.of(positions)) == sets(output.ids)


def route_in_torch(index_q, head_gates, blocks, heads, router, residual):
    """What `route` promises, by the reference: the kernel needs a GPU."""
    assert not residual
    complete = (blocks.row_len // blocks.block_size)[:, None]
    pooled = blocks.block_means[blocks.row_batch].float()
    statistics = reference.block_statistics(
        index_q[:, None], head_gates[:, None], pooled, complete, reference.RouterView(router)
    )
    return RoutedHeads(reference.top_heads(statistics.heads, heads)[:, 0].int())


def reranked_in_torch(rows, keys, heads, candidates, output, *, longest):
    """What `topk_reranked` promises, and without candidates `topk_routed`."""
    assert output.offsets is heads.residual is None
    assert (rows.ks.diff() >= 0).all(), "a row before those of an earlier request"
    ids = heads.head_ids.long()
    gates = torch.zeros_like(rows.head_gates).scatter_(1, ids, rows.head_gates.gather(1, ids))
    for row, (start, end) in enumerate(zip(rows.ks.tolist(), rows.ke.tolist(), strict=True)):
        assert 0 <= start < end <= len(keys)
        assert end - start <= longest
        seen = keys.index_k[start:end].float() * keys.k_scale[start:end, None]

        def scores(gates, seen=seen, row=row):
            return reference.index_scores(rows.index_q[row, None, None], gates[row, None, None], seen[None]).flatten()

        best = scores(gates).sort(descending=True, stable=True).indices[: candidates or output.topk].sort().values
        if candidates is not None:
            best = best[scores(rows.head_gates)[best].sort(descending=True, stable=True).indices[: output.topk]]
        output.ids[row] = -1
        pages = output.page_table[output.row_batch[row], best // PAGE]
        output.ids[row, : len(best)] = pages * PAGE + best % PAGE


def page_means_in_torch(index_k_pages, means, page_table, seq_lens, sketches, kept):
    """What `update_page_means` promises of pages none of which are kept."""
    assert kept is None
    means.copy_(reference_pages.page_means(index_k_pages).bfloat16())


def block_means_in_torch(means, page_table, seq_lens, block_size):
    """What `block_means` promises."""
    table = page_table.long().clamp(0, len(means) - 1)
    return reference.block_means(means[table], block_size // PAGE).bfloat16()


@pytest.mark.parametrize("tail", [0, 4], ids=["rows in order", "rows of several tails"])
@pytest.mark.parametrize("candidates", [None, 100])
def test_the_kernel_engine_hands_each_run_its_rows_keys_and_output(
    candidates, tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(kernels, "route", route_in_torch)

    def top(rows, keys, heads, candidates, output, longest):
        calls.append(len(rows))
        reranked_in_torch(rows, keys, heads, candidates, output, longest=longest)

    monkeypatch.setattr(kernels, "topk_routed", lambda r, k, h, o, *, longest: top(r, k, h, None, o, longest))
    monkeypatch.setattr(kernels, "topk_reranked", lambda r, k, h, c, o, *, longest: top(r, k, h, c, o, longest))
    monkeypatch.setattr(kernels.page_means, "update_page_means", page_means_in_torch)
    monkeypatch.setattr(kernels, "block_means", block_means_in_torch)
    rows, batch = [20, 7, 30, 5], Batch(3, [90, 300, 200, 150], width=6)  # the first request stays under the gate
    queries = batch.queries(sum(rows))
    ours, wanted = batch.extend(rows, queries), batch.extend(rows, queries)
    policy = POLICIES[0].model_copy(update={"candidates": candidates, "tail": tail})
    runtime = reference_runtime(MisaConfig(prefill=policy), TOPK)
    chosen = selection.runs(policy, spans(rows, batch.lens, batch.lens))
    assert [by for by, _ in chosen] == [EXACT, policy, EXACT][: 2 + (tail > 0)]
    kernels.KernelEngine(runtime, [batch.index_k_pages]).extend(ours, chosen)
    ReferenceEngine(runtime, [batch.index_k_pages]).extend(wanted, chosen)
    assert calls == [len(run) for _, run in chosen], "requests of a run share a call"
    pairs = list(zip(sets(ours.output.ids), sets(wanted.output.ids), strict=True))
    assert all(len(mine) == len(theirs) for mine, theirs in pairs)
    assert all(len(mine & theirs) >= len(mine) - 1 for mine, theirs in pairs), "more than a tie in rounding apart"


@pytest.mark.parametrize(("by", "keeps", "wanted"), [(EXACT, False, 0), (EXACT, True, 1), (POLICIES[0], False, 1)])
def test_statistics_that_nothing_reads_are_not_computed(by, keeps, wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []
    monkeypatch.setattr(kernels.page_means, "update_page_means", lambda *call: computed.append(call))
    monkeypatch.setattr(kernels.KernelEngine, "_select", lambda *_: None)
    batch = Batch(1, [300], width=5)
    call = batch.extend([200], batch.queries(200))
    engine = kernels.KernelEngine(reference_runtime(MisaConfig(), TOPK), [batch.index_k_pages], keeps=keeps)
    engine.extend(call, [(by, Run.whole(call.spans))])
    assert len(computed) == wanted


@pytest.mark.parametrize(("prefill", "wanted"), [(POLICIES[0], {True, False}), (STOCK, {True})])
def test_a_warm_up_computes_statistics_of_all_pages_and_of_new_ones(
    prefill: SelectionPolicy, wanted: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton builds them apart, and users of a server are never to wait for a compiler."""
    computed: set[bool] = set()

    def update(index_k_pages, means, page_table, seq_lens, sketches, kept):
        if kept is None or kept.new > 0:  # else nothing is launched
            computed.add(kept is not None)

    monkeypatch.setattr(kernels.page_means, "update_page_means", update)
    for name in ("_select", "decode", "pages_written", "compared", "end_step"):
        monkeypatch.setattr(kernels.KernelEngine, name, lambda *_: None)
    monkeypatch.setattr(kernels, "slow_rows", lambda device: torch.ones(1, dtype=torch.int32))
    monkeypatch.setattr(kernels.recorder, "slow_rows", kernels.recorder.slow_rows)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    kernels.warm_up(reference_runtime(MisaConfig(prefill=prefill, decode=DECODE), TOPK))
    assert computed == wanted


DECODE = SelectionPolicy(heads=4, blocks=3, block_size=64, min_len=0)
SKETCHED = SelectionPolicy(heads=7, router="peak", residual=True, sketch=2, candidates=128, block_size=64, min_len=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(1, 600), min_size=1, max_size=3), st.booleans())
def test_decode_rows_select_what_extend_rows_of_the_same_length_select(
    seed: int, lens: list[int], positions: bool
) -> None:
    batch = Batch(seed, lens, width=10)
    queries = batch.queries(len(lens))
    decode = batch.decode(queries, positions=positions)
    extend = batch.extend([1] * len(lens), queries, "positions" if positions else "slots")
    one = selector(batch, prefill=DECODE, decode=DECODE)
    one.extend(extend)
    one.decode(decode)
    assert sets(decode.ids) == sets(extend.output.ids)


@pytest.mark.parametrize(
    ("rows", "row_len", "reason"),
    [(1, 1000, "few-rows"), (2, 400, None), (2, 399, "few-tokens"), (64, 100, "under-min-len")],
)
def test_only_steps_that_some_length_brings_over_the_gate_have_a_choice(rows, row_len, reason) -> None:
    policy = SKETCHED.model_copy(update={"min_len": 100, "min_rows": 2, "min_tokens": 600})
    runtime = replace(reference_runtime(MisaConfig(decode=policy), TOPK), row_len=row_len)
    one = Selector(runtime, [Batch(1, [300], 5).index_k_pages])
    with decode_gate.capturing(stock=False) as capture:
        assert one.why_stock_decodes(0, rows, None) == reason
    assert capture.asked == (reason is None)


def test_candidates_of_a_sketch_that_cover_the_row_are_dsa() -> None:
    batch = Batch(11, [500, 63, 64, 65, 640], width=12)
    queries = batch.queries(5)
    sketched, exact = batch.decode(queries, positions=True), batch.extend([1] * 5, queries, "positions")
    all_of_them = SKETCHED.model_copy(update={"candidates": 640})
    selector(batch, decode=all_of_them).decode(sketched)
    selector(batch, prefill=SelectionPolicy(exact=True, min_len=0)).extend(exact)
    assert sets(sketched.ids) == sets(exact.output.ids)


def test_the_tail_of_a_sketched_row_is_always_among_its_candidates() -> None:
    """Keys of the page that is not complete score highest with all heads, whatever a sketch would have said of them."""
    batch = Batch(12, [64 * 8 + 30], width=10)
    for page in (7, 8):  # the newest complete one, whose statistics the step may still owe, and the one behind it
        batch.index_k_pages[batch.table[0, page], PAGE * 128 :] = torch.full((PAGE,), 1e4).view(torch.uint8)
    queries = batch.queries(1)
    call = batch.decode((queries[0], queries[1].abs()), positions=True)
    selector(batch, decode=SKETCHED).decode(call)
    assert sets(call.ids)[0] <= set(range(448, 542)), "the loudest tokens, all of them without a sketch"


@pytest.mark.parametrize("decode", [DECODE, SKETCHED], ids=lambda policy: policy.name)
def test_permuting_physical_pages_changes_nothing(decode: SelectionPolicy) -> None:
    batch = Batch(3, [300, 65, 512], width=9)
    queries = batch.queries(3)
    before = batch.decode(queries, positions=True)
    one = selector(batch, decode=decode)
    one.engine._update(0, torch.arange(len(batch.index_k_pages)))
    one.decode(before)
    order = torch.randperm(len(batch.index_k_pages))
    shuffled, table = torch.empty_like(batch.index_k_pages), batch.table.clone()
    shuffled[order] = batch.index_k_pages
    valid = table < len(order)
    table[valid] = order[table[valid].long()].int()
    batch.index_k_pages, batch.table = shuffled, table
    other = selector(batch, decode=decode)
    other.engine._update(0, torch.arange(len(shuffled)))
    after = batch.decode(queries, positions=True)
    other.decode(after)
    assert torch.equal(before.ids, after.ids)
