"""What an audit says of the calls of a pool's layers, of captured steps among them, and which rows it looks at."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batches import TOPK, Batch, selector, sets
from pools import reference_runtime
from recorders import fresh_recorder

from sglang_misa import audit, decode_gate
from sglang_misa.audit import Taps
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy
from sglang_misa.decode_gate import Capture
from sglang_misa.metrics import Recorder
from sglang_misa.policy_file import ModelIdentity
from sglang_misa.selection import Selector

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


@pytest.mark.parametrize(("layers", "audited"), [(1, {"prefill", "decode"}), (2, set())])
def test_a_draft_models_pool_is_not_audited_as_the_targets_layers(
    layers: int, audited: set[str], recorder: Recorder
) -> None:
    """A pool with fewer layers than the model is a draft's, and its layer 0 another than the target's."""
    target = ModelIdentity(architecture="X", layers=layers, index_heads=32, index_topk=TOPK, config_sha256="0" * 64)
    config = MisaConfig(prefill=PREFILL, decode=DECODE, audit=Audit(rows=2, every=1))
    batch = Batch(7, [500, 430], width=9)
    one = Selector(replace(reference_runtime(config, TOPK), model=target), [batch.index_k_pages])
    one.extend(batch.extend([1, 1], batch.queries(2)))
    one.decode(batch.decode(batch.queries(2)))
    assert {phase for phase, seen in recorder.status()["recall"].items() if seen} == audited


def test_rows_that_see_no_more_than_k_are_not_audited_in_decode(recorder: Recorder) -> None:
    batch = Batch(7, [TOPK, 400], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=2, every=1))
    call = batch.decode(batch.queries(2))
    one.decode(replace(call))
    assert recorder.status()["recall"]["decode"]["0"]["rows"] == 1


@pytest.mark.parametrize("longer", [0, 40])
def test_rows_that_see_no_more_than_k_are_not_audited_in_prefill(longer: int, recorder: Recorder) -> None:
    """They keep all by definition: the floor would stand on them. Of a call of no others nothing is told."""
    batch = Batch(7, [TOPK + longer], width=9)
    one = selector(batch, prefill=PREFILL.model_copy(update={"min_len": 0}), audit=Audit(rows=TOPK, every=1))
    one.extend(batch.extend([TOPK + longer], batch.queries(TOPK + longer)))
    assert recorder.status()["recall"]["prefill"].get("0", {"rows": 0})["rows"] == longer


def captured(monkeypatch: pytest.MonkeyPatch, forward: Callable[[], None], *, stock: bool = False) -> Capture:
    """A capture of a step as SGLang makes one: behind a warm-up."""
    with decode_gate.capturing(stock) as capture:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        forward()
        assert not capture.taps
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        forward()
    return capture


def test_a_tap_audits_in_turn_what_a_captured_step_selected(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(7, [500, 430, 400], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=2, every=3))
    call = batch.decode(batch.queries(3))
    capture = captured(monkeypatch, lambda: one.decode(call))
    one.auditor.audit_decode(call.at(torch.tensor([0, 1])))
    taken = recorder.status()["recall"]["decode"]["0"]
    call.ids.fill_(-1)  # the graph's own buffers serve other calls too; the tap has copies
    taps = Taps(capture.taps, every=3)
    monkeypatch.setattr(one.auditor, "decode_rows", lambda _: torch.tensor([0, 1]))  # as nothing copies others here
    for replay in range(30):
        if replay % 3 == 0:  # once in each three replays
            assert recorder.status()["recall"]["decode"]["0"] == pytest.approx(taken | {"rows": 2 + 2 * (replay // 3)})
        taps.replayed()


def test_the_replays_of_a_graph_copy_other_rows_after_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the capture itself would be made anew by each replay, so their numbers lie in that of a warm-up."""
    batch = Batch(7, [500, 70, 430, 20, 400], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=2, every=1))
    call = batch.decode(batch.queries(5))
    capture = captured(monkeypatch, lambda: one.decode(call))
    (tap,), seen = capture.taps, []
    rows = capture.rows[5]
    for _ in range(40):
        tap()
        assert capture.rows[5] is rows
        seen.append(tuple(sorted(rows.tolist())))
    assert set(seen) == {(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)}, "pairs of those that see more than k tokens"


@pytest.mark.parametrize("stock", [False, True])
def test_taps_are_spread_over_the_layers_that_select(stock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share another's selection never call: with one in four selecting, no number but 0 has a factor 8."""
    batch = Batch(7, [500], width=9)
    one = selector(batch, decode=DECODE, audit=Audit(rows=1, decode_layers=8, floor=0.5)).auditor
    call, looked = batch.decode(batch.queries(1)), []
    monkeypatch.setattr(one, "probe_decode" if stock else "audit_decode", lambda part: looked.append(part.layer))

    def forward() -> None:
        for layer in (0, *range(1, 78, 4)):
            (one.look_past_decode if stock else one.look_at_decode)(replace(call, layer=layer))

    for tap in captured(monkeypatch, forward, stock=stock).taps:
        tap()
    assert looked == [0, 29, 61]


def test_every_request_of_a_step_is_audited_as_often_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that see no more than k tokens only where there are too few others: they have nothing to choose."""
    one = selector(Batch(7, [500], width=9), decode=DECODE, audit=Audit(rows=4, every=1)).auditor
    lens = torch.tensor([TOPK, 300, 400] * 8)
    seen = Counter(row for _ in range(1000) for row in one.decode_rows(lens).tolist())
    assert seen.keys() == {row for row in range(24) if row % 3}
    assert all(abs(count - 250) < 6 * 250**0.5 for count in seen.values())
    assert sorted(one.decode_rows(lens[:4]).tolist()) == [0, 1, 2, 3]
    assert len(one.decode_rows(lens[:2])) == 2
