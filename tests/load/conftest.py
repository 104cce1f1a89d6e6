"""Two mock servers for all tests of the load test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from load.helpers import MockProcess
from matplotlib.figure import Figure

from sglang_misa.bench.load import plots


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


@pytest.fixture
def pictures() -> None:
    """For tests that look at plots: there they are laid out and written as they are for users."""


@pytest.fixture(autouse=True)
def _plots_are_drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot that cannot be drawn still ends a run; its layout and two formats take longer than most of the runs."""
    if "pictures" in request.fixturenames:
        return

    def png(figure: Figure) -> bytes:
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
        return b""

    monkeypatch.setattr(plots, "png", png)
    monkeypatch.setattr(plots, "svg", lambda _: "<svg></svg>")
