"""What an audit says of the calls of a pool's layers, of captured steps among them."""

from dataclasses import replace

import pytest
import torch
from batches import TOPK, Batch, selector, sets
from recorders import fresh_recorder

from sglang_misa import audit, decode_gate
from sglang_misa.audit import Taps
from sglang_misa.config import Audit, SelectionPolicy
from sglang_misa.metrics import Recorder

PREFILL = SelectionPolicy(heads=4, block_size=64, min_len=120)
DECODE = SelectionPolicy(heads=4, blocks=3, block_size=64, min_len=0)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return fresh_recorder(monkeypatch, audit)


def test_the_audit_of_both_phases_is_the_recall_of_what_was_written(recorder: Recorder) -> None:
    batch = Batch(7, [500, 430], width=9)
    one = selector(batch, prefill=PREFILL, decode=DECODE, audit=Audit(rows=2, every=1))
    queries = batch.queries(2)
    calls = [batch.extend([1, 1], queries), batch.decode(queries)]
    one.extend(calls[0])
    one.decode(calls[1])
    dense = batch.extend([1, 1], queries)
    selector(batch, prefill=SelectionPolicy(exact=True, min_len=0)).extend(dense)
    for phase, ids in (("prefill", calls[0].output.ids), ("decode", calls[1].ids)):
        pairs = zip(sets(ids), sets(dense.output.ids), strict=True)
        expected = [len(mine & best) / TOPK for mine, best in pairs]
        assert recorder.status()["recall"][phase]["0"]["rows"] == 2
        assert recorder.status()["recall"][phase]["0"]["recall"] == pytest.approx(sum(expected) / 2)


def test_rows_that_see_no_more_than_k_are_not_audited_in_decode(recorder: Recorder) -> None:
    batch = Batch(7, [TOPK, 400], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=2, every=1))
    call = batch.decode(batch.queries(2))
    one.decode(replace(call))
    assert recorder.status()["recall"]["decode"]["0"]["rows"] == 1


def test_a_tap_audits_in_turn_what_a_captured_step_selected(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    batch = Batch(7, [500, 430, 400], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=2, every=3))
    call = batch.decode(batch.queries(3))
    with decode_gate.capturing(stock=False) as capture:
        one.decode(call)
    one.auditor.audit_decode(call)
    taken = recorder.status()["recall"]["decode"]["0"]
    call.ids.fill_(-1)  # the graph's own buffers serve other calls too; the tap has copies
    taps = Taps(capture.taps, every=3)
    for replay in range(30):
        if replay % 3 == 0:  # once in each three replays
            assert recorder.status()["recall"]["decode"]["0"] == pytest.approx(taken | {"rows": 2 + 2 * (replay // 3)})
        taps.replayed()


@pytest.mark.parametrize("stock", [False, True])
def test_taps_are_spread_over_the_layers_that_select(stock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share another's selection never call: with one in four selecting, no number but 0 has a factor 8."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    batch = Batch(7, [500], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=1, decode_layers=8, floor=0.5)).auditor
    call = batch.decode(batch.queries(1))
    with decode_gate.capturing(stock) as capture:
        for layer in (0, *range(1, 78, 4)):
            (one.look_past_decode if stock else one.look_at_decode)(replace(call, layer=layer))
    assert [tap.args[0].layer for tap in capture.taps] == [0, 29, 61]
