"""Control endpoints of a server that is not what it should be: what a stranger answers there is no reason to crash."""

from __future__ import annotations

import random
import socketserver
import threading
import time

import pytest
import requests
from dripping import dripping
from load.helpers import PATIENT, results, units

from sglang_misa.bench.load import selection
from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Access, LoadError
from sglang_misa.bench.load.shell import OK, USAGE

FEW = [*PATIENT, "--input-len", "64", "--output-len", "2", "--requests", "2", "--warmup", "1"]
IDS = ["--text", "ids"]
JUNK_RANK = {"misa": {"enabled": True, "policy": "x", "calls": [1], "replays": 7, "min_len": 3}}
ODD_CALLS = {"misa": {"enabled": True, "policy": {"prefill": "misa"}, "calls": {"prefill": {"misa": 1.5}}}}


@pytest.mark.parametrize(
    "info",
    [
        [1],
        {"page_size": "many", "internal_states": "none"},
        {"page_size": -5, "internal_states": {"a": 1}},
        {"page_size": None, "internal_states": [None, 7, {"misa": []}]},
        {"internal_states": [JUNK_RANK]},
        {"internal_states": [ODD_CALLS]},
    ],
)
def test_facts_that_are_none_are_left_out(mock, info):
    server = mock(answers={"/server_info": info, "/v1/models": {"data": [None, {"id": 7}]}})
    control = Control(server.url, Access(), Keys())
    told = control.refresh()
    assert control.page_size == 1
    assert control.model == "default"
    assert selection.calls(told) == {}
    assert not any(selection.routed("misa", told, {}, {}).values())


@pytest.mark.parametrize(
    ("path", "answer", "words", "why"),
    [
        (
            "/server_info",
            {"internal_states": [JUNK_RANK]},
            [*IDS, "--expect", "misa"],
            "expected misa, got no policies",
        ),
        ("/tokenize", {"tokens": ["a"]}, [], "expected token ids"),
        ("/tokenize", {"tokens": [2**40]}, [], "expected token ids"),
        ("/tokenize", ["a"], [], "expected token ids"),
        ("/tokenize", {"count": "many"}, [*IDS, "--api", "chat"], "expected a chat's token count"),
        ("/detokenize", [1], [*IDS, "--api", "chat"], "expected text"),
        ("/health", 302, IDS, "got a redirect"),
    ],
)
def test_an_odd_answer_is_told(mock, tmp_path, capsys, path, answer, words, why):
    server = mock(answers={path: answer})
    assert main(["run", server.url, *FEW, *words, "--out", str(tmp_path)]) == USAGE
    assert why in " ".join(capsys.readouterr().err.split())


def test_a_page_of_metrics_that_is_none_is_empty(monkeypatch):
    """Whatever a server writes there: no request is lost for it."""
    page = list('# TYPE sglang:a counter\nsglang:a_total{x="y",z="1"} 3.0 17\nsglang:num_queue_reqs{x="1"} 4 17\n')
    control, rng = Control("http://127.0.0.1:1", Access(), Keys()), random.Random(0)
    for _ in range(2000):
        mangled = page.copy()
        for _ in range(rng.randint(0, 4)):
            mangled[rng.randrange(len(page))] = rng.choice([*'{}"\\ \n#,=1e+-N', ""])
        monkeypatch.setattr(control, "_metrics", lambda _, page=mangled: "".join(page).encode())
        assert all(name.startswith("sglang:") for name in control.metrics())
        assert control.gauges().keys() <= {"queued"}
    monkeypatch.setattr(control, "_metrics", lambda _: "".join(page).encode())
    assert control.gauges() == {"queued": 4.0}


def test_requests_of_others_are_told(mock, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang_misa.bench.load.control.FLUSH_WAIT_S", 0.1)
    server = mock(others=2)
    assert main(["run", server.url, *FEW, *IDS, "--out", str(tmp_path)]) == OK
    assert any("requests of others" in note for note in results(tmp_path)["arms"][0]["notes"])


def test_a_server_without_metrics_is_asked_once(mock, tmp_path):
    server = mock(answers={"/metrics": 404}, ttft=0.1)
    server.asked()
    assert main(["run", server.url, *FEW, *IDS, "--blocks", "2", "--sample-s", "0.02", "--out", str(tmp_path)]) == OK
    assert server.asked()["/metrics"] == 1
    assert all("no /metrics" in " ".join(unit["notes"]) for unit in units(tmp_path))
    assert len([note for note in results(tmp_path)["arms"][0]["notes"] if "no /metrics" in note]) == 1


@pytest.mark.parametrize("text", ["", "two words", "line\nbreak", "clé", "nul\x00l"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(LoadError, match="expected one word of printable ASCII") as caught:
        Keys.read(Access(api_key_file=str(tmp_path / "key")))
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("source", ["api_key_file", "api_key_env", "admin_key_file"])
def test_an_empty_name_of_a_key_is_no_choice_of_none(source):
    with pytest.raises(LoadError, match="expected a name, got an empty one"):
        Keys.read(Access(**{source: ""}))


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"


@pytest.mark.parametrize("said", [b"", b"\x1b[31m" + bytes(5000), HALF], ids=["nothing", "no HTTP", "half"])
def test_a_tokenizer_that_hangs_up_or_speaks_no_http(said, tmp_path, capsys):
    class Peer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = self.rfile.readline()
            while self.rfile.readline().strip():  # to the end of its headers
                pass
            self.wfile.write(said if b"/tokenize" in asked else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Peer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert main(["run", url, *FEW, "--out", str(tmp_path)]) == USAGE
        server.shutdown()
    told = capsys.readouterr().err
    assert f"{url}/tokenize: expected token ids, got " in told
    assert len(told) < 1000
    assert told.strip().isprintable()


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nX: ", HALF.replace(b"9", b"999")], ids=["headers", "body"])
def test_a_server_that_sends_byte_by_byte_has_no_more_time(said, monkeypatch):
    """A read never waits for long there, so only a limit of the whole call ends it."""
    limit = 0.5
    monkeypatch.setattr("sglang_misa.bench.load.control.HEALTH_S", limit)
    monkeypatch.setattr("sglang_misa.bench.load.control.GAUGE_S", limit)
    with dripping(said) as url:
        control = Control(url, Access(), Keys())
        begin = time.monotonic()
        assert not control.healthy()
        assert control.last_error == "no whole answer within 0.5 s"
        assert control.gauges() == {}
        with pytest.raises(requests.Timeout):
            control.call("GET", "/server_info", limit_s=limit)
        assert time.monotonic() - begin < 3 * limit + 5.0
