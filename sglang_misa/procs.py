"""Child servers: started in a process group of their own, waited for, stopped whole, never left behind.

Between this process and the server stands a supervisor: this file, run as a script. It leads the group and asks the
kernel for SIGHUP when its parent dies (PR_SET_PDEATHSIG), so that even `kill -9` of the parent ends the whole group.
The kernel takes the thread that started the server for the parent: start it from one that lives as long as it should.
Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
GRACE_S = 20.0  # between SIGTERM and SIGKILL
POLL_S = 0.25  # between two looks whether a server is ready
STOP_POLL_S = 0.02  # and whether its group is gone
HEALTH_S = 20.0  # what SGLang's /health may take: it generates a token
TAIL_LINES, TAIL_BYTES = 15, 64 * 1024  # of a log's end
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Under those that Linux gives to who asks for any: SGLang takes dozens of such while it loads, and binds its own last.
PORTS = range(11000, 19000)


class ServerError(RuntimeError):
    """The server ended, or was not ready in time; the end of its log is in the message."""


def free_port() -> int:
    """A TCP port that is free now. Raises ServerError where all of PORTS are taken."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ServerError(f"expected a free port from {PORTS.start} to {PORTS.stop - 1}, got none; end what takes them")


def is_healthy(port: int) -> bool:
    """Whether a server on this machine answers /health with 200."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=HEALTH_S)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


class ServerProcess:
    """One server as a child. A context manager: leaving it stops the server.

    command: words of the command line. log: file that its output is appended to. environ: default this process's own.
    erase: applied to each line before it is written, to keep secrets out. Raises OSError where there is no command.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environ: Mapping[str, str] | None = None,
        erase: Callable[[str], str] | None = None,
    ):
        self.log = log
        environ = os.environ if environ is None else environ
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            raise FileNotFoundError(2, "no such command", command[0])
        self._pump: threading.Thread | None = None
        with log.open("ab") as sink:
            self._start = sink.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(os.getpid()), *command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=sink if erase is None else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if erase is not None:
            self._pump = threading.Thread(target=self._copy, args=(erase,), daemon=True)
            self._pump.start()

    def _copy(self, erase: Callable[[str], str]) -> None:
        """Until the server ends, also where the disk is full: a server that nobody reads would wait for ever."""
        assert self._process.stdout is not None
        with self.log.open("ab", buffering=0) as file:
            for raw in self._process.stdout:
                with contextlib.suppress(OSError):
                    file.write(f"{erase(raw.decode('utf-8', 'replace').rstrip())}\n".encode())

    @property
    def group(self) -> int:
        """Id of the process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The command's exit status (128 + n for signal n), None while it runs."""
        return self._process.poll()

    def tail(self) -> list[str]:
        """Last lines that this server wrote to its log."""
        with self.log.open("rb") as file:
            file.seek(max(self._start, file.seek(0, os.SEEK_END) - TAIL_BYTES))  # a long one is asked for often
            return file.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]

    def wait_ready(
        self, ready: Callable[[], bool], limit_s: float, progress: Callable[[str, float], None] | None = None
    ) -> float:
        """Poll `ready` until it holds; returns the seconds. `progress` hears the log's last line and the time so far.

        Raises ServerError when the server ends first, or `limit_s` passes.
        """
        begin = time.monotonic()
        while not ready():
            waited, tail = time.monotonic() - begin, self.tail()
            if self.exit_code is not None:
                if self._pump is not None:
                    self._pump.join(GRACE_S)
                ended = "\n  ".join(self.tail())
                raise ServerError(f"expected a server, got exit code {self.exit_code}; last lines:\n  {ended}")
            if waited > limit_s:
                last = "\n  ".join(tail)
                raise ServerError(f"expected a server within {limit_s:.0f} s, got none; last lines:\n  {last}")
            if progress is not None:
                progress(tail[-1] if tail else "starting", waited)
            time.sleep(POLL_S)
        return time.monotonic() - begin

    def wait(self, limit_s: float | None = None) -> int:
        """Exit status, once the server has ended. Raises subprocess.TimeoutExpired after `limit_s`."""
        return self._process.wait(limit_s)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """SIGTERM to the group, SIGKILL after `grace_s` to what is left of it; returns when the group is gone."""
        deadline = time.monotonic() + grace_s
        _signal_group(self.group, signal.SIGTERM)
        while self._alive() and time.monotonic() < deadline:
            time.sleep(STOP_POLL_S)
        _signal_group(self.group, signal.SIGKILL)
        self._process.wait()
        while self._alive():
            time.sleep(STOP_POLL_S)
        if self._pump is not None:
            self._pump.join(grace_s)

    def _alive(self) -> bool:
        self._process.poll()
        return _signal_group(self.group, 0)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _signal_group(group: int, number: int) -> bool:
    """Whether the group was there to be signalled."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


class _OrphanedError(Exception):
    """The parent has died."""


def _supervise(parent: int, command: Sequence[str]) -> int:
    """Run `command` in this group until it ends, or until `parent` does: then the group gets SIGTERM, and SIGKILL."""

    def orphaned(*_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise _OrphanedError

    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the whole group: the command answers it
    signal.signal(signal.SIGHUP, orphaned)
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGHUP), 0, 0, 0) != 0 or os.getppid() != parent:
        return 128 + signal.SIGHUP
    try:
        server = subprocess.Popen(command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr)
        return 127
    try:
        status = server.wait()
    except _OrphanedError:
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_S)
        os.killpg(0, signal.SIGKILL)
        raise
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        print("procs: expected a parent's process id and a command; ServerProcess runs this file", file=sys.stderr)
        raise SystemExit(2)
    raise SystemExit(_supervise(int(sys.argv[1]), sys.argv[2:]))
