"""Parsers, schedules, prompts, figures, gates, safety: each against an independent truth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from load.helpers import record, unit

from sglang_misa.bench.load.checks import check_plan
from sglang_misa.bench.load.environment import Environment, facts
from sglang_misa.bench.load.figures import error_classes, server_figures, summarize, under
from sglang_misa.bench.load.gates import Gate, gates_of
from sglang_misa.bench.load.plan import Arm, Cell, Plan, Slo
from sglang_misa.bench.load.prompts import RandomIds, TextIds, prose
from sglang_misa.bench.load.records import check_compared
from sglang_misa.bench.load.safety import HIDDEN, Keys, check_target
from sglang_misa.bench.load.schedule import arrivals, client_starts
from sglang_misa.bench.load.settings import Lengths, Load, LoadError, Workload
from sglang_misa.bench.load.sse import SseParser
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.load.tables import main_table
from sglang_misa.bench.load.verdict import compare, judge, pool
from sglang_misa.bench.load.workload import KEEP_STREAM, WARMUP_STREAM, Builder, Needle, found


def words(text: str) -> list[int]:
    """A tokenizer of one token a character."""
    return [ord(c) for c in text]


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20), min_size=1, max_size=3),
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n", "\r"]),
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
    wanted = [(b"x", "\n".join(lines)) for lines in events]
    assert [(e.name, e.data.decode()) for e in got] == wanted


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


def test_errors_stay_out_of_latencies_and_in_denominators():
    records = [record(0, 0.1), record(1, 0.3), record(2, 99.0, error="stall"), record(3, 99.0, error="http_429")]
    figures = summarize(records, (0.0, 2.0), 22, Slo(ttft=0.2))
    assert figures["error_rate"] == 0.5
    assert figures["ttft_p50"] == pytest.approx(0.2)
    assert figures["ttft_max"] == pytest.approx(0.3)
    assert figures["tpot_p50"] == pytest.approx(0.01)
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 11.0
    assert figures["goodput"] == 0.5
    assert figures["slo_share"] == 0.25
    assert error_classes(records) == {"stall": 1, "http_429": 1}


def test_a_stored_block_is_judged_by_the_limits_of_today():
    records = [record(0, 0.1), record(1, 0.3), record(2, 0.5, error="stall"), record(3, 0.2)]
    stored = unit("a", 0, records, 0.0)
    assert "goodput" not in stored.figures
    for limits, kept in ((Slo(ttft=0.25), 2), (Slo(ttft=0.15), 1)):
        stored = under(stored, limits)
        assert (stored.figures["slo_kept"], stored.figures["goodput"]) == (kept, pytest.approx(kept / 10.0))
        assert pool([stored], Plan(arms=(), cells=(), slo=limits)).figures["slo_share"] == kept / 4
    assert "slo_share" not in under(stored, None).figures


def test_another_text_is_another_cell(tmp_path):
    text = tmp_path / "text"
    text.write_text("one")
    first = Cell.of(Workload(text=str(text)), Load())
    assert Cell.of(Workload(text=str(text)), Load()).digest() == first.digest()
    text.write_text("another")
    assert Cell.of(Workload(text=str(text)), Load()).digest() != first.digest()
    with pytest.raises(LoadError, match="that the run began with"):
        check_plan(Plan(arms=(), cells=(first,)))


def test_pairs_need_both_answers():
    a = [unit("a", 0, [record(0, 1.0), record(1, 1.0), record(2, 50.0)], 0.0)]
    b = [unit("b", 0, [record(0, 2.0), record(1, 2.0), record(2, 9.0, error="stall")], 1.0)]
    (ratio,) = compare(a, b, ["ttft_p50"], 0.95)
    assert ratio.pairs == 2
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low is None
    assert not ratio.certain


@pytest.mark.parametrize(("answered", "failed", "shown"), [(99, 5, False), (100, 0, True), (60, 60, False)])
def test_a_tail_needs_a_hundred_answers(answered, failed, shown):
    plan = Plan(arms=(Arm(name="a", server="http://127.0.0.1:1"),), cells=())
    records = [record(i, 0.1, error="stall" if i < failed else None) for i in range(answered + failed)]
    halves = [unit("a", i, records[i::2], float(i)) for i in range(2)]
    figures = pool(halves, plan).figures
    assert ("ttft_p99" in figures) == shown
    assert "ttft_p90" in figures
    asked = pool(halves, plan.model_copy(update={"primary": "ttft_p99"})).figures
    assert "ttft_p99" in asked


def test_counters_of_blocks_are_added_up():
    """A block with ten requests and a cold one of one: neither the larger share nor the mean of the two."""
    plan = Plan(arms=(Arm(name="a", server="http://127.0.0.1:1"),), cells=())
    grew = [
        {"queue_time_seconds_count": 10.0, "queue_time_seconds_sum": 1.0, "prompt_tokens_total": 900.0},
        {"queue_time_seconds_count": 1.0, "queue_time_seconds_sum": 2.1, "prompt_tokens_total": 100.0},
    ]
    grew[1] |= {"cached_tokens_total": 50.0, "num_retracted_requests_total": 6.0}
    measured = [{f'sglang:{name}{{tp_rank="0"}}': value for name, value in each.items()} for each in grew]
    plain = unit("a", 0, [record(0, 0.1)], 0.0)
    told = [{"metrics": m, "figures": plain.figures | server_figures(m)} for m in measured]
    figures = pool([plain.model_copy(update=told[i]) for i in (0, 1, 0)], plan).figures
    assert figures["server_queue_s_mean"] == pytest.approx(4.1 / 21)
    assert figures["server_cached_share"] == pytest.approx(50 / 1900)
    assert figures["server_retractions"] == 6


@pytest.mark.parametrize(("failed", "tail"), [(0, "TTFT p99"), (5, "TTFT p90")])
def test_the_main_table_has_the_tail_that_the_answers_can_show(failed, tail):
    cell = Cell.of(Workload(), Load())
    plan = Plan(arms=(Arm(name="a", server="http://127.0.0.1:1"),), cells=(cell,))
    records = [record(i, 0.1, error="stall" if i < failed else None) for i in range(100)]
    block = unit("a", 0, records, 0.0).model_copy(update={"cell": cell.digest()})
    shown = main_table(plan, judge(plan, [block]))
    assert {name for name in ("TTFT p90", "TTFT p99") if name in shown} == {tail}


def test_throughput_of_a_ratio_is_that_of_the_figures():
    """Tokens by time over all blocks, however different the blocks are."""
    a = [unit("a", i, [record(k, 0.1) for k in range(4 + 8 * i)], 2.0 * i) for i in range(2)]
    b = [unit("b", i, [record(k, 0.1) for k in range(4 + 2 * i)], 2.0 * i + 1) for i in range(2)]
    (ratio,) = compare(a, b, ["output_throughput"], 0.95)
    assert ratio.a == pytest.approx(11 * 16 / 20)
    assert ratio.b == pytest.approx(11 * 10 / 20)


def test_gates():
    assert Gate("ttft_p50 > 1.02").fails(1.03)
    assert not Gate("ttft_p50 > 1.02").fails(1.02)
    assert Gate("goodput.low<=0.9").bound == "low"
    assert [g.text for g in gates_of(["error_rate > 0.5"])] == ["error_rate > 0.5"]
    assert [g.text for g in gates_of([])] == ["error_rate > 0.01"]


@pytest.mark.parametrize(
    "text", ["ttft == 3", "ttft_p50 > 1.0.2", "ttft_p999 > 1", "speed > 1", "ttft_p50 > ", "ttft > 1"]
)
def test_gates_refuse_what_they_do_not_know(text):
    with pytest.raises(LoadError, match="expected"):
        Gate(text)


@pytest.mark.parametrize("metric", ["ttft_max", "ttft", "ttft_p999", "ttft_p101", "speed", "error_rate"])
def test_figures_of_a_verdict(metric):
    with pytest.raises(LoadError, match="expected"):
        check_compared(metric)
    for fine in ("ttft_mean", "itl_p0", "e2e_p100", "goodput"):
        assert check_compared(fine) == fine


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
        "Authorization: Bearer other7 http://me:other8@host/ api_key=None max_tokens=12 "
        "HUGGING_FACE_HUB_TOKEN=other9 python -m x --ssl-keyfile-password other10 ssl_keyfile_password='other11' "
        "GITHUB_TOKEN=-other12 OPENAI_KEY=other13 --proxy-authorization 'other14 other15' myToken: other16"
    )
    assert "other" not in text
    assert "topsecret" not in text
    assert "api_key=None" in text
    assert "max_tokens=12" in text
    assert "python -m x" in text
    plain = (
        "--api-key-file /a --max-token 3 --tokenizer-path b --speculative-token-map c bos_token_id=1 --skip-key --x 1"
    )
    assert keys.erase(plain) == plain
    data = keys.clean(
        {"api_key": "k", "deep": [{"hf_token": "t", "note": "topsecret2"}], "tokens": 5, "max_token": "6"}
    )
    assert json.dumps(data) == json.dumps(
        {"api_key": HIDDEN, "deep": [{"hf_token": HIDDEN, "note": HIDDEN}], "tokens": 5, "max_token": "6"}
    )


def test_a_servers_selection_is_no_secret():
    info = {"internal_states": [{"misa": {"enabled": True, "policy": {"prefill": "fast"}}}]}
    assert facts(info)["selection"] == '{"prefill": "fast"}'


def test_long_words_are_searched_for_keys_in_no_time():
    """A log may hold a picture in base64; at the square of its length the server would wait for its reader."""
    word = "aB1" * 200_000
    assert Keys("secret").erase(f"{word} --api-key {word[:500]}") == f"{word} --api-key {HIDDEN}"


@pytest.mark.parametrize("key", ["123", "0", "server", "token", "sglang", "c"])
def test_short_keys_do_not_eat_artefacts(tmp_path, key):
    """A key that is also a word or a digit of the data: what was saved is found, figure for figure."""
    arm = Arm(name="server", server="python -m sglang.launch_server --port 3")
    cell = Cell(workload=Workload(), load=Load())
    plan = Plan(arms=(arm,), cells=(cell,))
    store = Store(tmp_path, Keys(key))
    saved = unit("server", 0, [record(0, 0.12345)], 123.0)
    store.begin(plan, Environment.now(["run"], Keys(key)))
    store.save(saved, arm, cell, plan.protocol)
    assert store.find(arm, cell, 0, plan.protocol) == saved
    assert store.units() == [saved]
    again = Store.plan_in(tmp_path)
    assert again.cells == plan.cells
    assert again.arms[0].name == "server"


def test_random_ids_stay_in_range():
    drawn = RandomIds(10, 20).draw(np.random.default_rng(0), 1000)
    assert drawn.min() == 10
    assert drawn.max() == 19
