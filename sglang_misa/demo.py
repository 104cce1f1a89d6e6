"""`--demo`: SGLang's own server with MISA on a tiny random model, a few long prompts, and a table of what happened.

On a CUDA GPU the kernels select; without one, the PyTorch reference on the CPU platform.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_misa import config as misa
from sglang_misa import demo_model
from sglang_misa.config import PHASES, Audit, ConfigError, MisaConfig, SelectionPolicy
from sglang_misa.procs import ServerError, ServerProcess

NEW_TOKENS = 16
START_LIMIT = 600.0  # seconds: a first start on a GPU builds kernels
NAME = "misa-demo"  # and the demo's process: under it the server is known to be ours
AUDIT = Audit(rows=4, every=1)


@dataclass(frozen=True)
class Setup:
    """What differs between a GPU and a CPU."""

    device: str
    shape: demo_model.Shape
    config: MisaConfig
    flags: str
    prompt: int  # characters of a prompt


CPU = Setup(
    device="CPU",
    shape=demo_model.CPU,
    config=MisaConfig(
        prefill=SelectionPolicy(heads=8, block_size=64, min_len=128),
        decode=SelectionPolicy(blocks=4, block_size=64, min_len=128),
        audit=AUDIT,
    ),
    flags="--device cpu --sleep-on-idle",
    prompt=3000,
)
GPU = Setup(
    device="GPU",
    shape=demo_model.GPU,
    config=MisaConfig(
        prefill=SelectionPolicy(heads=8, block_size=128, min_len=2048),
        decode=SelectionPolicy(blocks=64, block_size=128, min_len=2048),
        audit=AUDIT,
        allow_unverified=True,
    ),
    flags="--dsa-prefill-backend flashmla_sparse --dsa-decode-backend flashmla_sparse --kv-cache-dtype bfloat16 "
    "--mem-fraction-static 0.5 --max-total-tokens 131072 --max-running-requests 4 --cuda-graph-max-bs-decode 4 "
    "--disable-prefill-cuda-graph --grammar-backend none --sampling-backend pytorch --skip-server-warmup",
    prompt=20000,
)


@dataclass(frozen=True)
class Answer:
    """What one prompt cost, and which policy chose its tokens in each phase."""

    prompt: str
    tokens: int
    cached: int
    seconds: float
    ran: dict[str, list[str]]


def run(
    config: MisaConfig | None, arguments: Sequence[str], host: str, port: int, key: str | None, report: Path | None
) -> int:
    """Serve and measure; then serve until Ctrl-C, unless the environment has ONCE=1. Returns the exit status.

    config: the user's, None for the demo's own; arguments: more flags for the launcher, with which the server asks for
    `key` where there is one; host, port: where it listens; report: where to write JSON.
    """
    console = Console()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # so that the server is stopped too
    try:
        flags = [*arguments, "--host", host, "--port", str(port)]
        return _run(console, config, flags, Client(_url(host, port), key), report)
    except (ServerError, OSError) as error:  # OSError: the report's file, or a request to a server that just died
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _run(
    console: Console, config: MisaConfig | None, arguments: Sequence[str], client: Client, report: Path | None
) -> int:
    setup = GPU if torch.cuda.is_available() else CPU
    config = config or setup.config
    ConfigError.raise_if([*_too_short(config, setup.prompt), *_report_problems(report)])
    cache = demo_model.cache()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("Writing a tiny random DeepSeek-V3.2 model", total=1)
        model = demo_model.ensure(cache, setup.shape)
        bar.advance(task)
    words = [*setup.flags.split(), "--model-path", str(model)]
    log = cache / f"demo-{os.getpid()}.log"
    console.print(f"The server's log: {log}", markup=False, soft_wrap=True)
    with _server([*arguments, *words], config, log) as server:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task(f"Starting SGLang with MISA on the {setup.device}", total=1)
            start_seconds = server.wait_ready(lambda: _ready(client), START_LIMIT)
            bar.advance(task)
            prompts = list(_prompts(setup.prompt))
            task = bar.add_task("Sending prompts", total=len(prompts))
            answers = []
            for name, text in prompts:
                answers.append(_ask(client, name, text))
                bar.advance(task)
        status = client.misa()
        problems = list(_problems(config, status))
        _print(console, setup, config, answers, status)
        if report is not None:
            facts = {
                "device": setup.device,
                "config": config.model_dump(),
                "start_seconds": round(start_seconds, 1),
                "prompts": [asdict(answer) for answer in answers],
                "misa": status,
                "problems": problems,
            }
            report.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for problem in problems:
            console.print(problem, style="red", markup=False)
        if problems:
            return 1
        if os.environ.get("ONCE") != "1":
            _serve(console, server, client)
    return 0


def _too_short(config: MisaConfig, tokens: int) -> Iterator[str]:
    """Gates that the demo's prompts would never pass."""
    for phase in PHASES:
        policy = config.policy(phase)
        if policy.active and policy.min_len >= tokens:
            yield (
                f"{phase}.min_len: expected less than the {tokens} tokens of the demo's prompts, got {policy.min_len}; "
                f"lower --misa-{phase}-min-len"
            )


def _report_problems(report: Path | None) -> Iterator[str]:
    try:
        if report is not None:
            report.touch()
    except OSError as error:
        yield f"--demo-report: expected a file that can be written, got {report} ({error.strerror}); choose another"


