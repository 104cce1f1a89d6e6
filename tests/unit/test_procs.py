"""Child servers: started, waited for, stopped with all their children, and gone when their parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_misa.procs import ServerError, ServerProcess, free_port

LIMIT_S = 20.0
FAMILY = ["sh", "-c", "echo $$; sleep 600 & sleep 600 & echo up; wait"]  # a shell does not end its children


def gone(group: int) -> bool:
    """Whether no process of the group is left within the limit."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_group_is_stopped_whole(tmp_path: Path) -> None:
    with ServerProcess(FAMILY, tmp_path / "log") as server:
        server.wait_ready(lambda: "up" in server.tail(), LIMIT_S)
        assert server.exit_code is None
    assert gone(server.group)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_group_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    program = (
        "import sys, time; from pathlib import Path; from sglang_misa.procs import ServerProcess\n"
        f"server = ServerProcess({FAMILY!r}, Path({str(log)!r}))\n"
        "server.wait_ready(lambda: 'up' in server.tail(), 20)\n"
        "print(server.group, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    os.killpg(group, 0)  # it runs
    parent.send_signal(number)
    parent.wait(LIMIT_S)
    assert gone(group)


def test_the_end_of_a_dead_servers_log_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of an earlier server\n")
    server = ServerProcess(["sh", "-c", "echo secret=1; exit 4"], log, erase=lambda line: line.replace("1", "***"))
    with pytest.raises(ServerError, match=r"exit code 4.*\n  secret=\*\*\*") as told:
        server.wait_ready(lambda: False, LIMIT_S)
    assert "earlier" not in str(told.value)
    server.stop()


def test_a_server_that_is_never_ready(tmp_path: Path) -> None:
    with (
        ServerProcess(["sleep", "600"], tmp_path / "log") as server,
        pytest.raises(ServerError, match="within 1 s"),
    ):
        server.wait_ready(lambda: False, 1.0)


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        ServerProcess(["no-such-program"], tmp_path / "log")


def test_ports_are_free() -> None:
    """And not of those that Linux by default gives to who asks for any."""
    assert 1024 < free_port() < 32768


def test_a_full_disk_does_not_hold_a_server_up():
    """Its output goes on being read: more than a pipe holds."""
    chatty = [sys.executable, "-c", "for i in range(20_000): print(i, 'words')"]
    with ServerProcess(chatty, Path("/dev/full"), erase=str.upper) as process:
        assert process.wait(30) == 0
