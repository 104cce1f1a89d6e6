"""Every buffer that a kernel leaves uninitialised starts as NaN; CUDA sources are compiled while other tests run."""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from on_cpu import compiled


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance(poisoned_empty: None) -> None:
    pass


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """The library of a source and its shape. Those that the run's modules name in LIBRARIES are compiled in advance."""
    building: dict[tuple[Any, ...], Future[ctypes.CDLL]] = {}
    with ThreadPoolExecutor(2) as pool:

        def build(source: str, **shape: int) -> Future[ctypes.CDLL]:
            key = (source, *sorted(shape.items()))
            if key not in building:
                building[key] = pool.submit(compiled, tmp_path_factory.mktemp(source), source, **shape)
            return building[key]

        for module in dict.fromkeys(item.getparent(pytest.Module).obj for item in request.session.items):
            for source, shape in getattr(module, "LIBRARIES", ()):
                build(source, **shape)
        yield lambda source, **shape: build(source, **shape).result()
        pool.shutdown(cancel_futures=True)
