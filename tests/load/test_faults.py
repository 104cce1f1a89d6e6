"""What once fooled a load test, or could: each fault with the class, the figure or the message it must give."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
from load.helpers import PATIENT, SMALL, MockProcess, ask, figures, record, results, units

from sglang_misa.bench.load import drive, replies, selection, servers
from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.dialogue import Encoder
from sglang_misa.bench.load.plan import Cell
from sglang_misa.bench.load.prepare import Preparation, ServerGoneError
from sglang_misa.bench.load.prompts import source_of
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Access, Bounds, Load, Protocol, Serving, Workload
from sglang_misa.bench.load.shell import GATE_FAILED, INVALID, OK, USAGE
from sglang_misa.bench.quality.cli import main as quality
from sglang_misa.config import PHASES, PRESETS
from sglang_misa.procs import free_port


@pytest.mark.parametrize(
    ("api", "fault", "kind", "why"),
    [
        ("completions", "error_event", "server_error", "out of memory"),
        ("completions", "error_flat", "server_error", "EngineCore died"),
        ("chat", "error_named", "server_error", "overloaded"),
        ("generate", "error_named", "server_error", "overloaded"),
        ("generate", "error_foreign", "server_error", "guard tripped"),
        ("chat", "error_foreign", "server_error", "guard tripped"),
        ("completions", "done", "early_close", "finish reason"),
        ("generate", "done", "early_close", "finish reason"),
        ("generate", "abort", "aborted", "exceeds the maximum"),
        ("chat", "307", "http_307", "http://127.0.0.1:9/elsewhere"),
        ("generate", "json", "server_error", "does not stream"),
    ],
)
def test_an_error_inside_an_answer_is_an_error(mock, api, fault, kind, why):
    server = mock(fault=fault)
    (reply,) = ask(server.url, api, count=6)
    assert reply.error == kind
    assert why in reply.detail


@pytest.mark.parametrize("gzip", ["asked", "always"])
def test_compressed_streams(mock, gzip):
    server = mock(gzip=gzip)
    (reply,) = ask(server.url, "completions", count=6)
    assert reply.error is None, reply.detail
    assert reply.completion_tokens == 6


def test_a_byte_order_mark_costs_no_token(mock):
    server = mock(ttft=0.03, bom=True, itl=0.1)
    (reply,) = ask(server.url, count=4)
    assert reply.times[0] - reply.headers < 0.1
    assert reply.counts[-1] == 4


def test_tokens_of_one_read_came_at_one_time(mock):
    """Four events in one write, 20 ms a token: no gap of 0, and the gaps add up to the stream's length."""
    server = mock(batch=4, itl=0.02)
    (reply,) = ask(server.url, "completions", count=12)
    sent = drive.InFlight(0, 0, turn=drive.Turn(ids=None, output_len=12), due=0.0, prompt=3, cached=0, reply=reply)
    record = sent.record(reply.dispatched)
    assert set(reply.counts) <= {4, 8, 12}
    assert min(record.gaps) > 0.01
    assert sum(g * n for g, n in zip(record.gaps, record.gap_tokens, strict=True)) == pytest.approx(
        record.last - record.first
    )


def test_tokens_without_text_are_tokens(mock):
    """Five tokens of half characters before the first text: the first of them is the first token."""
    server = mock(ttft=0.05, itl=0.05, silent=5)
    (reply,) = ask(server.url, "completions", count=8)
    assert reply.counts[-1] == 8
    assert reply.exact
    assert 0.04 < reply.times[0] - reply.headers < 0.2


def test_half_a_character_in_a_reason_can_be_written(mock):
    (reply,) = ask(mock(fault="error_half").url, count=4)
    sent = drive.InFlight(0, 0, turn=drive.Turn(ids=None, output_len=4), due=0.0, prompt=3, cached=0, reply=reply)
    assert json.loads(sent.record(reply.dispatched).model_dump_json())["detail"] == "half \N{REPLACEMENT CHARACTER}"


def test_a_total_beyond_what_was_seen_is_not_exact():
    reply = replies.Reply(times=[1.0, 2.0], counts=[4, 8], completion_tokens=10, finish="stop")
    replies.finish(reply, ended=True, pending=False)
    assert not reply.exact
    assert reply.counts[-1] == 10


def test_mirrored_reasoning_is_one_text(mock):
    server = mock(reasoning=3, mirror=True, answer="abcdef")
    (reply,) = ask(server.url, "chat", count=6)
    assert reply.text == "abcdef"


