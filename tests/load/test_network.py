"""What a network, a disk and an operating system do to a run, on real sockets, files and processes."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from load.helpers import SMALL, MockProcess, figures, units

from sglang_misa.bench.load.cli import main
from sglang_misa.bench.load.shell import INVALID, OK, USAGE

PROGRAM = [sys.executable, "-m", "sglang_misa.bench.load"]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    pem = tmp_path_factory.mktemp("tls") / "self.pem"
    words = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", str(pem), "-out", str(pem.with_suffix(".crt"))]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *words, *files]
    subprocess.run(command, check=True, capture_output=True)
    pem.write_text(pem.read_text() + pem.with_suffix(".crt").read_text())
    return pem


def test_a_certificate_that_signs_itself(certificate, tmp_path, capsys):
    """Refused at once with the way out; with --ca-file measured, by workers too."""
    server = MockProcess("--ttft", "0.01", certificate=certificate)
    words = ["run", server.url, *SMALL, "--concurrency", "2", "--out", str(tmp_path)]
    assert main(words) == USAGE
    assert "expected a trusted TLS certificate" in " ".join((told := capsys.readouterr().err).split())
    assert "--ca-file" in told
    authority = ["--ca-file", str(certificate.with_suffix(".crt"))]
    assert main([*words, *authority, "--workers", "2"]) == OK
    server.stop()
    assert figures(tmp_path)["errors"] == 0


def test_a_server_without_tls(mocks, tmp_path, capsys):
    assert main(["run", mocks[0].url.replace("http:", "https:"), *SMALL, "--out", str(tmp_path)]) == USAGE
    assert "expected a server that speaks TLS" in " ".join(capsys.readouterr().err.split())


def test_a_client_that_may_open_no_more_files(mocks, tmp_path):
    """The client's own limit: refused before the start where it is known, invalid where the load grew over it."""
    mocks[0].script(ttft=1.0)
    ids = ["--text", "ids", "--id-range", "100", "350"]
    words = [*PROGRAM, "run", mocks[0].url, *SMALL, *ids, "--warmup", "0", "--out", str(tmp_path)]
    for load, code, why in (
        (["--concurrency", "50"], USAGE, "at most 36 clients a process"),
        (["--arrival", "constant", "--rate", "400", "--requests", "120"], INVALID, "no room for another connection"),
    ):
        command = f"ulimit -n 100; {shlex.join([*words, *load])}"
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S)
        told = " ".join((ended.stdout + ended.stderr).split())
        assert (ended.returncode, why in told) == (code, True), told


def test_a_terminal_that_takes_nothing_costs_no_run(mocks, tmp_path):
    """A full disk behind the standard output, and letters that its encoding lacks; or no standard output at all."""
    mocks[0].script(ttft=0.01)
    words = [*PROGRAM, "run", mocks[0].url, *SMALL]
    for name, line in (("full", "PYTHONIOENCODING=ascii {} > /dev/full"), ("closed", "{} >&-")):
        command = line.format(shlex.join([*words, "--out", str(tmp_path / name)]))
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S)
        assert (ended.returncode, ended.stderr) == (OK, "")
        assert (tmp_path / name / "report.html").exists()


def test_ipv6(tmp_path):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("needs IPv6 on loopback")
    server = MockProcess("--ttft", "0.01", host="::1")
    assert "[::1]" in server.url
    assert main(["run", server.url, *SMALL, "--out", str(tmp_path)]) == OK
    server.stop()
    assert figures(tmp_path)["errors"] == 0


def test_a_disk_that_fills(mocks, tmp_path):
    """No file may be longer than 20 KiB: units fit, plots do not. One sentence, and `resume` goes on from there."""
    mocks[0].script(ttft=0.01)
    out = tmp_path / "out"
    words = shlex.join([*PROGRAM, "run", mocks[0].url, *SMALL, "--blocks", "2", "--out", str(out)])
    ended = subprocess.run(["bash", "-c", f"ulimit -f 20; {words}"], capture_output=True, text=True, timeout=LIMIT_S)
    told = " ".join(ended.stderr.split())
    assert ended.returncode == USAGE, told
    assert "expected a file with room to write, got File too large" in told
    assert "Traceback" not in told
    before = [u["started"] for u in units(out)]
    assert len(before) == 2
    assert not list(out.rglob("*.part"))
    assert main(["resume", str(out)]) == OK
    assert [u["started"] for u in units(out)] == before


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_run_goes_on(mocks, tmp_path, workers):
    """kill -9 in the middle: every block that was told as finished is kept, and nothing of the harness stays."""
    mocks[0].script(ttft=0.1)
    load = ["--blocks", "4", "--concurrency", "2", "--workers", workers]
    words = ["run", mocks[0].url, *SMALL, *load, "--out", str(tmp_path)]
    running = subprocess.Popen([*PROGRAM, *words], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + LIMIT_S
    while len(list((tmp_path / "units").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.wait()
    before = {u["block"]: u["started"] for u in units(tmp_path)}
    assert 2 <= len(before) < 4
    while (left := _session(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert main(["resume", str(tmp_path)]) == OK
    after = {u["block"]: u["started"] for u in units(tmp_path)}
    assert len(after) == 4
    assert before.items() <= after.items()


def _session(leader: int) -> list[str]:
    """Processes of the session of `leader`, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found += [path.parent.name] if int(session) == leader and state != "Z" else []
    return found
