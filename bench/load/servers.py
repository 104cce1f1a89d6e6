"""Servers that the harness starts itself: one process group each, logs kept without keys, stopped by that group."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import Arm, Connection, LoadError

POLL_S = 0.25
TAIL = 15  # log lines shown when a server dies
Progress = Callable[[str, float], None]  # (last log line or state, seconds waited)


class LaunchedServer:
    """The process group of one launch command, its log and its URL."""

    def __init__(self, arm: Arm, log: Path, keys: Keys):
        words = shlex.split(arm.server)
        environment = dict(os.environ)
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        words = [w.replace("{port}", str(_free_port())) if "{port}" in w else w for w in words]
        self.url = f"http://127.0.0.1:{_port(words, arm)}"
        self.tail: deque[str] = deque(maxlen=TAIL)
        try:
            self._process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise LoadError(f"arm {arm.name}: expected a command that starts, got {words[0]!r}: {error}") from None
        self._group = self._process.pid
        self._pump = threading.Thread(target=self._copy_log, args=(log, keys), daemon=True)
        self._pump.start()

    def _copy_log(self, log: Path, keys: Keys) -> None:
        assert self._process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            for raw in self._process.stdout:
                line = keys.erase(raw.decode("utf-8", "replace").rstrip("\n"))
                self.tail.append(line)
                file.write(line + "\n")
                file.flush()

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self, grace_s: float) -> None:
        """SIGTERM to the group, SIGKILL after `grace_s` to what is left of it; returns when the group is gone."""
        deadline = time.monotonic() + grace_s
        self._signal(signal.SIGTERM)
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        while self._alive():
            time.sleep(POLL_S)
        self._pump.join(timeout=grace_s)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._group, number)
        except ProcessLookupError:
            return

    def _alive(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._group, 0)
        except ProcessLookupError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port(words: list[str], arm: Arm) -> int:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        text = following if word == "--port" else word.removeprefix("--port=") if word.startswith("--port=") else ""
        if text.isdigit():
            return int(text)
    raise LoadError(
        f"arm {arm.name}: expected --port N or --port {{port}} in the launch command, "
        f"got {' '.join(words[:6])!r}; add it"
    )


@contextmanager
def running(arm: Arm, connection: Connection, keys: Keys, logs: Path, progress: Progress) -> Iterator[Control]:
    """The arm's server, ready for requests: checked when it is a URL, started and stopped again when it is a command.

    Raises LoadError when it dies or is not ready within `connection.start_timeout_s`.
    """
    if not arm.launched:
        control = Control(arm.server, connection, keys)
        _await_ready(arm, control, None, connection, progress)
        control.refresh()
        yield control
        return
    server = LaunchedServer(arm, logs / f"server-{arm.name.lower()}.log", keys)
    try:
        control = Control(server.url, connection, keys)
        _await_ready(arm, control, server, connection, progress)
        control.refresh()
        yield control
    finally:
        server.stop(connection.stop_grace_s)


def _await_ready(
    arm: Arm, control: Control, server: LaunchedServer | None, connection: Connection, progress: Progress
) -> None:
    start = time.monotonic()
    bound = connection.start_timeout_s if server is not None else min(60.0, connection.start_timeout_s)
    while not control.healthy():
        waited = time.monotonic() - start
        tail = list(server.tail) if server is not None else []
        if server is not None and server.exit_code is not None:
            raise LoadError(
                f"arm {arm.name}: expected a server, got exit code {server.exit_code}; last lines:\n  "
                + "\n  ".join(tail)
            )
        if waited > bound:
            raise LoadError(
                f"arm {arm.name}: expected {control.url} to be ready within {bound:.0f} s, got no answer; "
                "raise --start-timeout-s or look into its log" + ("\n  " + "\n  ".join(tail) if tail else "")
            )
        progress(tail[-1] if tail else f"waiting for {control.url}", waited)
        time.sleep(POLL_S)
