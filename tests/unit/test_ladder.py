"""When a layer leaves its policy and comes back, and that ranks with different audits decide alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import told_by_ranks
from hypothesis import given, strategies
from recorders import fresh_recorder
from torch import distributed

from sglang_misa import decode_gate, ladder
from sglang_misa.config import PRESETS, Audit, MisaConfig, SelectionPolicy
from sglang_misa.ladder import CALM, MARGIN, WINDOW, Ladders, rungs
from sglang_misa.metrics import Recorder
from sglang_misa.policy import EXACT, STOCK

FLOOR = 0.9
MISA = SelectionPolicy(heads=8, min_len=100)
HISA = SelectionPolicy(blocks=64, block_size=128, min_len=100)
LONG = decode_gate.Step([5000])
TAILED = SelectionPolicy(heads=8, min_len=100, tail=64)
FAITHFUL = PRESETS["faithful"].prefill.model_copy(update={"min_len": 100})
HIER, MORE = PRESETS["misa-hier"].prefill, FAITHFUL.model_copy(update={"candidates": 8192})
MODEL = {"index_heads": 64, "topk": 2048}


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    yield fresh_recorder(monkeypatch, ladder)
    decode_gate.suspend(False)


def ladders(peers: Any = None, layers: int = 3, **config: Any) -> Ladders:
    settings = {"prefill": MISA, "decode": HISA, "audit": Audit(rows=4, every=2, floor=FLOOR), **config}
    return Ladders(MisaConfig(**settings), range(layers), **MODEL, peers=peers)


def see(one: Ladders, phase: str, layer: int, recall: float, rows: int = WINDOW, *, probed: bool = False) -> None:
    one.observe(phase, layer, [recall] * rows, probed=probed)
    one.meet()


def test_a_layer_sinks_rung_by_rung_and_comes_back_the_same_way(recorder: Recorder) -> None:
    one = ladders()
    assert (one.policy("prefill", 1), one.probe("prefill", 1)) == (MISA, None)
    see(one, "prefill", 1, FLOOR - 0.01)
    assert (one.policy("prefill", 1), one.probe("prefill", 1)) == (FAITHFUL, MISA)
    see(one, "prefill", 1, FLOOR - 0.01)
    assert (one.policy("prefill", 1), one.probe("prefill", 1)) == (STOCK, FAITHFUL)
    assert recorder.status()["dense_layers"] == [1]
    for back in (FAITHFUL, MISA):
        see(one, "prefill", 1, 1.0, CALM * WINDOW, probed=True)
        assert one.policy("prefill", 1) == back
    assert [one.policy("prefill", layer) for layer in (0, 2)] == [MISA, MISA], "a layer sinks alone"
    state = {"1": {"rung": 0, "policy": MISA.label, "moves": 4}}
    assert recorder.status()["ladder"]["prefill"] == state
    assert recorder.status()["dense_layers"] == []


def test_what_can_move_is_told_before_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Recorder, "guarded", lambda _, *ladder: told.append(ladder))
    ladders(layers=2)
    assert told == [
        *(("prefill", layer, (MISA, FAITHFUL, STOCK)) for layer in "01"),
        ("decode", "all", (HISA, STOCK)),
    ]
    ladders(audit=Audit(rows=4))
    assert len(told) == 3, "without a floor nothing can"


def test_a_layer_falls_by_a_window_of_rows_not_by_one() -> None:
    one = ladders()
    see(one, "prefill", 0, 0.0, rows=1)
    see(one, "prefill", 0, 1.0, rows=WINDOW - 1)
    assert one.policy("prefill", 0) == MISA
    see(one, "prefill", 0, FLOOR - 0.01)  # however good the past was
    assert one.policy("prefill", 0) == FAITHFUL


@pytest.mark.parametrize("recall", [FLOOR - 0.1, FLOOR, FLOOR + MARGIN / 2])
def test_what_is_not_well_over_the_floor_does_not_come_back(recall: float) -> None:
    one = ladders()
    see(one, "prefill", 0, FLOOR - 0.01)
    for _ in range(5):
        see(one, "prefill", 0, recall, CALM * WINDOW, probed=True)
        assert one.policy("prefill", 0) == FAITHFUL


def test_half_a_probe_brings_nothing_back() -> None:
    one = ladders()
    see(one, "prefill", 0, 0.5)
    see(one, "prefill", 0, 1.0, CALM * WINDOW - 1, probed=True)
    assert one.policy("prefill", 0) == FAITHFUL
    see(one, "prefill", 0, 1.0, 1, probed=True)
    assert one.policy("prefill", 0) == MISA


def test_decode_sinks_as_a_step_by_its_worst_layer_and_waits_for_all_to_come_back(recorder: Recorder) -> None:
    one = ladders()
    see(one, "decode", 0, 1.0)
    assert decode_gate.why_stock(HISA, LONG) is None
    see(one, "decode", 2, FLOOR - 0.01)
    assert decode_gate.why_stock(HISA, LONG) == "recall-floor"
    assert one.probe("decode", 0) == HISA
    assert one.policy("prefill", 2) == MISA, "prefill has ladders of its own"
    one.observe("decode", 2, [FLOOR] * CALM * WINDOW, probed=True)
    see(one, "decode", 0, 1.0, CALM * WINDOW, probed=True)
    assert decode_gate.why_stock(HISA, LONG) == "recall-floor"
    one.observe("decode", 2, [1.0] * CALM * WINDOW, probed=True)
    see(one, "decode", 0, 1.0, CALM * WINDOW, probed=True)
    assert decode_gate.why_stock(HISA, LONG) is None
    assert recorder.status()["ladder"]["decode"] == {"all": {"rung": 0, "policy": HISA.label, "moves": 2}}


def sunk(*layers: int) -> Ladders:
    """Ladders whose decode these layers brought down."""
    one = ladders()
    for layer in layers:
        one.observe("decode", layer, [FLOOR - 0.01] * WINDOW, probed=False)
    one.meet()
    return one


def is_sunk() -> bool:
    return decode_gate.why_stock(HISA, LONG) == "recall-floor"


def test_layers_that_never_sank_bring_nothing_back() -> None:
    """One look at many rows fills a layer's windows before another layer has its turn."""
    one = sunk(1, 2)
    see(one, "decode", 0, 1.0, 4 * CALM * WINDOW, probed=True)
    see(one, "decode", 1, 1.0, 4 * CALM * WINDOW, probed=True)
    assert is_sunk()
    see(one, "decode", 2, 1.0, CALM * WINDOW, probed=True)
    assert not is_sunk()


