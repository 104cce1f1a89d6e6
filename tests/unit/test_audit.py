"""What an audit measures, and when a layer is given back to stock DSA."""

import pytest
import torch

from sglang_misa import audit
from sglang_misa.config import Audit
from sglang_misa.metrics import Recorder


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    fresh = Recorder()
    monkeypatch.setattr(audit, "recorder", fresh)
    return fresh


def test_overlap_by_hand() -> None:
    dense = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    chosen = torch.tensor([True, False, True, False, False])
    recall, iou, mass = audit.overlap(dense, chosen, topk=2)
    assert (recall, iou) == (0.5, pytest.approx(1 / 3))
    assert mass == pytest.approx(8 / 9)
    assert audit.overlap(dense, torch.ones(5, dtype=torch.bool), topk=2048) == (1.0, 1.0, 1.0)


def test_one_call_in_every_is_audited_and_layers_take_turns() -> None:
    auditor = audit.Auditor(Audit(rows=2, every=4), 64)
    due = {layer: [call for call in range(8) if auditor.due("prefill", layer)] for layer in range(4)}
    assert due == {0: [0, 4], 1: [3, 7], 2: [2, 6], 3: [1, 5]}
    assert not any(audit.Auditor(Audit(), 64).due("prefill", 0) for _ in range(9))


def test_rows_are_spread_and_hold_the_last() -> None:
    auditor = audit.Auditor(Audit(rows=4), 64)
    assert auditor.rows(100, 200) == [124, 149, 174, 199]
    assert auditor.rows(7, 9) == [7, 8]
    assert auditor.rows(5, 5) == []


def test_a_layer_falls_by_a_window_of_rows_not_by_one(recorder: Recorder) -> None:
    auditor = audit.Auditor(Audit(rows=1, floor=0.9, action="dense"), 64)
    auditor.record("prefill", 3, [(0.1, 0.1, 0.1)])
    auditor.record("prefill", 3, [(1.0, 1.0, 1.0)] * (audit.WINDOW - 1))
    assert not auditor.dense_layers
    auditor.record("prefill", 3, [(0.89, 0.8, 0.9)] * audit.WINDOW)  # however good the past was
    assert auditor.dense_layers == {3}
    assert recorder.status()["dense_layers"] == [3]


def test_under_log_the_layer_stays(caplog: pytest.LogCaptureFixture) -> None:
    auditor = audit.Auditor(Audit(rows=1, floor=0.9), 64)
    auditor.record("prefill", 0, [(0.2, 0.1, 0.3)] * audit.WINDOW)
    assert not auditor.dense_layers
    assert "mean recall 0.200 of prefill" in caplog.text
