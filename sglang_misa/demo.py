"""`--demo`: a small trained model, under stock DSA and under the chosen selection: who finds the needles?

Two servers on the CPU, whatever the machine has: the PyTorch reference selects there as the kernels do on a GPU. They
are asked by `bench.quality all`. The one with the chosen selection stays up afterwards.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sglang_misa import config as misa
from sglang_misa.bench.load.environment import Environment
from sglang_misa.bench.load.safety import Keys
from sglang_misa.bench.load.settings import LoadError, Serving
from sglang_misa.bench.load.store import Store
from sglang_misa.bench.quality import page
from sglang_misa.bench.quality.cli import All
from sglang_misa.bench.quality.collect import Collector
from sglang_misa.bench.quality.page import Section
from sglang_misa.config import PHASES, PRESETS, Audit, ConfigError, MisaConfig, SelectionPolicy, preset_name
from sglang_misa.http_request import ask
from sglang_misa.kernels.layout import PAGE
from sglang_misa.procs import HOST, ServerError, ServerProcess, free_port

MODEL = Path(str(files("sglang_misa.bench.quality"))) / "model"
TOPK, PRESETS_TOPK = 256, 2048  # the model's, and that of the models which presets are made for
PRESET = "faithful"
AUDIT = Audit(rows=4, every=1)
START_LIMIT, GONE_LIMIT = 600.0, 10.0  # seconds for a server to start, and to come back
ANSWER_S = 60.0  # seconds for an answer
NAME = "misa-demo"  # and the demo's process: under it the server is known to be ours
LENGTH = 1024  # tokens of a prompt
QUESTIONS = {"lengths": (str(LENGTH),), "depths": 5, "repeats": 1, "template": "pairs", "new_tokens": 4}
FLAGS = f"--device cpu --model-path {MODEL} --sleep-on-idle --skip-server-warmup"
SHOWN = {
    "needles": "Needles found of asked",
    "recall": "Audited recall: share of stock DSA's tokens that are selected",
    "times": "Seconds of an answer",
}


def run(
    config: MisaConfig | None, arguments: Sequence[str], host: str, port: int, key: str | None, report: Path | None
) -> int:
    """Serve and measure; then serve until Ctrl-C, unless the environment has ONCE=1. Returns the exit status.

    config: the user's, None for the demo's own; arguments: more flags for the launcher, with which the server asks for
    `key` where there is one; host, port: where it listens; report: a folder for a page, its pictures and JSON.
    """
    console = Console(markup=False, emoji=False)
    config = config or PRESETS[PRESET]
    ConfigError.raise_if([*_stock_problems(config), *_report_problems(report)])
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # so that the servers are stopped too
    try:
        return _run(console, config, arguments, host, port, key, report)
    except (ServerError, LoadError, OSError) as error:  # OSError: the report, or a request to a server that just died
        console.print(str(error), style="red")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(
    console: Console,
    config: MisaConfig,
    arguments: Sequence[str],
    host: str,
    port: int,
    key: str | None,
    report: Path | None,
) -> int:
    name = preset_name(config) or config.name("prefill")
    asked = served(config)
    logs = Path(tempfile.mkdtemp(prefix="sglang-misa-demo-"))
    console.print(f"The servers' logs: {logs}", soft_wrap=True)
    ours, stock = Client(_url(host, port), key), Client(_url(HOST, free_port()), key)
    words = [*arguments, "--host", host, "--port", str(port), "--served-model-name", _name()]
    with _server(words, asked.to_json(), logs / "server.log") as server:
        with ExitStack() as stack:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            bar = Bar(stack.enter_context(Progress(*columns, console=console)))
            words = [*arguments, "--host", HOST, "--port", stock.url.rpartition(":")[2]]
            beside = stack.enter_context(_server(words, "dsa", logs / "stock.log"))
            bar.begin(f"Starting SGLang twice on the CPU: stock DSA, and {name}")
            server.wait_ready(ours.ready, START_LIMIT)
            beside.wait_ready(stock.healthy, START_LIMIT)
            bar.begin("Asking both")
            found = _measured((stock, ours), ("stock", name), key, bar, report)
        status = ours.misa()
        problems = list(_problems(asked, status))
        _print(console, asked, found, status)
        for problem in problems:
            console.print(problem, style="red")
        if problems:
            return 1
        if os.environ.get("ONCE") != "1":
            _serve(console, server, ours)
    return 0


def served(config: MisaConfig) -> MisaConfig:
    """What the demo's server selects with: `config` for its model, audited as asked for, or as the tables need it."""
    audit = config.audit if config.audit.rows else AUDIT
    return config.model_copy(update={"audit": audit, **{phase: scaled(config.policy(phase)) for phase in PHASES}})