def test_a_layer_that_is_not_looked_at_again_holds_nothing_back() -> None:
    """Steps without a graph audit every layer, replays few of them."""
    one = sunk(2)
    see(one, "decode", 0, 1.0, 1, probed=True)
    see(one, "decode", 2, 1.0, CALM * WINDOW, probed=True)
    assert not is_sunk()
    one = sunk(2)
    see(one, "decode", 0, FLOOR, 1, probed=True)
    see(one, "decode", 2, 1.0, CALM * WINDOW, probed=True)
    assert is_sunk(), "what it kept counts all the same"


SEEN = strategies.tuples(strategies.integers(0, 2), strategies.integers(0, 2 * WINDOW), strategies.booleans())


@given(strategies.lists(SEEN, max_size=40), strategies.sampled_from(["prefill", "decode"]))
def test_only_recalls_under_the_floor_sink_a_layer_and_only_ones_well_over_it_lift_it(
    seen: list[Any], phase: Any
) -> None:
    """Whatever layers are looked at, in whatever order and numbers; and what sank comes back."""
    one = ladders()
    for layer, rows, probed in seen:
        see(one, phase, layer, FLOOR + MARGIN / 2, rows, probed=probed)
        assert all(rung.at == 0 for rung in (*one._prefill, one._step))
    for layer in range(3):
        for _ in range(2):
            see(one, phase, layer, FLOOR - 0.01)
    low = [rung.at for rung in (*one._prefill, one._step)]
    assert low == ([2, 2, 2, 0] if phase == "prefill" else [0, 0, 0, 1])
    for layer, rows, _ in seen:
        see(one, phase, layer, FLOOR, rows, probed=True)
        assert [rung.at for rung in (*one._prefill, one._step)] == low
    for _ in range(8):
        for layer in range(3):
            see(one, phase, layer, 1.0, WINDOW, probed=True)
    assert all(rung.at == 0 for rung in (*one._prefill, one._step))
    decode_gate.suspend(False)


