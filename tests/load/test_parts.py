"""Parsers, schedules, prompts, percentiles, intervals, gates, safety: each against an independent truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_misa.bench.load import measure
from sglang_misa.bench.load.measure import Gate, Record, paired_ratios, percentile, summarize
from sglang_misa.bench.load.prompts import RandomIds, TextIds, prose
from sglang_misa.bench.load.safety import HIDDEN, Keys, check_target
from sglang_misa.bench.load.schedule import arrivals, client_starts
from sglang_misa.bench.load.settings import Lengths, Load, LoadError, Slo, Workload
from sglang_misa.bench.load.sse import SseParser
from sglang_misa.bench.load.workload import KEEP_STREAM, WARMUP_STREAM, Builder, Needle, found


def words(text: str) -> list[int]:
    """A tokenizer of one token a character."""
    return [ord(c) for c in text]


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20), min_size=1, max_size=3),
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.data(),
)
def test_events_survive_every_cut(events, end, data):
    stream = ": a comment" + end
    for lines in events:
        stream += "event: x" + end + "".join(f"data: {line}{end}" for line in lines) + end
    raw = stream.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    parser, got = SseParser(1 << 20), []
    for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        got += parser.feed(raw[a:b])
    assert [g.decode() for g in got] == ["\n".join(lines) for lines in events]


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 5)), min_size=1, max_size=40).filter(
        lambda rows: sum(w for _, w in rows) > 0
    ),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(rows, q):
    values, weights = zip(*rows, strict=True)
    truth = np.percentile(np.repeat(values, weights), q)
    assert percentile(values, q, weights) == pytest.approx(truth, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("900", 900, 900), ("32k", 32768, 32768), ("uniform:1k:2k", 1024, 2048), ("normal:1000:50", 850, 1150)],
)
def test_lengths(text, low, high):
    drawn = Lengths.parse(text).draw(np.random.default_rng(0), 500)
    assert low <= min(drawn) <= max(drawn) <= high <= Lengths.parse(text).longest
    assert (len(set(drawn)) > 1) == (low != high)


@pytest.mark.parametrize("text", ["", "32q", "uniform:5", "uniform:9:5", "zipf:3", "1,2"])
def test_lengths_refuse_what_they_do_not_know(text):
    with pytest.raises(LoadError, match="length"):
        Lengths.parse(text)


def test_arrivals():
    rng = np.random.default_rng(1)
    poisson = arrivals(Load(arrival="poisson", rate=50, requests=4000), rng)
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.08)  # exponential
    constant = arrivals(Load(arrival="constant", rate=4, requests=5), rng)
    assert constant.tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    burst = arrivals(Load(arrival="burst", rate=2, burst=3, requests=7), rng)
    assert burst.tolist() == [0, 0, 0, 1.5, 1.5, 1.5, 3.0]
    ramped = arrivals(Load(arrival="constant", rate=10, ramp_s=4, requests=60), rng)
    assert (ramped < 4).sum() == 20  # half of what the full rate would send
    assert np.diff(ramped)[30:] == pytest.approx(0.1)
    assert len(arrivals(Load(arrival="constant", rate=10, requests=1000, duration_s=2), rng)) == 20
    assert client_starts(Load(concurrency=4, ramp_s=8)) == [0, 2, 4, 6]


@settings(deadline=None, max_examples=15)
@given(st.integers(200, 3000), st.floats(0, 99), st.integers(0, 2), st.integers(0, 99))
def test_prompts_are_exact_and_share_exactly(length, share, needles, seed):
    workload = Workload(input_len=str(length), shared_prefix=share if length > 800 else 0, needles=needles, seed=seed)
    source = TextIds(prose(0, 9000), words)
    builder = Builder(workload, source)
    if workload.needles * 60 + 70 > length * (1 - workload.shared_prefix / 100):
        return  # no room for the facts: refused, or nearly
    made = builder.conversations(0, 6)
    prompts = [c.turns[0].ids for c in made]
    again = [c.turns[0].ids for c in Builder(workload, source).conversations(0, 6)]
    for prompt, same, conversation in zip(prompts, again, made, strict=True):
        assert len(prompt) == length
        assert (prompt == same).all()
        wanted = round(length * workload.shared_prefix / 100)
        assert conversation.shared == min(wanted, length - 2)
        for prefix in builder.prefixes(0):
            assert (prompt[: conversation.shared] == prefix[: conversation.shared]).all()
    for i, one in enumerate(prompts):
        for other in prompts[:i]:
            differ = np.flatnonzero(one != other)
            assert len(differ)
            assert differ[0] == made[0].shared  # not one token more
    others = (
        builder.conversations(1, 6)
        + builder.conversations(0, 6, WARMUP_STREAM)
        + builder.conversations(0, 6, KEEP_STREAM)
    )
    assert not any(np.array_equal(p, c.turns[0].ids) for p in prompts for c in others)


def test_needles_without_room_are_refused():
    with pytest.raises(LoadError, match="needles"):
        Builder(Workload(input_len="100", needles=2), TextIds(prose(0, 9000), words)).conversations(0, 1)


def test_the_asked_needle_lies_at_its_depth():
    builder = Builder(Workload(input_len="4000", needles=3), TextIds(prose(0, 9000), words))
    for conversation in builder.conversations(0, 8):
        text = "".join(map(chr, conversation.turns[0].ids))
        needle = conversation.turns[0].needle
        assert needle is not None
        assert text.count("Remember: the code of vault") == 3
        asked = text.rsplit("vault ", 1)[1].split()[0]
        place = text.index(f"the code of vault {asked} is {needle.answer}.")
        assert place / 4000 == pytest.approx(needle.depth, abs=0.06)
        assert text.endswith(f"The code of vault {asked} is")


def test_answers():
    needle = Needle("1234567", 0.5)
    assert found(needle, " 1234567. And 7654321")
    assert not found(needle, " 7654321 or 1234567")
    assert not found(needle, "12345678")


def record(pair: int, ttft: float, tpot: float = 0.01, tokens: int = 11, error: str | None = None) -> Record:
    last = 1.0 + ttft + tpot * (tokens - 1)
    return Record(
        pair=pair,
        due=1.0,
        dispatched=1.0,
        first=None if error else 1.0 + ttft,
        last=last,
        done=last,
        gaps=(tpot,) * (tokens - 1),
        gap_tokens=(1,) * (tokens - 1),
        prompt_wanted=100,
        output_wanted=tokens,
        output_tokens=tokens,
        error=error,
    )


def test_errors_stay_out_of_latencies_and_in_denominators():
    records = [record(0, 0.1), record(1, 0.3), record(2, 99.0, error="stall"), record(3, 99.0, error="http_429")]
    figures = summarize(records, 2.0, 22, Slo(ttft=0.2))
    assert figures["error_rate"] == 0.5
    assert figures["ttft_p50"] == pytest.approx(0.2)
    assert figures["ttft_max"] == pytest.approx(0.3)
    assert figures["tpot_p50"] == pytest.approx(0.01)
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 11.0
    assert figures["goodput"] == 0.5
    assert figures["slo_share"] == 0.25
    assert measure.error_classes(records) == {"stall": 1, "http_429": 1}


def test_intervals_cover_the_truth():
    """B is 10 % slower on each prompt, and prompts differ far more: pairing finds it, most intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(20):
        a, b = [], []
        for _ in range(4):
            base = rng.uniform(0.5, 5.0, 8)
            a.append([record(i, t) for i, t in enumerate(base)])
            b.append([record(i, t * 1.1 * rng.normal(1, 0.02)) for i, t in enumerate(base)])
        (ratio,) = paired_ratios(a, b, ["ttft_mean"], 0.95, seed=trial)
        assert ratio.low <= ratio.value <= ratio.high
        assert ratio.certain
        assert ratio.pairs == 32
        held += ratio.low <= 1.1 <= ratio.high
    assert held >= 15