def scaled(policy: SelectionPolicy) -> SelectionPolicy:
    """`policy` for the demo's model: what it keeps, in proportion to the top-k, and no gate above that."""
    size = max(PAGE, policy.block_size * TOPK // PRESETS_TOPK // PAGE * PAGE)
    kept = None if policy.blocks is None else policy.blocks * policy.block_size * TOPK // PRESETS_TOPK
    changes = {
        "block_size": size,
        "blocks": None if kept is None else max(2, kept // size),
        "candidates": None if policy.candidates is None else policy.candidates * TOPK // PRESETS_TOPK,
        "min_len": min(policy.min_len, TOPK),
        "min_rows": 1,  # the demo asks one question at a time
        "min_tokens": 0,
    }
    return policy.model_copy(update=changes)


def _measured(
    clients: Sequence[Client], names: tuple[str, ...], key: str | None, bar: Bar, report: Path | None
) -> list[Section]:
    """What the answers of both servers show, also as a page in `report`. Raises LoadError."""
    urls, serving = tuple(client.url for client in clients), Serving(start_timeout_s=GONE_LIMIT)
    command = All(servers=urls, names=names, serving=serving, **QUESTIONS)  # type: ignore[arg-type]
    plan, keys = command.plan(), Keys(api=key)
    environment = Environment.now(sys.argv[1:], keys, module="sglang_misa.launch_server")
    with tempfile.TemporaryDirectory() as answers:
        collector = Collector(plan, Store(Path(answers), keys), keys, bar, extra=command.extra)
        found = command.measure(collector, plan.arms, environment.commit)
    if report is not None:
        path = page.write(Store(report, keys), plan, environment, "Demo", found, collector.servers)
        bar.progress.console.print(f"The report: {path}", soft_wrap=True)
    return found


def _stock_problems(config: MisaConfig) -> Iterator[str]:
    if not config.active:
        yield "--misa-preset: expected a preset to compare with stock DSA, got stock DSA itself; choose another"


def _report_problems(report: Path | None) -> Iterator[str]:
    try:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=report):
                pass
    except OSError as error:
        yield f"--demo-report: expected a folder to write to, got {report} ({error.strerror}); choose another"


@dataclass(frozen=True)
class Bar:
    """One line: what is going on, and how far it is."""

    progress: Progress

    def begin(self, words: str) -> None:
        """A part begins; the one before is over."""
        for task in self.progress.task_ids:
            self.progress.update(task, total=1, completed=1)
        self.progress.add_task(words, total=None)

    def expect(self, units: int) -> None:
        self.progress.update(self.progress.task_ids[-1], total=units)

    def waiting(self, name: str, line: str, seconds: float) -> None:
        pass

    def finished(self, line: str) -> None:
        self.progress.advance(self.progress.task_ids[-1])


@dataclass(frozen=True)
class Client:
    """Requests to one server, with its key where it asks for one."""

    url: str
    key: str | None

    def call(self, path: str) -> Any:
        """The parsed answer to a GET, None for an empty one. Raises OSError."""
        return json.loads(ask(f"{self.url}{path}", self.key, ANSWER_S) or "null")

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            ask(f"{self.url}/health", self.key, ANSWER_S)
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True

    def ready(self) -> bool:
        """Whether our server answers. Raises ServerError where somebody else's does."""
        if not self.healthy():
            return False
        found = self.call("/server_info")["served_model_name"]
        if found != _name():
            raise ServerError(f"expected our server at {self.url}, got one of {found}; choose another --port")
        return True

    def misa(self) -> Any:
        """What /server_info says of MISA; "enabled" is False where it says nothing."""
        return self.call("/server_info")["internal_states"][0].get("misa") or {"enabled": False}


def _server(arguments: Sequence[str], config: str, log: Path) -> ServerProcess:
    """This package's launcher as a child, without the machine's GPUs."""
    command = [sys.executable, "-m", "sglang_misa.launch_server", *arguments, *FLAGS.split()]
    return ServerProcess(command, log, environ={**os.environ, misa.ENV: config, "CUDA_VISIBLE_DEVICES": ""})


def _name() -> str:
    return f"{NAME}-{os.getpid()}"


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _problems(config: MisaConfig, status: Mapping[str, Any]) -> Iterator[str]:
    """Why the demo has not shown what it should."""
    if not status["enabled"]:
        yield f"MISA did not run: expected it enabled in /server_info, got {json.dumps(status)}"
        return
    for phase in PHASES:
        policy, calls = config.policy(phase), status["calls"][phase]
        if policy.active and policy.name not in calls:
            yield f"MISA did not run: expected {policy.name} in {phase}, got {json.dumps(calls)}"


def _print(console: Console, config: MisaConfig, found: Sequence[Section], status: Mapping[str, Any]) -> None:
    for section in found:
        if section.name not in SHOWN or not section.rows:
            continue
        columns, rows = section.table
        table = Table(title=SHOWN[section.name])
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    selected = ", ".join(f"{config.policy(phase).label} in {phase}" for phase in PHASES)
    console.print(f"Selected by {selected}, in contexts over {TOPK} tokens; SGLang {status['sglang']}.")
    if whole := " and ".join(phase for phase in PHASES if (config.policy(phase).candidates or 0) >= LENGTH):
        console.print(
            f"In {whole}, all {LENGTH} tokens of a prompt are candidates, of which all heads choose: a recall of 1 "
            "there says nothing of longer prompts."
        )
    console.print(
        f"{found[0].verdict}\nThe model has two layers and was trained for minutes. This shows that the parts work on "
        "learned keys. It does not show what DeepSeek-V3.2 would lose: docs/quality.md says how to measure your model. "
        "The times are those of PyTorch on this CPU, with the audit, and say nothing about the kernels."
    )


def _serve(console: Console, server: ServerProcess, client: Client) -> None:
    body = json.dumps({"text": "Hello", "sampling_params": {"max_new_tokens": 8}})
    key = "" if client.key is None else " -H 'Authorization: Bearer …'"
    console.print(f"Serving on {client.url} until Ctrl-C. Try:")
    for words in (f"generate -H 'Content-Type: application/json' -d '{body}'", "server_info"):
        console.print(f"  curl {client.url}/{words}{key}", soft_wrap=True)
    try:
        status = server.wait()
    except KeyboardInterrupt:
        return
    raise ServerError(f"The server ended with status {status}; see {server.log}")
