"""The counts in /server_info and in Prometheus are those of the calls made."""

import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_misa.config import PRESETS, SelectionPolicy
from sglang_misa.metrics import PLACE, UNROUTED_STEPS, Recorder

phases = st.sampled_from(["prefill", "decode"])
paths = st.sampled_from(["dsa", "misa", "captured:hisa"])
calls = st.lists(st.tuples(phases, paths))
fractions = st.floats(0, 1)
rows = st.lists(st.tuples(fractions, fractions, fractions), min_size=1, max_size=200)


@given(calls)
def test_calls_are_counted_by_phase_and_path(made):
    recorder = Recorder()
    for call in made:
        recorder.ran(*call)
    counted = recorder.status()["calls"]
    assert sum(sum(by_path.values()) for by_path in counted.values()) == len(made)
    assert all(counted[phase][path] == made.count((phase, path)) for phase, path in made)


@given(rows)
def test_recall_is_the_mean_and_p10_bounds_a_tenth_of_the_rows(audited):
    recorder = Recorder()
    for row in audited:
        recorder.audited("prefill", 3, *row)
    layer = recorder.status()["recall"]["prefill"]["3"]
    assert layer["rows"] == len(audited)
    for name, values in zip(("recall", "iou", "score_mass"), zip(*audited, strict=True), strict=True):
        assert layer[name] == pytest.approx(sum(values) / len(values))
    recalls = sorted(recall for recall, _, _ in audited)
    tenth = recalls[-(-len(recalls) // 10) - 1]
    assert layer["p10"] <= tenth < layer["p10"] + 0.0011


def test_recall_is_that_of_the_rung_in_use():
    recorder = Recorder()
    for phase in ("prefill", "decode"):
        for layer in (3, 4):
            recorder.audited(phase, layer, 0.5, 0.5, 0.5)
    recorder.moved("prefill", "3", 1, PRESETS["faithful"].prefill)
    recorder.audited("prefill", 3, 1.0, 1.0, 1.0)
    told = recorder.status()["recall"]
    assert (told["prefill"]["3"]["recall"], told["prefill"]["3"]["rows"]) == (1.0, 1)
    assert told["prefill"]["4"]["recall"] == 0.5
    assert set(told["decode"]) == {"3", "4"}
    recorder.moved("decode", "all", 1, SelectionPolicy())
    told = recorder.status()["recall"]
    assert told["decode"] == {}
    assert set(told["prefill"]) == {"3", "4"}


def test_status_tells_off_from_on():
    recorder = Recorder()
    assert recorder.status()["enabled"] is False
    recorder.armed(PRESETS["misa"], rank=1, ranks=4, sglang="0.5.17", verified=True)
    status = recorder.status()
    assert (status["enabled"], status["rank"], status["ranks"]) == (True, 1, 4)
    assert (status["sglang"], status["verified"]) == ("0.5.17", True)
    assert status["policy"] == {"prefill": "misa", "decode": "dsa"}


def test_status_travels_as_msgpack():
    recorder = Recorder()
    recorder.armed(PRESETS["hisa"], rank=0, ranks=1, sglang="0.5.17", verified=True)
    recorder.ran("prefill", "hisa")
    recorder.declined("prefill", "under-min-len")
    recorder.audited("prefill", 0, 1.0, 1.0, 1.0)
    recorder.moved("prefill", "0", 1, SelectionPolicy())
    recorder.replayed("hisa")
    recorder.page_stats_bytes = 256
    status = recorder.status()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(status)) == status
    assert status["declined"] == {"prefill": {"under-min-len": 1}, "decode": {}}
    assert status["dense_layers"] == [0]
    assert status["ladder"] == {"prefill": {"0": {"rung": 1, "policy": "dsa", "moves": 1}}, "decode": {}}
    assert status["replays"] == {"hisa": 1}
    assert status["min_len"] == {"prefill": 24576, "decode": 32768}


def armed():
    recorder = Recorder()
    recorder.armed(PRESETS["misa-hisa"], rank=0, ranks=1, sglang="0.5.17", verified=True)
    return recorder


@pytest.mark.parametrize(("phase", "path"), [("prefill", "misa"), ("decode", "hisa")])
def test_long_steps_that_nothing_selects_for_are_told(caplog, phase, path):
    recorder = armed()
    for _ in range(UNROUTED_STEPS + 2):
        recorder.stepped(phase)
    status = recorder.status()
    assert status["unrouted"] == [phase]
    assert status["steps_over_gate"][phase] == UNROUTED_STEPS + 2
    (record,) = caplog.records
    assert f"expected {path} to select in {phase} steps" in record.getMessage()
    recorder.ran(phase, path)
    recorder.stepped(phase)
    assert recorder.status()["unrouted"] == []


def test_replayed_graphs_count_and_captured_ones_do_not():
    recorder = armed()
    recorder.ran("decode", "captured:hisa")
    for _ in range(UNROUTED_STEPS + 2):
        recorder.stepped("decode")
        recorder.replayed("dsa")  # as a gate that never opens would
    assert recorder.status()["unrouted"] == ["decode"]
    recorder.replayed("hisa")
    recorder.stepped("decode")
    assert recorder.status()["unrouted"] == []


def test_few_rows_of_decode_say_nothing_of_prefill():
    recorder = armed()
    for _ in range(UNROUTED_STEPS + 2):
        recorder.stepped("prefill")
        recorder.declined("decode", "few-rows")
    assert recorder.status()["unrouted"] == ["prefill"]
    recorder.declined("prefill", "few-rows")
    recorder.stepped("prefill")
    assert recorder.status()["unrouted"] == []
    assert recorder.status()["declined"] == {"prefill": {"few-rows": 1}, "decode": {"few-rows": UNROUTED_STEPS + 2}}


SCHEDULER = """
import json, sys
from prometheus_client import CollectorRegistry, multiprocess
from sglang_misa.config import PRESETS, SelectionPolicy
from sglang_misa.metrics import recorder

recorder.armed(PRESETS["misa-hisa"], rank=2, ranks=4, sglang="0.5.17", verified=True)
recorder.ran("prefill", "misa")
place = {"tp_rank": 2, "pp_rank": 0, "dp_rank": json.loads(sys.argv[1])}
recorder.export(PRESETS["misa-hisa"], "0.5.17", **place)
recorder.export(PRESETS["misa-hisa"], "0.5.17", **place)  # a draft worker's turn
for _ in range(3):
    recorder.ran("prefill", "misa-hisa-hier")
recorder.declined("prefill", "under-min-len")
recorder.replayed("dsa")
recorder.audited("prefill", 0, 0.97, 0.9, 1.0)
recorder.guarded("prefill", "0", [SelectionPolicy(heads=8), SelectionPolicy()])
recorder.moved("prefill", "0", 2, SelectionPolicy())
for phase in ("prefill", "decode") * 9:
    recorder.stepped(phase)
recorder.page_stats_bytes = 512
recorder.publish_page_stats()

registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
samples = [s for metric in registry.collect() for s in metric.samples]
print(json.dumps([[s.name, sorted(s.labels.items()), s.value] for s in samples]))
"""


@pytest.mark.parametrize("dp_rank", [None, 1])
def test_prometheus_gets_what_was_counted_since_export(tmp_path, dp_rank):
    run = subprocess.run(
        [sys.executable, "-c", SCHEDULER, json.dumps(dp_rank)],
        env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    samples = {
        (name, *(value for label, value in labels if label not in PLACE)): value
        for name, labels, value in json.loads(run.stdout)
    }
    assert samples["sglang_misa:enabled",] == 1
    assert samples["sglang_misa:calls_total", "misa-hisa-hier", "prefill"] == 3
    assert samples["sglang_misa:calls_total", "misa", "prefill"] == 0
    assert samples["sglang_misa:declined_total", "prefill", "under-min-len"] == 1
    assert samples["sglang_misa:declined_total", "prefill", "recall-floor"] == 0
    assert samples["sglang_misa:page_stats_verified_total",] == 0
    assert samples["sglang_misa:replays_total", "dsa"] == 1
    assert samples["sglang_misa:routed_heads", "prefill"] == 8
    assert samples["sglang_misa:routed_heads", "decode"] == 0
    assert samples["sglang_misa:policy_info", "decode", "hisa"] == 1
    assert samples["sglang_misa:page_stats_bytes",] == 512
    assert samples["sglang_misa:dense_layers",] == 1
    assert samples["sglang_misa:rung", "0", "prefill"] == 2
    assert samples["sglang_misa:ladder_moves_total", "0", "prefill", "dsa"] == 1
    assert samples["sglang_misa:ladder_moves_total", "0", "prefill", "misa"] == 0  # increase() sees the first move
    assert samples["sglang_misa:recall_sampled_count", "0", "prefill"] == 1
    assert samples["sglang_misa:recall_sampled_bucket", "0", "0.95", "prefill"] == 0
    assert samples["sglang_misa:recall_sampled_bucket", "0", "0.97", "prefill"] == 1
    assert samples["sglang_misa:unrouted", "decode"] == 1
    assert samples["sglang_misa:unrouted", "prefill"] == 0
    place = {("dp_rank", "" if dp_rank is None else "1"), ("pp_rank", "0"), ("tp_rank", "2")}
    assert all(place <= set(map(tuple, labels)) for _, labels, _ in json.loads(run.stdout))
