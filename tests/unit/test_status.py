"""The status command against a server of HTTP that answers as SGLang's /server_info does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dripping import dripping

from sglang_misa import status
from sglang_misa.config import PRESETS
from sglang_misa.metrics import UNROUTED_STEPS, Recorder
from sglang_misa.policy import STOCK

KEY = "status-test-key"


@pytest.fixture
def serve():
    """Starts a server that gives this answer to whoever brings the key, or a redirect; returns its address."""
    servers = []

    def start(answer, location=None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                known = self.path == "/server_info" and self.headers["Authorization"] == f"Bearer {KEY}"
                start.keys.append(self.headers["Authorization"])
                self.send_response(302 if location else 200 if known else 401)
                if location:
                    self.send_header("Location", location)
                self.end_headers()
                self.wfile.write(answer if known else b"")

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    start.keys = []  # that came, to any of the servers
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY)
    return str(file)


def recorder(verified=True):
    result = Recorder()
    result.armed(PRESETS["misa-hisa"], rank=0, ranks=8, sglang="0.5.23", verified=verified)
    result.ran("prefill", "misa")
    result.declined("prefill", "under-min-len")
    result.replayed("hisa")
    result.audited("prefill", 3, 0.9376, 0.9, 0.99)
    return result


def info(*recorders):
    return json.dumps({"internal_states": [{"misa": each.status()} for each in recorders]}).encode()


def test_every_count_is_in_the_table(serve, key_file, capsys):
    url = serve(info(recorder(), recorder(verified=False)))
    assert status.main([url, "--key-file", key_file]) == 0
    first, second = capsys.readouterr().out.split("sglang-misa 0")[1:]
    words = ("SGLang 0.5.23", "misa-hisa", "rank 0 of 8", "misa 1", "hisa 1", "under-min-len", "0.938", "32768 tokens")
    assert all(word in first for word in words), first
    assert "not verified" in second
    assert "not verified" not in first


def test_json_is_what_the_server_told(serve, key_file, capsys):
    one = recorder()
    assert status.main([serve(info(one)), "--json", "--key-file", key_file]) == 0
    assert json.loads(capsys.readouterr().out) == [one.status()]


def test_a_replica_that_is_off_or_does_not_select_is_told(serve, key_file, capsys):
    idle = recorder()
    for _ in range(UNROUTED_STEPS + 2):
        idle._calls["prefill"].clear()
        idle.stepped("prefill")
    assert status.main([serve(info(idle)), "--key-file", key_file]) == status.NOT_AS_ASKED
    assert "WARNING: prefill is not selected by misa" in capsys.readouterr().out
    off = json.dumps({"internal_states": [{}]}).encode()
    assert status.main([serve(off), "--key-file", key_file]) == status.NOT_AS_ASKED
    assert "sglang-misa is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phase", "where", "what"), [("prefill", "3", "prefill (layers 3) is back"), ("decode", "all", "all of decode is")]
)
def test_what_sank_to_stock_is_told_until_it_is_back(serve, key_file, capsys, phase, where, what):
    one, own = recorder(), PRESETS["misa-hisa"].policy(phase)
    for rung, policy, end in ((1, STOCK, status.NOT_AS_ASKED), (0, own, 0)):
        one.moved(phase, where, rung, policy)
        assert status.main([serve(info(recorder(), one)), "--key-file", key_file]) == end
        assert (f"WARNING: {what}" in capsys.readouterr().out) == bool(end)


@pytest.mark.parametrize("preset", ["hisa", "faithful"])
def test_the_gate_of_a_step_is_told(preset):
    one, decode = Recorder(), PRESETS[preset].decode
    one.armed(PRESETS[preset], rank=0, ranks=1, sglang="0.5.23", verified=True)
    row = next(line for line in status.text(one.status()).splitlines() if line.startswith("decode"))
    assert f"{decode.min_len} tokens" in row
    for least, what in ((decode.min_rows, "rows"), (decode.min_tokens, "tokens beyond them")):
        assert (f"{least} {what}" in row) == (least > 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "got no JSON"),
        (b"\xff\xfe", "got no JSON"),
        (b"[" * 100000, "got no JSON"),
        (b"{}", "expected SGLang's /server_info"),
        (b"[]", "expected SGLang's /server_info"),
        (b'{"internal_states": [7]}', "expected SGLang's /server_info"),
        (b'{"internal_states": []}', "expected a replica or more"),
        (b'{"internal_states": [{"misa": {"enabled": true}}]}', "expected the status of sglang-misa"),
        (b'{"internal_states": [{"misa": "on"}]}', "expected the status of sglang-misa"),
    ],
)
def test_another_server_is_named(serve, key_file, capsys, answer, words):
    assert status.main([serve(answer), "--key-file", key_file]) == status.UNKNOWN
    assert words in capsys.readouterr().err


def test_a_key_goes_to_nobody_but_the_address(serve, key_file, capsys, monkeypatch):
    """Neither along with a redirect nor through a proxy."""
    elsewhere = serve(info(recorder()))
    monkeypatch.setenv("http_proxy", elsewhere)
    assert status.main([serve(b"", f"{elsewhere}/server_info"), "--key-file", key_file]) == status.UNKNOWN
    assert "got 302 Found" in capsys.readouterr().err
    assert len(serve.keys) == 1


@pytest.mark.parametrize(("text", "why"), [("two words", "got 2 words"), ("clé", "ASCII"), ("a\x00b", "ASCII")])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(serve, tmp_path, capsys, text, why):
    (tmp_path / "key").write_text(text)
    assert status.main([serve(b"{}"), "--key-file", str(tmp_path / "key")]) == status.UNKNOWN
    told = capsys.readouterr().err
    assert why in told
    assert text not in told


def test_no_server_no_key_and_no_address(serve, capsys):
    assert status.main([serve(b"{}")]) == status.UNKNOWN
    assert "got 401 Unauthorized; add --key-file" in capsys.readouterr().err
    for url in ("http://127.0.0.1:1", "localhost:30000", "what", "file:///etc", "http://[::1", "http://a b/"):
        assert status.main([url]) == status.UNKNOWN
        assert f"expected a server at {url}" in capsys.readouterr().err
    assert status.main(["http://127.0.0.1:1", "--key-file", "/no/such/key"]) == status.UNKNOWN
    assert "--key-file: expected a readable text file" in capsys.readouterr().err


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_an_answer_without_an_end_is_not_waited_for(said, capsys, monkeypatch):
    monkeypatch.setattr(status, "TIMEOUT", 0.5)
    with dripping(said) as url:
        assert status.main([url]) == status.UNKNOWN
    assert "no whole answer within 0.5 s" in capsys.readouterr().err
