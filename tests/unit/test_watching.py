"""The bench of those who watch a server: its looks find what they must, and its shares are of the step one gives."""

import pytest
import torch
from recorders import fresh_recorder

from sglang_misa import audit, canary
from sglang_misa.bench import layer, watching
from sglang_misa.metrics import Recorder

SHAPES = {"decode": (3, 2200), "prefill": (130, 2300)}


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return fresh_recorder(monkeypatch, watching, audit, canary)


@pytest.mark.parametrize("phase", SHAPES)
def test_looks_are_right_before_they_are_timed(phase: str, recorder: Recorder) -> None:
    watched = watching.Watched.make("faithful", layer.Shape(phase, 64, *SHAPES[phase], "random", device="cpu"), 2)
    watched.audit(phase)()
    assert recorder.status()["recall"][phase]["0"]["rows"] == 4, "two looks at two rows"
    if phase == "decode":
        before = watched.serving.engine.stats.means[0].clone()
        watched.canary()()
        assert torch.equal(before, watched.serving.engine.stats.means[0])


def test_an_audit_that_tells_another_recall_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = watching.Watched.make("faithful", layer.Shape("decode", 64, 1, 2200, "random", device="cpu"), 1)
    monkeypatch.setattr(audit, "_chosen", lambda output, length: torch.ones(1, length, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="expected a recall of"):
        watched.audit("decode")


def test_a_canary_that_misses_a_bit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = watching.Watched.make("hisa", layer.Shape("decode", 64, 1, 2200, "random", device="cpu"), 1)
    verdict = watched.serving.engine.compared
    monkeypatch.setattr(watched.serving.engine, "compared", lambda *a: (verdict(*a)[0], verdict(*a)[1] * 0))
    with pytest.raises(RuntimeError, match="flipped=True"):
        watched.canary()


def test_a_share_is_of_the_step_that_is_given() -> None:
    look = watching.Look.of("canary, 16 pages", 60.0, 400.0, 1.0, 24.0)
    assert (look.share, look.budget) == (pytest.approx(60 / 24e3), 0.005)
    prefill = watching.Look.of("audit, prefill", 900.0, 1300.0, 61 / 64, 650.0)
    assert (prefill.share, prefill.budget) == (pytest.approx(1300 * 61 / 64 / 650e3, abs=1e-6), 0.01)
    assert watching.Look.of("audit, decode", 1.0, 1.0, 1 / 64, None).share is None
    assert str(look) == "canary, 16 pages gpu_us=60.0     host_us=400.0    share=0.250% of at most 0.5%"
