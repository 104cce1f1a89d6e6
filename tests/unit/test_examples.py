"""Examples run as their page says."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
STATUS = {"enabled": True, "min_rows": 1, "min_tokens": 0, "min_len": {"prefill": 100}}


def test_one_kernel_runs_without_a_gpu_by_the_reference():
    run = subprocess.run([sys.executable, EXAMPLES / "one_kernel.py"], capture_output=True, text=True, check=True)
    assert "of DSA's tokens are kept" in run.stdout


@pytest.mark.parametrize(
    ("states", "answer", "told"),
    [
        ([{"misa": {"enabled": True}}], 200, "expected the status of sglang-misa"),
        ([{"misa": "x"}], 200, "expected the status of sglang-misa"),
        (
            [{"misa": STATUS}],
            400,
            "an answer to a prompt of 356 tokens, which passes the gate, got 400: too long",
        ),
    ],
)
def test_a_proof_that_cannot_be_had_has_a_sentence(states, answer, told):
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(200, json.dumps({"internal_states": states}).encode())

        def do_POST(self):
            self.say(answer, b"too long")

        def say(self, code, body):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        run = subprocess.run([sys.executable, EXAMPLES / "prove_it_is_on.py", url], capture_output=True, text=True)
        server.shutdown()
    assert (run.returncode, "Traceback" in run.stderr) == (2, False)
    assert told in run.stderr


def test_the_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f"]({file.name})" not in page] == []
