"""Two mock servers for all tests of the load test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from load.helpers import MockProcess


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