def test_without_usage_there_are_no_token_figures(mocks, tmp_path):
    mocks[0].script(usage=False, chunk=4)
    assert main(["run", mocks[0].url, *SMALL, "--api", "completions", "--out", str(tmp_path)]) == OK
    seen = figures(tmp_path)
    assert "ttft_p50" in seen
    assert not any(name.startswith(("tpot", "itl", "output_")) for name in seen)
    assert any("no usage" in note for note in results(tmp_path)["arms"][0]["notes"])
    assert (tmp_path / "report.html").exists()


def test_tokens_of_one_read_have_no_time_between_them(mocks, tmp_path):
    """A proxy holds all tokens back: no TPOT of 0; a limit on TPOT is judged by the longest that it can have been."""
    mocks[0].script(ttft=0.05, batch=99)
    for limit, share in ((1.0, 1.0), (0.001, 0.0)):
        (tmp_path / "slo.toml").write_text(f"tpot = {limit}")
        out = tmp_path / str(limit)
        slo = ["--slo", str(tmp_path / "slo.toml"), "--out", str(out)]
        assert main(["run", mocks[0].url, *SMALL, "--api", "completions", *slo]) == OK
        seen = figures(out)
        assert not any(name.startswith(("tpot", "itl")) for name in seen)
        assert seen["slo_share"] == share
        assert any("4 answers of several tokens came in one read" in note for note in results(out)["arms"][0]["notes"])


def test_a_limit_that_cannot_be_judged_is_missed(mocks, tmp_path):
    mocks[0].script(usage=False)
    (tmp_path / "slo.toml").write_text("tpot = 9.0")
    slo = ["--slo", str(tmp_path / "slo.toml"), "--out", str(tmp_path / "out")]
    assert main(["run", mocks[0].url, *SMALL, "--api", "completions", *slo]) == OK
    assert figures(tmp_path / "out")["slo_share"] == 0


def test_a_block_without_requests_is_no_result(mocks, tmp_path):
    mocks[0].script()
    words = [*SMALL, "--arrival", "poisson", "--rate", "0.01", "--duration-s", "0.1", "--out", str(tmp_path)]
    assert main(["run", mocks[0].url, *words]) == INVALID
    assert "no request was due" in results(tmp_path)["verdict"]


def test_long_cumulative_answers_cost_linear_work(monkeypatch):
    """Each event repeats the answer; what is parsed in all stays a small multiple of the last one."""
    parsed = []

    def counting(data: bytes):
        parsed.append(len(data))
        return json.loads(data)

    monkeypatch.setattr(replies, "from_json", counting)
    reader, reply, count = replies.GenerateReader(), replies.Reply(), 6000
    for n in range(1, count + 1):
        finish = {"type": "length", "length": n} if n == count else None
        meta = {"prompt_tokens": 3, "completion_tokens": n, "cached_tokens": 0, "finish_reason": finish}
        data = {"text": 'x"' * n, "output_ids": list(range(n)), "meta_info": meta}
        if n < 10 or n % 50 == 0:
            assert reader.read(replies.Event(b"", json.dumps(data, separators=(",", ":")).encode()), reply)
            reply.token(float(n))
    reader.close(reply)
    replies.finish(reply, ended=True, pending=False)
    assert reply.text == 'x"' * count
    assert reply.output_ids == list(range(count))
    assert reply.counts[-1] == count
    assert sum(parsed) < 20 * replies.SMALL_EVENT + parsed[-1]


def test_one_failed_tokenizer_call_fails_its_conversation_only(mocks, tmp_path):
    """The corpus is the first calls of /tokenize; a later one, between two turns, answers 503."""
    mocks[0].script()
    turns = ["--api", "completions", "--turns", "2", "--turn-len", "64", "--warmup", "0", "--text", "ids"]
    ids = ["--id-range", "100", "350", "--fail-if", "error_rate > 0.2"]
    mocks[0].script(busy_tokenizer=2)
    load = ["--arrival", "constant", "--rate", "50", "--requests", "6"]
    words = [*PATIENT, "--input-len", "1k", "--output-len", "8", *turns, *ids, *load]
    assert main(["run", mocks[0].url, *words, "--out", str(tmp_path)]) == OK
    (unit,) = units(tmp_path)
    assert unit["errors"] == {"control_call": 1}
    assert sum(r["error"] is None for r in unit["records"]) == 11
    assert "/tokenize" in next(r["detail"] for r in unit["records"] if r["error"])


def test_captured_graphs_are_no_routed_calls(mocks, tmp_path):
    mocks[0].script(misa="misa", misa_calls=False, captured=True)
    assert main(["run", mocks[0].url, *SMALL, "--expect", "hisa", "--out", str(tmp_path)]) == INVALID
    assert "hisa did not run" in results(tmp_path)["verdict"]
    assert main(["run", mocks[0].url, *SMALL, "--expect", "misa-hisa", "--out", str(tmp_path / "2")]) == INVALID


