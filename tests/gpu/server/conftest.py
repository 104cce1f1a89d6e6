"""Servers run in processes of their own: nothing is compiled or poisoned in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu.server import shared_extends
from gpu.server.servers import SHAPE, Server, ask, decode_steps, stop
from gpu.server.setups import ARMS, EXACT_ENV, EXACT_TOPK, NEW_TOKENS, SETUPS, Served


@pytest.fixture(autouse=True)
def _exact_and_poisoned() -> None:
    pass


PLUGINS = "from importlib import metadata; print(*metadata.entry_points(group='sglang.srt.plugins').names)"


@pytest.fixture(scope="session")
def installed() -> None:
    """Fails where a process that starts elsewhere, as a server's do, would not see the plugin."""
    seen = subprocess.run([sys.executable, "-c", PLUGINS], cwd="/", capture_output=True, text=True, check=True).stdout
    if "misa" not in seen.split():
        pytest.fail("expected the package installed, or SGLang does not see the plugin; pip install --no-deps -e .")


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: None) -> Served:
    """The answers of every arm of `SETUPS[request.param]`; logs lie in pytest's folder, or in $OUT if that is set."""
    name: str = request.param
    setup = SETUPS[name]
    folder = Path(os.environ["OUT"]) / name if "OUT" in os.environ else tmp_path_factory.mktemp(name)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, SHAPE.vocab, length).tolist() for length in setup.lengths]
    result = Served(setup)
    servers: dict[str, Server] = {}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in EXACT_ENV.items():
            patch.setenv(key, value)
        try:
            for arm in setup.arms:
                servers[arm] = Server(ARMS[arm], folder / f"{arm}.log", [*EXACT_TOPK, *setup.flags])
            _ask_all(result, servers, prompts)
        finally:
            stop(servers.values())
    return result


def _ask_all(result: Served, servers: dict[str, Server], prompts: list[list[int]]) -> None:
    for server in servers.values():
        server.wait()
        for length in (3000, 9000):
            ask(server, [[5] * length], 4, tail=False)
    for arm, server in servers.items():
        result.answers[arm], result.steps[arm] = [], []
        for ids in prompts:
            before = decode_steps(server)
            result.answers[arm] += ask(server, [ids], NEW_TOKENS, tail=True)
            result.steps[arm].append({path: n - before.get(path, 0) for path, n in decode_steps(server).items()})
        (result.again[arm],) = ask(server, [prompts[-1]], NEW_TOKENS, tail=True)
        result.shared[arm], _ = shared_extends.check(server, graphs=result.setup.prefill_graphs)
        result.status[arm] = server.misa()
