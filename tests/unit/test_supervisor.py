"""A supervised server: what it prints, how it ends, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

PREAMBLE = """
import os, signal, subprocess, sys, time
from sglang_misa import supervisor

def grandchild():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def serve():
    {body}

sys.exit(supervisor.run(serve, ["secret-key"]))
"""


@pytest.fixture
def start():
    """Starts a supervised `serve` with this body, which says so when it is up; killed in the end."""
    processes = []

    def run(body, ignored=(), closed=()):
        code = PREAMBLE.format(body=body.strip().replace("\n", "\n    "))
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: [signal.signal(signum, signal.SIG_IGN) for signum in ignored] + [*map(os.close, closed)],
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def gone(pid):
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_both_streams_are_written_without_the_key(start):
    out, err = start("print('key secret-key')\nprint('secret-key', file=sys.stderr)").communicate()
    assert out == "key ***\n"
    assert err == "***\n"


def test_processes_of_the_server_are_masked_too(start):
    out, _ = start("subprocess.run(['echo', 'secret-key'])").communicate()
    assert out == "***\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('secret-key')", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.killpg(0, signal.SIGKILL)", 137),
        ("os.abort()", 134),
    ],
)
def test_the_status_is_the_servers(start, body, status):
    process = start(body)
    assert "secret-key" not in process.communicate()[1]
    assert process.returncode == status


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_was_asked_for_is_clean(start, signum, end):
    process = start(f"signal.signal({signum:d}, lambda *_: {end})\nprint('up', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signum)
    process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,)])  # the latter in the background of a script
def test_an_interrupt_while_it_starts_is_a_clean_stop_without_a_traceback(start, ignored):
    process = start("print('up', flush=True)\ntry: time.sleep(60)\nfinally: print('swept', flush=True)", ignored)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("swept\n", "")
    assert process.returncode == 0


def test_a_hangup_that_nohup_ignores_stops_nothing(start):
    process = start("print('up', flush=True)\ntime.sleep(1)\nsys.exit(5)", [signal.SIGHUP])
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=10)
    assert process.returncode == 5


def test_a_stop_that_fails_is_not_clean(start):
    process = start("signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\nprint('up', flush=True)\ntime.sleep(60)")
    process.stdout.readline()
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 4


def test_what_the_server_leaves_behind_is_ended(start):
    process = start("print(grandchild().pid, flush=True)")
    left = int(process.stdout.readline())
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert gone(left)


def test_the_server_does_not_outlive_a_killed_parent(start):
    process = start("print(os.getpid(), flush=True)\ntime.sleep(60)")
    server = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    assert gone(server)


def test_a_reader_that_leaves_does_not_end_the_server(start):
    process = start("print('up', flush=True)\ntime.sleep(0.5)\nprint('more', flush=True)\nsys.exit(7)")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(10) == 7


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_closed_ends_no_server(start, closed, tmp_path):
    files = "subprocess.run(['sh', '-c', 'echo more; echo more >&2'], check=True)"
    body = f"print('up')\nprint('up', file=sys.stderr)\n{files}\nopen({str(tmp_path / 'served')!r}, 'w').close()"
    process = start(f"{body}\nsys.exit(7)", closed=closed)
    told = process.communicate(timeout=10)
    assert (process.returncode, (tmp_path / "served").exists()) == (7, True)
    assert told == tuple("" if number in closed else "up\nmore\n" for number in (1, 2))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_there_is_a_server_is_clean(signum):
    code = (
        "import time; from sglang_misa import supervisor\n"
        "with supervisor.stoppable(): print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signum)
        assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 0


def test_a_signal_after_the_servers_end_reaches_nobody():
    """The number of a process that has ended may be another's."""
    code = (
        "import os, signal; from sglang_misa import supervisor\n"
        "status = supervisor.run(lambda: os._exit(0), [])\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(status)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("0\n", "")