def info(policy: dict[str, str], **more: object) -> dict:
    return {"internal_states": [{"misa": {"enabled": True, "policy": policy, **more}}]}


@pytest.mark.parametrize("name", [n for n, config in PRESETS.items() if config.active])
def test_a_preset_is_what_its_own_server_runs(name):
    policy = {phase: PRESETS[name].policy(phase).name for phase in PHASES}
    assert selection.problem(name, info(policy)) is None
    assert selection.problem("dsa", info(policy)) is not None
    wrong = info({"prefill": "other", "decode": "other"})
    assert "other in prefill" in selection.problem(name, wrong)


def test_replays_and_ungated_captures_are_routed_calls():
    policy = {"prefill": "misa", "decode": "hisa"}
    before = {"prefill.misa": 5, "prefill.dsa": 1, "decode.captured:hisa": 9, "replay.hisa": 4}
    after = {**before, "prefill.misa": 8, "prefill.dsa": 99, "replay.hisa": 6}
    replayed = info(policy, min_len={"decode": 32768}, replays={"hisa": 6})
    assert selection.routed("misa-hisa", replayed, before, after) == {"decode": 2, "prefill": 3}
    assert selection.routed("hisa", replayed, before, after) == {"decode": 2}
    ungated = info(policy, min_len={"decode": 0}, replays={})
    assert selection.routed("hisa", ungated, before, before)["decode"] == 9
    for gate in ({"min_len": {"decode": 64}}, {"min_len": {"decode": 0}, "min_tokens": 10}):
        assert selection.routed("hisa", info(policy, replays={}, **gate), before, before)["decode"] == 0


def test_a_server_that_restarts_is_waited_for_and_its_block_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "BACK_S", 200.0)
    port = free_port()
    first = MockProcess("--ttft", "0.2", port=port)
    second: list[MockProcess] = []
    measured = threading.Event()

    def restart() -> None:
        time.sleep(2.0)
        first.stop()
        time.sleep(1.0)
        second.append(MockProcess("--ttft", "0.02", port=port))
        measured.wait()  # a server ends with the thread that started it

    restarting = threading.Thread(target=restart)
    restarting.start()
    words = [*PATIENT, "--input-len", "1k", "--output-len", "4", "--requests", "20", "--warmup", "1"]
    code = main(["run", first.url, *words, "--out", str(tmp_path)])
    measured.set()
    second[0].stop()
    restarting.join()
    assert code == OK
    (unit,) = units(tmp_path)
    assert unit["errors"] == {}
    assert any("measured again" in note for note in unit["notes"])


def test_a_server_that_goes_away_in_the_warm_up_is_waited_for():
    url = f"http://127.0.0.1:{free_port()}"
    cell = Cell.of(Workload(text="ids", input_len="64"), Load())
    encoder = Encoder(Control(url, Access(), Keys()), Protocol(), cell.workload)
    preparation = Preparation(cell, encoder, drive.Route(url, "generate", Bounds(), {}, None, 1), "never")
    with pytest.raises(ServerGoneError):
        preparation.warm_up(source_of(cell.workload, 64, encoder.control.tokenize), 0, lambda *_: None)


def test_a_cold_server_does_not_spread_the_clients(mock):
    """They start spread over the time of one request, and not over that of the kernels compiled for the first ones."""
    server = mock(ttft=0.02, block_first=1.0)
    cell = Cell.of(Workload(text="ids", input_len="64", output_len="2"), Load(concurrency=4))
    encoder = Encoder(Control(server.url, Access(), Keys()), Protocol(), cell.workload)
    preparation = Preparation(cell, encoder, drive.Route(server.url, "generate", Bounds(), {}, None, 1), "never")
    assert preparation.warm_up(source_of(cell.workload, 64, encoder.control.tokenize), 0, lambda *_: None) < 0.2
    assert len(server.sent()) == 4


@pytest.mark.parametrize(("ramp_s", "told"), [("2", True), ("0.02", False)])
def test_a_load_that_is_over_before_its_last_client_starts_is_told(mock, tmp_path, ramp_s, told):
    words = [*SMALL, "--concurrency", "4", "--requests", "24", "--ramp-s", ramp_s]
    assert main(["run", mock().url, *words, "--out", str(tmp_path)]) == OK
    (unit,) = units(tmp_path)
    assert any("before all 4 clients had started, after 1.5 s" in note for note in unit["notes"]) == told