def test_pairs_need_both_answers():
    a = [record(0, 1.0), record(1, 1.0), record(2, 50.0)]
    b = [record(0, 2.0), record(1, 2.0), record(2, 9.0, error="stall")]
    (ratio,) = paired_ratios([a], [b], ["ttft_p50"], 0.95)
    assert ratio.pairs == 2
    assert ratio.value == pytest.approx(2.0)


def test_gates():
    assert Gate("ttft_p50 > 1.02").fails(1.03)
    assert not Gate("ttft_p50 > 1.02").fails(1.02)
    assert Gate("goodput.low<=0.9").bound == "low"
    with pytest.raises(LoadError, match="fail_if"):
        Gate("ttft == 3")


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8:80", "http://[2001:4860:4860::8888]", "ftp://127.0.0.1", "127.0.0.1:80"]
)
def test_far_targets_are_refused(url):
    with pytest.raises(LoadError, match="target"):
        check_target(url, allow_remote=False)


def test_near_targets_and_the_way_out():
    for url in ("http://127.0.0.1:30000/", "http://[::1]:3", "http://10.1.2.3", "https://192.168.0.9:1"):
        assert check_target(url, allow_remote=False) == url.rstrip("/")
    assert check_target("http://8.8.8.8", allow_remote=True)
    with pytest.raises(LoadError, match="password"):
        check_target("http://me:pw@127.0.0.1", allow_remote=True)


def test_keys_are_erased():
    keys = Keys("topsecret1", "topsecret2")
    text = keys.erase(
        'a topsecret1 b --api-key other3 --admin-api-key=other4 api_key=\'other5\' "hf_token": "other6" '
        "Authorization: Bearer other7 http://me:other8@host/ api_key=None max_tokens=12"
    )
    assert not any(f"other{i}" in text for i in range(3, 9))
    assert "topsecret" not in text
    assert "api_key=None" in text
    assert "max_tokens=12" in text
    data = keys.clean(
        {"api_key": "k", "deep": [{"hf_token": "t", "note": "topsecret2"}], "tokens": 5, "max_token": "6"}
    )
    assert json.dumps(data) == json.dumps(
        {"api_key": HIDDEN, "deep": [{"hf_token": HIDDEN, "note": HIDDEN}], "tokens": 5, "max_token": "6"}
    )


def test_random_ids_stay_in_range():
    drawn = RandomIds(10, 20).draw(np.random.default_rng(0), 1000)
    assert drawn.min() == 10
    assert drawn.max() == 19
