"""Agents, traces and data sets: lengths, times and prefix hits are what the data or the options say."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import tyro
from load.helpers import PATIENT, figures, results, units

from sglang_misa.bench.load import cli, dataset, trace
from sglang_misa.bench.load.checks import check_plan
from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.prompts import RandomIds
from sglang_misa.bench.load.settings import Load, LoadError, Workload
from sglang_misa.bench.load.shell import OK, USAGE
from sglang_misa.bench.load.trace import HASHED, TraceBuilder
from sglang_misa.bench.load.workload import WARMUP_STREAM, Builder


def test_an_agents_context_stays_cached(mocks, tmp_path):
    """Three conversations of four turns over 4K tokens: what the server found in its cache is what was planned."""
    mocks[0].script(ttft=0.005, itl=0.0)
    agent = ["--workload", "agent", "--input-len", "4k", "--turns", "4", "--turn-len", "uniform:100:300"]
    more = ["--concurrency", "3", "--output-len", "8", "--pause-s", "0.05", "--warmup", "1"]
    assert main(["run", mocks[0].url, *PATIENT, *agent, *more, "--out", str(tmp_path)]) == OK
    (unit,) = units(tmp_path)
    assert len(unit["records"]) == 12
    assert not any("prefix hits differ" in note for note in unit["notes"])
    for r in unit["records"]:
        assert abs(r["cached_tokens"] - r["cached_wanted"]) <= 64
        assert r["cached_tokens"] >= 4096 - 64
        assert r["prompt_tokens"] == r["prompt_wanted"]
        assert 100 <= r["prompt_tokens"] - r["cached_tokens"] <= 300 + 64 + 8
    seen = figures(tmp_path)
    assert seen["cached_share"] == pytest.approx(seen["cached_wanted_share"], abs=0.02)
    assert seen["cached_share"] > 0.9
    assert "later_turns_ttft_p50" in seen
    starts = sorted(r["dispatched"] for r in unit["records"] if r["pair"] == 0)
    assert min(np.diff(starts)) > 0.005


def test_an_agent_has_defaults_of_its_own():
    load = Load(concurrency=4)
    work = Workload(workload="agent", input_len="128k").resolved(load)
    assert (work.turns, work.turn_len, work.prefix_groups) == (8, "uniform:1k:4k", 4)
    assert load.resolved(work).asked == 4
    made = Builder(work, RandomIds(100, 8000)).conversations(0, 4)
    for conversation in made:
        assert conversation.shared == 128 * 1024
        news = [len(conversation.turns[0].ids) - conversation.shared, *(len(t.ids) for t in conversation.turns[1:])]
        assert all(1024 <= n <= 4096 for n in news)
        assert len(set(news)) > 1
        assert all(t.pause_s > 0 for t in conversation.turns[1:])
    plain = Workload().resolved(load)
    assert (plain.turns, plain.turn_len, plain.pause_s) == (1, "256", 0.0)


def rows(path: Path) -> None:
    """Four requests: the second shares two blocks with the first, the fourth all but its end with the third."""
    data = [
        {"timestamp": 27000, "input_length": 1200, "output_length": 4, "hash_ids": [1, 2, 3]},
        {"timestamp": 27200, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 27400, "input_length": 1024, "output_length": 3, "hash_ids": [7, 8]},
        {"timestamp": 27800, "input_length": 1100, "output_length": 3, "hash_ids": [7, 8, 5]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in data))


def test_a_trace_is_replayed(mocks, tmp_path):
    rows(tmp_path / "trace.jsonl")
    mocks[0].script(ttft=0.005, itl=0.0)
    words = ["--trace", str(tmp_path / "trace.jsonl"), "--time-scale", "2", "--warmup", "0"]
    assert main(["run", mocks[0].url, *PATIENT, *words, "--out", str(tmp_path / "out")]) == OK
    (unit,) = units(tmp_path / "out")
    records = unit["records"]
    assert [r["due"] for r in records] == pytest.approx([0.0, 0.4, 0.8, 1.6])
    assert [r["prompt_tokens"] for r in records] == [1200, 1500, 1024, 1100]
    assert [r["output_tokens"] for r in records] == [4, 5, 3, 3]
    assert [r["cached_wanted"] for r in records] == [0, 1024, 0, 1024]
    assert [r["cached_tokens"] for r in records] == [0, 1024, 0, 1024]
    assert "trace.jsonl · its times × 2" in results(tmp_path / "out")["arms"][0]["label"]


def test_equal_hashes_are_equal_tokens(tmp_path):
    rows(tmp_path / "trace.jsonl")
    builder = TraceBuilder(Workload(trace=str(tmp_path / "trace.jsonl")), RandomIds(100, 8000))
    a, b, c, d = (conversation.turns[0].ids for conversation in builder.conversations(0, 4))
    assert (a[: 2 * HASHED] == b[: 2 * HASHED]).all()
    assert (a[2 * HASHED : 1200] != b[2 * HASHED : 1200]).any()
    assert (c == d[: 2 * HASHED]).all()
    other = builder.conversations(1, 1)[0].turns[0].ids
    warm = builder.conversations(0, 1, WARMUP_STREAM)[0].turns[0].ids
    assert (a[:HASHED] != other[:HASHED]).any()
    assert (a[:HASHED] != warm[:HASHED]).any()


LENGTHS = (("input", "output"), ("output", "input"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", '{"timestamp": 0}', '{"timestamp": 0, "input_length": 9000, "output_length": 1}'),
        '{"timestamp": 1e300, "input_length": 9, "output_length": 1}',
        '{"timestamp": 1e999, "input_length": 9, "output_length": 1}',
        *(f'{{"timestamp": 0, "{name}_length": 1000000000000, "{other}_length": 1}}' for name, other in LENGTHS),
    ],
)
def test_traces_that_cannot_be_replayed_are_refused(tmp_path, text):
    (tmp_path / "trace.jsonl").write_text(text)
    for limit in (8000, None) if "9000" not in text else (8000,):
        with pytest.raises(LoadError, match=r"trace: .*expected"):
            trace.read(Workload(trace=str(tmp_path / "trace.jsonl"), max_len=limit))


@pytest.mark.parametrize(
    ("words", "far"),
    [
        (["--trace", "{trace}"], True),
        (["--trace", "{trace}", "--time-scale", "0.1"], False),
        (["--trace", "{trace}", "--duration-s", "9"], False),
        (["--trace", "{trace}", "--requests", "1"], False),
        (["--arrival", "poisson", "--rate", "1e-300"], True),
    ],
)
def test_nobody_waits_for_weeks(tmp_path, words, far):
    lines = [{"timestamp": 1e12 + n * 8 * 86_400_000, "input_length": 9, "output_length": 1} for n in range(2)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [word.format(trace=tmp_path / "trace.jsonl") for word in words]
    command = tyro.cli(cli.Run, args=["http://127.0.0.1:1", *words])
    with pytest.raises(LoadError, match="expected arrivals within 7 days") if far else contextlib.nullcontext():
        check_plan(cli.plan_of(command))


@pytest.mark.parametrize(
    "row",
    [
        '{"messages": ["hello"]}',
        '{"prompt": "x", "output_len": [3]}',
        '{"prompt": "x", "max_tokens": -4}',
        '{"prompt": "x", "max_tokens": 0}',
        '{"prompt": "x", "max_tokens": 1e999}',
        '{"prompt": "x", "max_tokens": 2.9}',
        '{"prompt": "x", "max_tokens": true}',
        '{"messages": [{"role": "user", "content": 5}]}',
        "[" * 100_000,
    ],
)
def test_data_that_cannot_be_read_is_refused(tmp_path, row):
    (tmp_path / "data.jsonl").write_text(row)
    with pytest.raises(LoadError, match=r"dataset: \S+data\.jsonl:1: expected"):
        dataset.read(Workload(dataset=str(tmp_path / "data.jsonl")))


def test_messages_are_what_was_written(tmp_path):
    """Parts of a message are one text, an empty one is none, and what Unicode calls the end of a line is no end."""
    parts = [
        {"type": "text", "text": "look "},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "here"},
    ]
    said = [("system", "be kind"), ("user", None), ("user", parts), ("assistant", "yes"), ("user", "a\u2028b\x85c")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    ((first, second),) = dataset.read(Workload(dataset=str(tmp_path / "data.jsonl"), turns=9))
    assert (first.prompt, first.reply, second.prompt, second.reply) == ("look here", "yes", "a\u2028b\x85c", None)


def test_half_a_character_of_a_data_set_is_replaced(tmp_path):
    said = [{"role": "user", "content": "cut \ud83d"}, {"role": "assistant", "content": "\ude00"}]
    rows = [{"messages": said}, {"prompt": "\ud83d", "output": "x\ud83d", "output_len": "7"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (first,), (second,) = dataset.read(Workload(dataset=str(tmp_path / "data.jsonl")))
    assert (first.prompt, first.reply) == ("cut \ufffd", "\ufffd")
    assert (second.prompt, second.reply, second.output_len) == ("\ufffd", "x\ufffd", 7)


def test_prompts_of_a_data_set(mocks, tmp_path):
    mocks[0].script(ttft=0.005, itl=0.0)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "x" * (50 + i), "output_len": 3 + i}) for i in range(4))
    )
    said = [
        {"from": "human", "value": "y" * 70},
        {"from": "gpt", "value": "z" * 9},
        {"from": "human", "value": "w" * 30},
    ]
    (data / "b.json").write_text(json.dumps([{"conversations": said}]))
    (data / "c.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "v" * 4000}]}))
    words = ["--dataset", str(data), "--requests", "5", "--warmup", "1", "--max-len", "1000", "--turns", "2"]
    assert main(["run", mocks[0].url, *PATIENT, *words, "--output-len", "6", "--out", str(tmp_path / "out")]) == OK
    (unit,) = units(tmp_path / "out")
    asked = sorted((r["prompt_tokens"], r["output_tokens"]) for r in unit["records"])
    assert asked == [(50, 3), (51, 4), (52, 5), (53, 6), (70, 9), (70 + 9 + 30, 6)]


@pytest.mark.parametrize(
    "words",
    [
        ["--trace", "/no/such/file"],
        ["--dataset", "/no/such/file"],
        ["--workload", "agent", "--shared-prefix", "50"],
        ["--workload", "agent", "--trace", "x"],
        ["--dataset", "x", "--text", "ids"],
    ],
)
def test_work_that_cannot_be_done_is_refused(tmp_path, capsys, words):
    assert main(["run", "http://127.0.0.1:1", *words, "--out", str(tmp_path)]) == USAGE
    assert "expected" in capsys.readouterr().err