def test_a_server_that_stays_away_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(servers, "BACK_S", 1.0)
    server = MockProcess("--ttft", "0.1")
    threading.Timer(3.0, server.stop).start()
    words = [*PATIENT, "--input-len", "1k", "--output-len", "4", "--requests", "8", "--warmup", "1", "--blocks", "50"]
    assert main(["run", server.url, *words, "--out", str(tmp_path)]) == USAGE
    assert "come back, got [Errno 111] Connection refused; what was" in capsys.readouterr().err
    assert 0 < len(units(tmp_path)) < 50


def test_the_help_tells_how_long_a_server_is_waited_for():
    assert f"{servers.BACK_S:.0f} at most" in str(Serving.model_fields["start_timeout_s"].description)


def test_nobody_at_the_url_is_told_at_once(tmp_path, capsys):
    start = time.monotonic()
    assert main(["run", f"http://127.0.0.1:{free_port()}", *SMALL, "--out", str(tmp_path)]) == USAGE
    assert time.monotonic() - start < 10
    assert capsys.readouterr().err.rstrip().endswith("Connection refused; start it")


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    assert main(["run", nobody, *SMALL, "--out", str(tmp_path / "load")]) == USAGE
    assert quality(["needles", nobody, "--out", str(tmp_path / "quality")]) == USAGE
    assert list(tmp_path.iterdir()) == []


def test_failed_requests_fail_the_default_gate(mocks, tmp_path, capsys):
    mocks[0].script(fault="500", fault_every=2)
    assert main(["run", mocks[0].url, *SMALL, "--warmup", "0", "--out", str(tmp_path)]) == GATE_FAILED
    told = capsys.readouterr().out
    assert "2 × http_500: no" in told
    assert "http_500" in (tmp_path / "report.html").read_text()


def test_no_verdict_over_survivors(mocks, tmp_path):
    """A fails more and answers slower: its survivors say nothing."""
    mocks[0].script(ttft=0.03, fault="500", fault_every=4)
    mocks[1].script(ttft=0.01)
    arms = ["--a", mocks[0].url, "--b", mocks[1].url, "--blocks", "5", "--warmup", "0"]
    assert main(["ab", *arms, *SMALL, *arms, "--out", str(tmp_path)]) == OK
    assert results(tmp_path)["verdict"].startswith("No verdict: at 1k · concurrency 1 A failed 25.0%")


def test_a_duration_lasts(mocks, tmp_path):
    mocks[0].script(ttft=0.01, itl=0.0)
    words = [*PATIENT, "--input-len", "1k", "--output-len", "2", "--warmup", "1", "--duration-s", "1.5"]
    for load in (["--concurrency", "2"], ["--arrival", "constant", "--rate", "40"]):
        out = tmp_path / load[-1]
        assert main(["run", mocks[0].url, *words, *load, "--out", str(out)]) == OK
        (unit,) = units(out)
        dispatched = [r["dispatched"] for r in unit["records"]]
        assert 1.2 < max(dispatched) < 1.7
        pairs = [r["pair"] for r in unit["records"]]
        assert len(pairs) == len(set(pairs)) > 40


def test_an_open_supply_serves_everybody():
    """Many clients wait for one batch in the making; none is sent home before the batches end."""
    batches = iter([[(None, b"x")] * 3 for _ in range(5)])

    async def drain() -> list[int]:
        supply, taken = drive.Supply(batches, low=1), []

        async def client(number: int) -> None:
            while await supply.take() is not None:
                taken.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(client(i) for i in range(7)))
        return taken

    assert len(asyncio.run(drain())) == 15


def test_slo_by_context(tmp_path):
    from sglang_misa.bench.load.plan import Slo

    path = tmp_path / "slo.toml"
    path.write_text("ttft = 5.0\ntpot = 0.05\n[contexts.128k]\nttft = 10.0\n[contexts.32k]\nttft = 2.0\n")
    slo = Slo.read(path)

    def keeps(prompt: int, ttft: float) -> bool:
        return record(0, ttft).model_copy(update={"prompt_wanted": prompt}).keeps(slo)

    assert keeps(16_000, 1.9)
    assert not keeps(16_000, 2.1)
    assert keeps(100_000, 9.9)
    assert not keeps(100_000, 10.1)
    assert keeps(500_000, 4.9)
    assert not keeps(500_000, 5.1)


def test_the_disk_is_full(mocks, tmp_path, capsys, monkeypatch):
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name.endswith(".json.part") and self.parent.name == "units":
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    mocks[0].script()
    assert main(["run", mocks[0].url, *SMALL, "--out", str(tmp_path)]) == USAGE
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))
