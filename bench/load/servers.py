"""The arms' servers: reached where a URL is given, started and stopped where a command is."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from sglang_misa.bench.load.control import Control
from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.safety import HIDDEN, Keys
from sglang_misa.bench.load.settings import LoadError
from sglang_misa.bench.load.store import RESUME
from sglang_misa.procs import POLL_S, ServerError, ServerProcess, free_port

Progress = Callable[[str, float], None]  # (last log line or state, seconds waited)
BACK_S = 300.0  # seconds in which a server that we did not start must be back when it went away


class ArmServer:
    """One arm's server, ready for requests once entered. Raises LoadError when it is not there or does not start.

    go_on: how its user goes on where it went away.
    """

    go_on: ClassVar[str] = RESUME

    def __init__(self, arm: Arm, plan: Plan, keys: Keys, logs: Path, progress: Progress):
        self._arm, self._plan, self._keys, self._progress = arm, plan, keys, progress
        self._log = logs / f"server-{re.sub(r'[^a-z0-9]+', '-', arm.name.lower())}.log"
        self._process: ServerProcess | None = None
        self.control: Control

    def __enter__(self) -> ArmServer:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stop(self._plan.serving.stop_grace_s)
            self._process = None

    def recover(self) -> None:
        """Wait for a server that went away, or start it again where it is ours. Raises LoadError when it stays away."""
        if self._process is not None:
            if self._process.exit_code is None and self.control.healthy():
                return
            self.__exit__()
            self._start()
            return
        begin = time.monotonic()
        while not self.control.healthy():
            waited = time.monotonic() - begin
            if waited > min(BACK_S, self._plan.serving.start_timeout_s):
                raise LoadError(
                    f"arm {self._arm.name}: expected {self.control.url} to come back, got {self.control.last_error}; "
                    f"what was measured is kept: start it and {self.go_on}"
                )
            self._progress(f"{self.control.url} went away", waited)
            time.sleep(POLL_S)

    def _start(self) -> None:
        arm, serving, access = self._arm, self._plan.serving, self._plan.access
        if not arm.launched:
            self.control = Control(arm.server, access, self._keys, self._plan.protocol.model)
            if not self.control.healthy() and not self._answers(serving.start_timeout_s):
                raise LoadError(
                    f"arm {arm.name}: expected a server at {self.control.url}, got {self.control.last_error}; start it"
                )
        else:
            words, environ, port = launch_words(arm)
            self.control = Control(f"http://127.0.0.1:{port}", access, self._keys, self._plan.protocol.model)
            if self.control.healthy():
                raise LoadError(f"arm {arm.name}: expected port {port} to be free, got a server there; stop it")
            try:
                self._process = ServerProcess(
                    words, self._log, environ={**os.environ, **environ}, erase=self._keys.erase
                )
            except OSError as error:
                raise LoadError(f"arm {arm.name}: expected a command that starts, got {error}") from None
            try:
                self._process.wait_ready(self.control.healthy, serving.start_timeout_s, self._progress)
            except ServerError as error:
                raise LoadError(f"arm {arm.name}: {error}") from None
        self.control.refresh()

    def _answers(self, limit_s: float) -> bool:
        """Whether a server that answers, but is not ready, becomes so in time; one that nobody serves does not."""
        begin = time.monotonic()
        while self.control.last_error.startswith("HTTP 5"):
            waited = time.monotonic() - begin
            if waited > limit_s:
                return False
            self._progress(f"waiting for {self.control.url}: {self.control.last_error}", waited)
            time.sleep(POLL_S)
            if self.control.healthy():
                return True
        return False


def launch_words(arm: Arm) -> tuple[list[str], dict[str, str], int]:
    """Words, environment and port of an arm's launch command. Raises LoadError."""
    try:
        words = shlex.split(arm.server)
    except ValueError as error:
        raise LoadError(f"arm {arm.name}: expected a command, got {arm.server!r} ({error}); mend its quotes") from None
    environ = {}
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.S):
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    if HIDDEN in arm.server:
        raise LoadError(
            f"arm {arm.name}: expected a command with its keys, got one from which they were erased; "
            "repeat the whole command with --out"
        )
    port = str(free_port())
    words = [w.replace("{port}", port) for w in words]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        text = following if word == "--port" else word.removeprefix("--port=") if word.startswith("--port=") else ""
        if text.isdigit():
            return words, environ, int(text)
    raise LoadError(
        f"arm {arm.name}: expected a URL, or a launch command with --port N or --port {{port}}, "
        f"got {' '.join(words[:6])!r}; add it"
    )
