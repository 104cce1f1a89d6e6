"""What an audit measures, and which calls and rows it looks at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pools import reference_engine, reference_runtime

from sglang_misa import audit
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy
from sglang_misa.ladder import Ladders

POLICY = SelectionPolicy(heads=4, block_size=64)


def auditor(**settings: float) -> audit.Auditor:
    config = MisaConfig(prefill=POLICY, audit=Audit(**settings))
    runtime = reference_runtime(config)
    ladders = Ladders(config, range(4), index_heads=runtime.index_heads, topk=runtime.topk, peers=None)
    return audit.Auditor(config.audit, runtime.topk, reference_engine([]), ladders)


def test_overlap_by_hand() -> None:
    dense = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    chosen = torch.tensor([True, False, True, False, False])
    recall, iou, mass = audit.overlap(dense, chosen, topk=2)
    assert (recall, iou) == (0.5, pytest.approx(1 / 3))
    assert mass == pytest.approx(6 / 7)
    assert audit.overlap(dense, torch.ones(5, dtype=torch.bool), topk=2048) == (1.0, 1.0, 1.0)


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-100, 100))
def test_mass_is_a_share_whatever_the_scores_signs(seed: int, topk: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(12, generator=g) + shift
    chosen = torch.zeros(12, dtype=torch.bool).scatter_(0, torch.randperm(12, generator=g)[:topk], True)
    recall, _, mass = audit.overlap(dense, chosen, topk)
    assert 0 <= mass <= 1
    assert (mass == 1) == (recall == 1)


def test_a_broken_score_is_never_wanted() -> None:
    dense = torch.tensor([torch.nan, -torch.inf, -1.0, -2.0])
    assert audit.overlap(dense, torch.tensor([False, False, True, True]), topk=2)[0] == 1.0


def test_one_call_in_every_is_audited_and_layers_take_turns() -> None:
    one = auditor(rows=2, every=4)
    due = {layer: [call for call in range(8) if one.due("prefill", layer)] for layer in range(4)}
    assert due == {0: [0, 4], 1: [3, 7], 2: [2, 6], 3: [1, 5]}
    assert not any(auditor().due("prefill", 0) for _ in range(9))


def test_rows_are_spread_and_hold_the_last() -> None:
    one = auditor(rows=4)
    assert one.rows(100, 200) == [124, 149, 174, 199]
    assert one.rows(7, 9) == [7, 8]
    assert one.rows(5, 5) == []