def test_the_ranks_meet_once_in_every_steps() -> None:
    one = ladders()
    one.observe("prefill", 0, [0.0] * WINDOW, probed=False)
    one.stepped()
    assert one.policy("prefill", 0) == MISA
    one.stepped()
    assert one.policy("prefill", 0) == FAITHFUL


def test_without_a_floor_and_in_a_draft_model_nothing_moves() -> None:
    config = MisaConfig(prefill=MISA, decode=HISA, audit=Audit(rows=4, floor=FLOOR))
    for one in (ladders(audit=Audit(rows=4)), Ladders(config, [None], **MODEL, peers=None)):
        one.observe("prefill", 0, [0.0] * WINDOW, probed=False)
        one.observe("decode", 0, [0.0] * WINDOW, probed=False)
        for _ in range(200):
            one.stepped()
        assert one.policy("prefill", 0) == MISA
        assert decode_gate.why_stock(HISA, LONG) is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (MISA, (MISA, FAITHFUL, STOCK)),
        (HISA, (HISA, FAITHFUL, STOCK)),
        (TAILED, (TAILED, FAITHFUL.model_copy(update={"tail": 64}), STOCK)),
        (FAITHFUL, (FAITHFUL, STOCK)),
        (HIER, (HIER, FAITHFUL.model_copy(update={"min_len": HIER.min_len}), STOCK)),
        (MORE, (MORE, STOCK)),
        (EXACT, (EXACT, STOCK)),
        (STOCK, (STOCK,)),
    ],
    ids=lambda each: each.label if isinstance(each, SelectionPolicy) else "",
)
def test_a_rung_keeps_more_than_the_one_before(policy: SelectionPolicy, expected: tuple[SelectionPolicy, ...]) -> None:
    assert rungs(policy, FLOOR, **MODEL) == expected
    assert rungs(policy, 0.0, **MODEL) == (policy,)


def test_faithful_is_left_out_where_the_model_cannot_have_it() -> None:
    few = SelectionPolicy(heads=2)
    assert rungs(few, FLOOR, index_heads=2, topk=2048) == (few, STOCK)


MEETINGS = 12


def one_rank(rank: int, peers: distributed.ProcessGroup) -> list[list[int]]:
    """Audits of layer 0 differ by rank and cross the floor only in the mean; layer 1 is judged by one rank alone."""
    one = ladders(peers=peers, layers=2)
    told = []
    for meeting in range(MEETINGS):
        recall = (0.95, 0.83)[rank] if meeting < 6 else 1.0  # 0.89 in the mean
        one.observe("prefill", 0, [recall] * WINDOW, probed=meeting >= 6)
        if rank == 1:
            one.observe("prefill", 1, [0.1] * WINDOW, probed=False)
            one.observe("decode", 0, [0.2] * WINDOW, probed=False)
        one.meet()
        told.append([ladder_.at for ladder_ in (*one._prefill, one._step)])
    return told


def test_ranks_whose_audits_differ_decide_alike(tmp_path: Path) -> None:
    told = told_by_ranks(one_rank, tmp_path)
    assert told[0] == told[1]
    assert [rungs_[0] for rungs_ in told[0]] == [1, 2, 2, 2, 2, 2, 2, 1, 1, 0, 0, 0]
    assert told[0][-1][1:] == [2, 1], "the rank that saw nothing low sank too"
