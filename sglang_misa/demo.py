"""The demo: SGLang's own server with MISA on a tiny random model, real prompts, a table of what ran, then serving.

Latencies are the demo's, not a benchmark's; recall is measured live against the dense indexer by the audit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_misa import config as misa
from sglang_misa import demo_model
from sglang_misa.config import Audit, MisaConfig, SelectionPolicy

HOST = "127.0.0.1"
START_S, REQUEST_S, STOP_S = 900, 600, 30
NEW_TOKENS = 16
FAILED = 1


@dataclass(frozen=True)
class Setting:
    """What the demo does on one kind of machine."""

    device: str
    shape: demo_model.Shape
    prompt_tokens: int  # a token is a byte
    flags: tuple[str, ...]
    block_size: int
    candidates: int
    blocks: int
    min_len: int

    @property
    def config(self) -> MisaConfig:
        """8 heads and re-ranked candidates in prefill, whole blocks left out in decode, every call audited."""
        common: dict[str, Any] = {"block_size": self.block_size, "min_len": self.min_len}
        return MisaConfig(
            prefill=SelectionPolicy(heads=8, candidates=self.candidates, **common),
            decode=SelectionPolicy(blocks=self.blocks, **common),
            audit=Audit(rows=8, every=1),
        )


CPU = Setting(
    device="cpu",
    shape=demo_model.CPU,
    prompt_tokens=1500,
    flags=("--device", "cpu"),
    block_size=64,
    candidates=256,
    blocks=8,
    min_len=256,
)
GPU = Setting(
    device="cuda",
    shape=demo_model.GPU,
    prompt_tokens=24000,
    flags=(
        *("--dsa-prefill-backend", "flashmla_sparse", "--dsa-decode-backend", "flashmla_sparse"),
        *("--kv-cache-dtype", "bfloat16", "--mem-fraction-static", "0.5", "--max-running-requests", "8"),
        *("--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "8", "--sampling-backend", "pytorch"),
    ),
    block_size=128,
    candidates=8192,
    blocks=64,
    min_len=4096,
)


def run(chosen: MisaConfig | None, sglang_flags: Sequence[str], port: int, report: Path | None) -> int:
    """Build the model, serve it with `chosen` or the demo's policies, measure, print; returns the exit status.

    `sglang_flags` go to the server. With ONCE=1 in the environment it leaves after the table: 0, or 1 when MISA did not
    run in a phase it was asked for or recall was not measured. Otherwise it serves until Ctrl-C.
    """
    import torch
    from rich.console import Console

    console = Console()
    setting = GPU if torch.cuda.is_available() and "cpu" not in sglang_flags else CPU
    config = chosen or setting.config
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-misa"
    config.check(index_heads=setting.shape.index_heads, topk=setting.shape.index_topk)
    cache.mkdir(parents=True, exist_ok=True)
    with console.status("writing a tiny DeepSeek-V3.2-shaped model with random weights"):
        model = demo_model.ensure(cache, setting.shape)
    log = cache / "server.log"
    command = [sys.executable, "-m", "sglang_misa.launch_server", "--model-path", str(model), "--host", HOST]
    command += ["--port", str(port), *_missing(setting.flags, sglang_flags), *sglang_flags]
    console.print(f"model   {model}\nserver  {' '.join(command[1:])}\nlog     {log}", soft_wrap=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with _server(command, config, log) as server:
            with console.status("starting SGLang") as status:
                _wait(server, port, log, status)
            result = {"device": setting.device, "config": config.model_dump(), **_measure(port, setting, console)}
            problems = _problems(config, result["misa"])
            result["problems"] = problems
            _print(console, result)
            if report is not None:
                report.write_text(json.dumps(result, indent=1), encoding="utf-8")
            for problem in problems:
                console.print(f"[bold red]{problem}")
            if os.environ.get("ONCE") != "1" and not problems:
                _stay(console, server, port)
            return FAILED if problems else 0
    except DemoError as error:
        console.print(f"[bold red]{error}", soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        return 0


class DemoError(RuntimeError):
    """The server did not start or answer; the message says what to read."""


def _missing(defaults: Sequence[str], given: Sequence[str]) -> list[str]:
    """The default flags, with their values, that the user did not give."""
    words: list[str] = []
    keep = True
    for word in defaults:
        if word.startswith("--"):
            keep = not any(g == word or g.startswith(f"{word}=") for g in given)
        if keep:
            words.append(word)
    return words


@contextlib.contextmanager
def _server(command: Sequence[str], config: MisaConfig, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a process group of its own, stopped on the way out."""
    environment = {**os.environ, misa.ENV: config.to_json()}
    environment.setdefault("OMP_NUM_THREADS", "1")  # more make two-core machines crawl
    with open(log, "wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield server
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path, status: Any) -> None:
    import requests

    start = time.monotonic()
    while time.monotonic() - start < START_S:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if server.poll() is not None:
            tail = "\n".join(line[:400] for line in lines[-25:])
            raise DemoError(
                f"expected a running server, got exit status {server.returncode}; the end of {log}:\n{tail}"
            )
        status.update(f"starting SGLang, {time.monotonic() - start:.0f} s: {lines[-1][:90]}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"http://{HOST}:{port}/health", timeout=5).ok:
                return
        time.sleep(0.5)
    raise DemoError(f"expected a server within {START_S} s, got none; read {log}")


def _prompts(tokens: int) -> Mapping[str, str]:
    """Text of this repository by name: the last two share their first three quarters."""
    package = Path(__file__).parent
    root = package.parent / "README.md"
    files = [p for p in (root, package / "kernels" / "README.md", *sorted(package.glob("*.py"))) if p.is_file()]
    text = "\n\n".join(p.read_text(encoding="utf-8") for p in files)
    text = (text * (1 + 4 * tokens // len(text))).encode("ascii", "ignore").decode()
    parts = [text[i * tokens : (i + 1) * tokens] for i in range(3)]
    shared = parts[2][: tokens * 3 // 4]
    return {
        "text A": parts[0],
        "text B": parts[1],
        "text C": shared + "\n\nQuestion: what is measured here?",
        "text C, asked again": shared + "\n\nQuestion: which errors can it raise?",
    }


def _measure(port: int, setting: Setting, console: Any) -> dict[str, Any]:
    """Send the prompts; returns {"requests": [...], "misa": the status in /server_info}."""
    import requests
    from rich.progress import Progress

    rows = []
    with Progress(console=console, transient=True) as progress:
        prompts = _prompts(setting.prompt_tokens)
        for name, text in progress.track(prompts.items(), description="sending prompts"):
            start = time.monotonic()
            body = {
                "text": text,
                "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
            }
            answer = requests.post(f"http://{HOST}:{port}/generate", json=body, timeout=REQUEST_S)
            if not answer.ok:
                raise DemoError(f"{name}: expected an answer, got {answer.status_code} {answer.text[:300]}")
            meta = answer.json()["meta_info"]
            rows.append(asdict(Request(name, meta["prompt_tokens"], meta["cached_tokens"], time.monotonic() - start)))
    info = requests.get(f"http://{HOST}:{port}/server_info", timeout=REQUEST_S).json()
    return {"requests": rows, "misa": info["internal_states"][0].get("misa", {})}


@dataclass(frozen=True)
class Request:
    """One answered prompt."""

    name: str
    prompt_tokens: int
    cached_tokens: int
    latency_s: float


def _problems(config: MisaConfig, status: Mapping[str, Any]) -> list[str]:
    """What was asked for and did not happen, one sentence each."""
    if not status.get("enabled"):
        return ["expected MISA on, got a server whose /server_info does not say so; read the log"]
    problems = []
    for phase in misa.PHASES:
        policy, calls = config.policy(phase), status["calls"].get(phase, {})
        if policy.active and not any(path.endswith(policy.name) for path in calls):
            problems.append(f"{phase}: expected calls of {policy.name}, got {calls}; lower --misa-{phase}-min-len")
    if config.prefill.active and not any(layer["rows"] for layer in status["recall"].values()):
        problems.append("expected a measured recall, got none; raise --misa-audit-rows or lower --misa-prefill-min-len")
    return problems


def _print(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    requests = Table("prompt", "tokens", "cached", f"seconds ({NEW_TOKENS} new tokens)", title="requests")
    for row in result["requests"]:
        requests.add_row(row["name"], f"{row['prompt_tokens']}", f"{row['cached_tokens']}", f"{row['latency_s']:.2f}")
    console.print(requests)
    status = result["misa"]
    ran = Table("phase", "policy", "indexer calls by path", title="token selection")
    for phase in misa.PHASES:
        calls = ", ".join(f"{path} {count}" for path, count in status.get("calls", {}).get(phase, {}).items())
        ran.add_row(phase, status.get("policy", {}).get(phase, "none"), calls or "none")
    console.print(ran)
    recall = Table("layer", "recall", "score mass", "rows", title="prefill recall against the dense indexer")
    for layer, row in status.get("recall", {}).items():
        recall.add_row(layer, f"{row['recall']:.3f}", f"{row['score_mass']:.3f}", f"{row['rows']}")
    console.print(recall)


def _stay(console: Any, server: subprocess.Popen[bytes], port: int) -> None:
    body = json.dumps({"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16}})
    console.print(
        f"serving until Ctrl-C; try:\n  curl http://{HOST}:{port}/generate -H 'Content-Type: application/json'", end=""
    )
    console.print(f" -d '{body}'\n  curl http://{HOST}:{port}/server_info", markup=False)
    server.wait()
    raise DemoError(f"the server ended by itself with status {server.returncode}; read its log")
