"""One real SGLang server on the CPU platform, with MISA on, for the whole folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_server import SHAPE, Server, start, stop, wait_ready

from sglang_misa import demo_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_model.ensure(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(model, tmp_path_factory.mktemp("server") / "log", "--enable-return-indexer-topk")
    try:
        wait_ready(running)
        yield running
    finally:
        stop(running)
