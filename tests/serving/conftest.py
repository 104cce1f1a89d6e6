"""One SGLang server for the whole folder: this package's launcher, the tiny model, the CPU, MISA on."""

import base64
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_misa import random_model
from sglang_misa.procs import ServerProcess, free_port, is_healthy

API_KEY = "serving-test-key"
CONTEXT = 8192
MIN_LEN = 100
HEADS, BLOCKS, BLOCK = 8, 4, 64
TAIL, CHUNK = 24, 512
SELECTION = (
    f"--misa-preset dsa --misa-prefill-heads {HEADS} --misa-prefill-block-size {BLOCK} "
    f"--misa-prefill-min-len {MIN_LEN} "
    f"--misa-decode-blocks {BLOCKS} --misa-decode-block-size {BLOCK} --misa-decode-min-len {MIN_LEN} "
    "--misa-audit-rows 4 --misa-audit-every 1"
)
CACHES = ("TVM_FFI_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")  # of compilers
START_LIMIT = 300
WATCH = Path(__file__).parent / "watch"  # its sitecustomize.py is in every process of a server
Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Generated:
    text: str
    ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    selected: np.ndarray  # [rows, layers, topk] int32 positions, -1 for none; empty unless asked for


class Server:
    """A started server and the requests that the tests send to it."""

    key = API_KEY
    caches: Path  # of compilers, of the server of the whole folder
    built: set[Path]  # what was there when it was ready

    def __init__(self, process: ServerProcess, port: int, model: Path):
        self.process, self.port, self.model = process, port, model

    def request(self, path: str, body: Any = None, key: str = API_KEY) -> tuple[int, bytes]:
        """(status, body) of a GET, or of a POST of JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            self.send(connection, path, body, key)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @staticmethod
    def send(connection: http.client.HTTPConnection, path: str, body: Any, key: str = API_KEY) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)

    def json(self, path: str, body: Any = None) -> Any:
        status, answer = self.request(path, body)
        assert status == 200, (status, answer)
        return json.loads(answer)

    @staticmethod
    def body(prompt: str | list[int], new: int) -> dict[str, Any]:
        return {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
        }

    def generate(self, prompt: str | list[int], new: int = 8, selections: bool = False) -> Generated:
        """Greedy tokens after `prompt`, with the positions that each row of each layer attended to."""
        answer = self.json("/generate", self.body(prompt, new) | {"return_indexer_topk": selections})
        meta = answer["meta_info"]
        raw = base64.b64decode(meta["indexer_topk"]) if selections else b""
        shape = (-1, random_model.CPU.layers, random_model.CPU.index_topk)
        selected = np.frombuffer(raw, dtype=np.int32).reshape(shape)
        return Generated(answer["text"], answer["output_ids"], meta["prompt_tokens"], meta["cached_tokens"], selected)

    def leave(self, prompt: str | list[int], new: int) -> None:
        """Ask for a stream of `new` tokens and go after its first bytes."""
        body = self.body(prompt, new) | {"stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        self.send(connection, "/generate", body)
        assert connection.getresponse().read1(64)
        connection.close()

    def misa(self) -> dict[str, Any]:
        return self.json("/server_info")["internal_states"][0]["misa"]

    def flush(self) -> None:
        status, answer = self.request("/flush_cache?timeout=20", {})
        assert status == 200, answer

    def healthy(self) -> bool:
        """Whether it still generates."""
        return self.process.exit_code is None and len(self.generate("Still there?").ids) == 8


def environment(**changes: str) -> dict[str, str]:
    """The environment of a server, without what a developer or another test may have set."""
    ours = ("SGLANG_MISA", "SGLANG_PLUGINS", "SGLANG_PLATFORM", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    ours = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0"}
    path = os.pathsep.join(filter(None, (str(WATCH), changes.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
    return {**kept, **ours, **changes, "PYTHONPATH": path}


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """The environment of a server."""
    return environment()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.ensure(tmp_path_factory.mktemp("model"), random_model.CPU)


@pytest.fixture(scope="session")
def weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(model / "model.safetensors"))


@contextmanager
def started(words: str, model: Path, log: Path, **changes: str) -> Iterator[Server]:
    """A server with SELECTION and more `words` that answers, stopped in the end; the environment changes by keyword."""
    port = free_port()
    command = (
        f"{sys.executable} -m sglang_misa.launch_server {SELECTION} {words} --device cpu --model-path {model} "
        f"--host 127.0.0.1 --port {port} --context-length {CONTEXT} --sleep-on-idle"
    ).split()
    with ServerProcess(command, log, environ=environment(**changes)) as process:
        process.wait_ready(lambda: is_healthy(port), START_LIMIT)
        yield Server(process, port, model)


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    key = folder / "key"
    key.write_text(f"{API_KEY}\n")
    caches = {name: str(folder / "caches" / name) for name in CACHES}
    words = f"--api-key-file {key} --enable-return-indexer-topk --enable-metrics"
    words += f" --misa-prefill-tail {TAIL} --chunked-prefill-size {CHUNK}"
    with started(words, model, folder / "log", **caches) as running:
        running.caches, running.built = folder / "caches", set((folder / "caches").rglob("*"))
        yield running


@pytest.fixture(scope="session")
def start() -> Callable[..., AbstractContextManager[Server]]:
    return started


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Calls a function with every argument at once, each in a thread."""

    def run(function: Callable[..., Any], arguments: list[Any]) -> list[Any]:
        with ThreadPoolExecutor(len(arguments)) as pool:
            return list(pool.map(function, arguments))

    return run


@pytest.fixture(scope="session")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Callable[[], Ended]]]:
    """Begins a launch with these words, the environment changed by keyword; what it returns waits for the end."""
    with ExitStack() as running:  # they may serve, and should not

        def run(*words: Any, **changes: str) -> Callable[[], Ended]:
            command = [sys.executable, "-m", "sglang_misa.launch_server", *map(str, words)]
            log = tmp_path_factory.mktemp("launch") / "log"
            process = running.enter_context(ServerProcess(command, log, environ=environment(**changes)))

            def end() -> Ended:
                status = process.wait(START_LIMIT)
                process.stop()
                return Ended(command, status, log.read_text(errors="replace"), "")

            return end

        yield run
