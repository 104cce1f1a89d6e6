"""A real SGLang server on a seeded random model, and the selections that it answers with, through HTTP."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_misa import random_model
from sglang_misa.procs import HOST, ServerProcess, free_port

HERE = pathlib.Path(__file__).parent
TAIL = 128  # rows of each request whose selections come back
EQUAL = 0.999  # DeepGEMM multiplies fp8 with fewer accumulator bits than fp32: sets overlap by 0.9993 or more

SKETCHED = 0.996  # scores of sketches have nine bits of fraction, so at the cut a few candidates are others
SHAPE = random_model.GPU
ENV = {
    "SELECTION_TAIL": str(TAIL),
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",  # a server that dies would wait a minute for them
}
# NCCL alone and without NVLink multicast, which not every host lends. Servers that run side by side take memory from
# one another while they load.
PARALLEL = "--enforce-disable-flashinfer-allreduce-fusion --disable-custom-all-reduce"
PARALLEL_ENV = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
# SGLang's default on CUDA, but for the sizes: as many extend rows as one of these graphs holds.
PREFILL_GRAPHS = "--cuda-graph-backend-prefill breakable --cuda-graph-bs-prefill 64 512 1024 2048"


def post(url: str, body: dict[str, Any], timeout: float = 600) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def get(url: str, timeout: float = 30) -> Any:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return json.loads(answer.read() or "null")


class Server:
    """One SGLang server on `ranks` GPUs, at `port` or a free one."""

    def __init__(
        self,
        config: dict[str, Any] | None,
        log: pathlib.Path,
        extra: list[str],
        *,
        port: int | None = None,
        ranks: int = 1,
        shape: random_model.Shape = SHAPE,
        environ: Mapping[str, str] | None = None,
    ):
        model = random_model.ensure(random_model.cache(), shape)
        port = port or free_port()  # suites may run side by side
        self.url, self.log, self.ranks = f"http://{HOST}:{port}", log, ranks
        env = os.environ | ENV | (PARALLEL_ENV if ranks > 1 else {}) | dict(environ or {})
        env.pop("SGLANG_MISA_CONFIG", None)
        self._digests = log.with_suffix(".digests")
        if ranks > 1:
            shutil.rmtree(self._digests, ignore_errors=True)
            self._digests.mkdir()
            env["SELECTION_DIGESTS"] = str(self._digests)
        if config is not None:
            env["SGLANG_MISA_CONFIG"] = json.dumps(config)
        command = f"""{sys.executable} {HERE / "serve_tail.py"} --model-path {model}
            --host {HOST} --port {port} --context-length 140000 --mem-fraction-static 0.8
            --chunked-prefill-size 8192 --cuda-graph-max-bs-decode 4 --max-running-requests 4
            --max-total-tokens 300032 --tp-size {ranks} {PARALLEL if ranks > 1 else ""}
            {random_model.GPU_FLAGS}""".split()
        log.unlink(missing_ok=True)
        self._process = ServerProcess(command + extra, log, environ=env)

    def wait(self, limit: float = 420) -> float:
        """Seconds to ready. Raises ServerError with the end of the log when the server died or took too long."""

        def ready() -> bool:
            try:
                get(self.url + "/health", timeout=2)
            except OSError:
                return False
            return True

        return self._process.wait_ready(ready, limit)

    def ended(self, limit: float) -> int:
        """Exit status of a server that ends by itself. Raises subprocess.TimeoutExpired after `limit` seconds."""
        return self._process.wait(limit)

    def stop(self, grace_s: float = 10) -> None:
        self._process.stop(grace_s)

    def misa(self) -> dict[str, Any]:
        """What /server_info says of MISA; nothing on stock."""
        return self.replicas()[0]

    def replicas(self) -> list[dict[str, Any]]:
        """The same of each data-parallel replica."""
        return [state.get("misa") or {} for state in get(self.url + "/server_info")["internal_states"]]

    def flush(self) -> None:
        """Empty the radix cache, once nothing runs."""
        with urllib.request.urlopen(self.url + "/flush_cache?timeout=20", data=b"", timeout=30):
            pass

    def rank_problems(self) -> list[str]:
        """A sentence when the ranks of a stopped server did not select the same sets for every request."""
        lines = [file.read_text().splitlines() for file in self._digests.iterdir()]
        counts = [len(found) for found in lines]
        if len(counts) != self.ranks or len(set(counts)) > 1:
            return [f"{self.log.stem}: expected {self.ranks} ranks with as many requests each, got {counts}"]
        parted = [request for request in zip(*lines, strict=True) if len(set(request)) > 1]
        if parted:
            return [f"{self.log.stem}: expected ranks to select the same, got {parted[0]} and {len(parted) - 1} more"]
        return []


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    selected: np.ndarray  # int32 [rows, layers, 2048]: ids of the last rows, -1 for none
    output_ids: list[int]
    cached: int  # prompt tokens that the radix cache held
    verified: int  # steps that verified drafts; 0 without speculative decoding


def ask(
    server: Server, prompts: list[list[int]], new_tokens: int, *, tail: bool, replica: int | None = None
) -> list[Answer]:
    """The answers to prompts that arrive in one message, with the selections of their last rows if `tail`.

    replica: the data-parallel one that answers; None leaves it to the server.
    """
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
        "return_indexer_topk": tail,
        **({} if replica is None else {"routed_dp_rank": replica}),
    }
    answers = []
    for found in post(server.url + "/generate", body):
        meta = found["meta_info"]
        raw = base64.b64decode(meta["indexer_topk"]) if tail else b""
        selected = np.frombuffer(raw, dtype=np.int32).reshape(-1, SHAPE.layers, SHAPE.index_topk)
        answers.append(Answer(selected, found["output_ids"], meta["cached_tokens"], meta.get("spec_verify_ct", 0)))
    return answers


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |A∩B| / |A| over rows [rows, 2048], -1 left out."""
    shares = []
    for row_a, row_b in zip(a, b, strict=True):
        wanted = row_a[row_a >= 0]
        shares.append(np.isin(wanted, row_b).mean() if len(wanted) else 1.0)
    return float(np.mean(shares)) if shares else float("nan")


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def decode_steps(server: Server) -> dict[str, int]:
    """Decode steps so far by side of the length gate: graphs replayed, or calls of every layer where there are none."""
    status = server.misa()
    calls = status.get("calls", {}).get("decode", {})
    eager = {path: count // SHAPE.layers for path, count in calls.items() if ":" not in path}
    return dict(status.get("replays") or eager)


def stop(servers: Iterable[Server], grace_s: float = 10) -> None:
    """Stop all at once: each takes seconds, and is killed after `grace_s`."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: server.stop(grace_s), servers))


def overlaps(a: np.ndarray, b: np.ndarray) -> list[float]:
    """`overlap` of each layer of [rows, layers, 2048]."""
    return [round(overlap(a[:, layer], b[:, layer]), 5) for layer in range(SHAPE.layers)]