@dataclass(frozen=True)
class Client:
    """Requests to one server, with its key where it asks for one."""

    url: str
    key: str | None

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET, or POST of a JSON body; the parsed answer, None for an empty one. Raises OSError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=START_LIMIT) as answer:
            return json.loads(answer.read() or "null")

    def misa(self) -> Any:
        """What /server_info says of MISA; "enabled" is False where it says nothing."""
        return self.call("/server_info")["internal_states"][0].get("misa") or {
            "enabled": False,
            "calls": {phase: {} for phase in PHASES},
            "recall": {"prefill": {}, "decode": {}},
        }


def _server(arguments: Sequence[str], config: MisaConfig, log: Path) -> ServerProcess:
    """This package's launcher as a child, under a name by which `_ready` knows it."""
    command = [sys.executable, "-m", "sglang_misa.launch_server", *arguments, "--served-model-name", _name()]
    return ServerProcess(command, log, environ={**os.environ, misa.ENV: config.to_json()})


def _name() -> str:
    return f"{NAME}-{os.getpid()}"


def _ready(client: Client) -> bool:
    """Whether our server answers. Raises ServerError where somebody else's does."""
    try:
        client.call("/health")
        found = client.call("/server_info")["served_model_name"]
    except OSError:
        return False
    if found != _name():
        raise ServerError(f"expected our server at {client.url}, got one of {found}; choose another --port")
    return True


def _prompts(length: int) -> Iterator[tuple[str, str]]:
    """(name, text) of real text, this package's own source; two begin alike and one comes twice."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    first, second = source[:length], source[length : 2 * length]
    shared = length * 2 // 3
    yield "a long text", first
    yield "the same beginning, another end", first[:shared] + second[: length - shared]
    yield "another text", second
    yield "the first text again", first


def _ask(client: Client, name: str, text: str) -> Answer:
    before = client.misa()
    body = {"text": text, "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}}
    start = time.monotonic()
    meta = client.call("/generate", body)["meta_info"]
    seconds = time.monotonic() - start
    after = client.misa()
    ran = {phase: _paths(before["calls"][phase], calls) for phase, calls in after["calls"].items()}
    if replayed := _paths(before["replays"], after["replays"]):
        ran["decode"] = replayed
    return Answer(name, meta["prompt_tokens"], meta["cached_tokens"], round(seconds, 3), ran)


def _paths(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """The paths counted in between; a CUDA graph counts at capture only, so those are named where nothing else is."""
    counted = [path for path, calls in after.items() if calls > before.get(path, 0)]
    return counted or [path for path in after if path.startswith("captured:")]


def _problems(config: MisaConfig, status: Mapping[str, Any]) -> Iterator[str]:
    """Why the demo has not shown what it should."""
    if not status["enabled"]:
        yield f"MISA did not run: expected it enabled in /server_info, got {json.dumps(status)}"
        return
    for phase in PHASES:
        policy, calls = config.policy(phase), status["calls"][phase]
        if policy.active and not {policy.name, f"captured:{policy.name}"} & calls.keys():
            yield f"MISA did not run: expected {policy.name} in {phase}, got {json.dumps(calls)}"
    if not config.active:
        yield "MISA did not run: expected a policy, got stock DSA in both phases; drop --misa-preset dsa"
    elif not status["recall"]["prefill"]:
        yield "recall was not measured: expected audited prefill rows, got none; set --misa-audit-rows and a policy"


def _print(
    console: Console, setup: Setup, config: MisaConfig, answers: Sequence[Answer], status: Mapping[str, Any]
) -> None:
    requests = Table(title=f"Prompts, {NEW_TOKENS} new tokens each, tiny random model on the {setup.device}")
    for column in ("prompt", "tokens", "cached", "seconds", *PHASES):
        requests.add_column(column, justify="right" if column in ("tokens", "cached", "seconds") else "left")
    for answer in answers:
        ran = [", ".join(answer.ran[phase]) or "-" for phase in PHASES]
        requests.add_row(answer.prompt, str(answer.tokens), str(answer.cached), f"{answer.seconds:.2f}", *ran)
    recall = Table(title=f"Recall of prefill ({config.prefill.name}) against the dense indexer")
    for column in ("layer", "mean", "p10", "rows"):
        recall.add_column(column, justify="right")
    for layer, row in status["recall"]["prefill"].items():
        recall.add_row(layer, f"{row['recall']:.3f}", f"{row['p10']:.3f}", str(row["rows"]))
    console.print(requests)
    if recall.row_count:
        console.print(recall)
    verified = "" if status["verified"] else ", which is not verified on this device"
    console.print(f"SGLang {status['sglang']}{verified}.", markup=False)
    console.print(
        "The weights are random: this shows that the machinery runs, and says nothing about recall, quality or speed "
        "on a real model."
    )


def _serve(console: Console, server: ServerProcess, client: Client) -> None:
    body = json.dumps({"text": "Hello", "sampling_params": {"max_new_tokens": 8}})
    key = "" if client.key is None else " -H 'Authorization: Bearer …'"
    console.print(f"Serving on {client.url} until Ctrl-C. Try:")
    for words in (f"generate -H 'Content-Type: application/json' -d '{body}'", "server_info"):
        console.print(f"  curl {client.url}/{words}{key}", markup=False, soft_wrap=True)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        return
    raise ServerError(f"The server ended with status {status}; see {server.log}")
