"""A launcher process on the CPU platform and how to talk to it."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests

from sglang_misa import config as misa
from sglang_misa import demo_model
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy

SHAPE = demo_model.CPU
START_S, REQUEST_S, STOP_S = 300, 240, 30
CONFIG = MisaConfig(
    prefill=SelectionPolicy(heads=8, block_size=64, min_len=128),
    decode=SelectionPolicy(blocks=8, block_size=64, min_len=128),
    audit=Audit(rows=4, every=1),
)


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    model: Path

    def post(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=REQUEST_S, **options)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=REQUEST_S)

    def generate(self, ids: list[int], new_tokens: int = 4, **fields: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = self.post("/generate", {"input_ids": ids, "sampling_params": sampling, **fields})
        assert answer.ok, answer.text
        return answer.json()

    def selections(self, answer: dict[str, Any]) -> np.ndarray:
        """Positions [tokens - 1, layers, topk] int32 that the indexer of each layer returned, -1 padded."""
        data = np.frombuffer(base64.b64decode(answer["meta_info"]["indexer_topk"]), dtype=np.int32)
        return data.reshape(-1, SHAPE.layers, SHAPE.index_topk)

    def status(self) -> dict[str, Any]:
        return self.get("/server_info").json()["internal_states"][0]["misa"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model: Path, log: Path, *flags: str, config: MisaConfig = CONFIG, **environment: str) -> Server:
    """A launcher process on a free port; it may still be loading, or have refused."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_misa.launch_server", "--device", "cpu", "--model-path", str(model)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", misa.ENV: config.to_json(), **environment}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags], env=settings, stdout=output, stderr=output, start_new_session=True
        )
    return Server(f"http://127.0.0.1:{port}", process, log, model)


def stop(server: Server) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_S)


def wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        with contextlib.suppress(requests.RequestException):
            if requests.get(server.url + "/health", timeout=5).ok:
                return
        time.sleep(0.5)
    raise AssertionError(f"no server in {START_S} s:\n{server.log.read_text()[-4000:]}")
