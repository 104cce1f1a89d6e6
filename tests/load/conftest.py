"""Mock servers as processes, and what tests read off them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

MOCK = Path(__file__).with_name("mock_server.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MockProcess:
    """One mock server in a process of its own."""

    def __init__(self, *flags: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, str(MOCK), "--port", str(port), *flags], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                requests.get(self.url + "/health", timeout=5)
                return
            except requests.ConnectionError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline, "the mock server did not start"
                time.sleep(0.05)

    def script(self, **changes: Any) -> None:
        """Serve by the default script with `changes` from now on."""
        requests.post(self.url + "/flush_cache", timeout=5)
        self.sent()
        assert requests.post(self.url + "/_script", json=changes, timeout=5).status_code == 200

    def sent(self) -> dict[str, list[float]]:
        """Request number → perf_counter times: arrival, each frame with tokens, [DONE]. Forgets them."""
        return requests.get(self.url + "/_sent", timeout=5).json()  # type: ignore[no-any-return]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="session")
def mocks() -> Iterator[tuple[MockProcess, MockProcess]]:
    """Two mock servers for the whole session."""
    pair = MockProcess(), MockProcess()
    yield pair
    for mock in pair:
        mock.stop()


@pytest.fixture
def mock(mocks: tuple[MockProcess, MockProcess]) -> Callable[..., MockProcess]:
    """The first mock server, with a script of the test's."""

    def scripted(**changes: Any) -> MockProcess:
        mocks[0].script(**changes)
        return mocks[0]

    return scripted
