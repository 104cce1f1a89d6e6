"""What an audit measures, and which calls and rows it looks at."""

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pools import reference_engine, reference_runtime

from sglang_misa import audit, reference
from sglang_misa.call import Output
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.ladder import Ladders

POLICY = SelectionPolicy(heads=4, block_size=64)


def auditor(**settings: float) -> audit.Auditor:
    config = MisaConfig(prefill=POLICY, audit=Audit(**settings))
    runtime = reference_runtime(config)
    ladders = Ladders(config, range(4), index_heads=runtime.index_heads, topk=runtime.topk, peers=None)
    return audit.Auditor(config.audit, runtime.topk, reference_engine([]), ladders)


def kept(dense: list[float], chosen: list[bool], topk: int) -> list[float]:
    row = torch.tensor(dense), torch.tensor([len(dense)]), torch.tensor(chosen)
    return audit.overlap(row[0][None], row[1], row[2][None], topk)[0].tolist()


def test_overlap_by_hand() -> None:
    dense = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert kept(dense, [True, False, True, False, False], 2) == pytest.approx([1 / 2, 1 / 3, 6 / 7])
    assert kept(dense, [True] * 5, 2048) == [1.0, 1.0, 1.0]


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-100, 100))
def test_mass_is_a_share_whatever_the_scores_signs(seed: int, topk: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(12, generator=g) + shift
    chosen = torch.zeros(12, dtype=torch.bool).scatter_(0, torch.randperm(12, generator=g)[:topk], True)
    recall, _, mass = kept(dense.tolist(), chosen.tolist(), topk)
    assert 0 <= mass <= 1
    assert (mass == 1) == (recall == 1)


def test_a_broken_score_is_never_wanted() -> None:
    assert kept([torch.nan, -torch.inf, -1.0, -2.0], [False, False, True, True], 2)[0] == 1.0


@given(st.integers(0, 10**6), st.sampled_from(["positions", "offsets", "slots"]), st.booleans())
def test_rows_together_keep_what_each_keeps_alone(seed: int, kind: str, parts: bool) -> None:
    """By sets and sums in Python; what a row does not see, and the tail of its page table, may hold anything."""
    g, k, width = torch.Generator().manual_seed(seed), 16, 3
    lens = torch.randint(1, width * PAGE + 1, (5,), generator=g).tolist()
    dense = torch.randn(len(lens), max(lens), generator=g)
    table = torch.randperm(len(lens) * width, generator=g).int().view(len(lens), width)
    positions = torch.full((len(lens), k), -1)
    for row, length in enumerate(lens):
        positions[row, : min(k, length)] = torch.randperm(length, generator=g)[:k]
        dense[row, length:] = torch.nan if row % 2 else torch.inf
    rows = torch.arange(len(lens), dtype=torch.int32)
    places = {"positions": {}, "offsets": {"offsets": 1000 * rows}, "slots": {"page_table": table, "row_batch": rows}}
    output = Output(torch.empty(len(lens), k, dtype=torch.int32), **places[kind])
    output.ids.copy_(output.of(positions))
    for row, length in enumerate(lens):
        table[row, -(-length // PAGE) :] = 2**31 - 1
    with mock.patch.object(reference, "_CHUNK_ELEMENTS", 1 if parts else reference._CHUNK_ELEMENTS):
        found = audit.kept(dense, torch.tensor(lens), output)
    for row, length in enumerate(lens):
        scores = dense[row, :length].double()
        best, mine = set(scores.topk(min(k, length)).indices.tolist()), {p for p in positions[row].tolist() if p >= 0}
        mass = [sum(float(scores[p] - scores.min()) for p in tokens) for tokens in (mine, best)]
        expected = [len(best & mine) / len(best), len(best & mine) / len(best | mine), 1.0]
        expected[2] = mass[0] / mass[1] if mass[1] else 1.0
        assert found[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_one_call_of_each_every_is_audited_and_layers_take_turns() -> None:
    one, every = auditor(rows=2, every=4), 4
    due = [[one.due("prefill", layer) for layer in range(every)] for _ in range(100 * every)]
    for first in range(0, len(due), every):
        assert all(sum(layer) == 1 for layer in zip(*due[first : first + every], strict=True)), "once"
        assert all(sum(call) == 1 for call in due[first : first + every]), "another layer at each call"
    assert [call[0] for call in due[:every]] == [True, False, False, False], "a server's first call is told of"
    assert not any(auditor().due("prefill", 0) for _ in range(9))


@pytest.mark.parametrize("period", [2, 16, 64, 48])
def test_no_period_of_the_calls_hides_some_of_them(period: int) -> None:
    """As the chunks of prompts that are all as long, and the tokens of a page."""
    one, every = auditor(rows=2, every=64), 64
    for layer in (0, 1, 17):
        seen = Counter(call % period for call in range(60 * period * every) if one.due("decode", layer))
        expected = seen.total() / period
        assert len(seen) == period
        assert all(abs(count - expected) < 6 * expected**0.5 for count in seen.values())


@given(st.integers(1, 9), st.integers(0, 300), st.integers(1, 300))
def test_every_row_of_a_call_is_audited_as_often_as_another(wanted: int, first: int, size: int) -> None:
    """Over all places at which they may begin."""
    one, count = auditor(rows=wanted), min(wanted, size)
    seen: Counter[int] = Counter()
    for start in range(size):
        with mock.patch.object(one, "numbers", mock.Mock(randrange=lambda n, start=start: range(n)[start])):
            rows = one.rows(first, first + size)
        assert len(rows) == count
        assert {after - row for row, after in itertools.pairwise(rows)} <= {size // count, -(-size // count)}
        seen.update(rows)
    assert seen == dict.fromkeys(range(first, first + size), count)


@pytest.mark.parametrize("wanted", [1, 4])
def test_rows_of_a_chunk_lie_anywhere_in_a_page(wanted: int) -> None:
    """And at an end of the chunk as often as elsewhere."""
    one = auditor(rows=wanted)
    rows = [row for _ in range(4000) for row in one.rows(8192, 16384)]
    for seen in (Counter(row % PAGE for row in rows), Counter((row - 8192) // 128 for row in rows)):
        expected = len(rows) / 64
        assert len(seen) == 64
        assert all(abs(count - expected) < 6 * expected**0.5 for count in seen.values())
