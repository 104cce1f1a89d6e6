"""Our figures beside two peers' on one server: SGLang's `bench_serving` and GuideLLM, in turns (A B C C B A).

`python tests/load/agreement.py --guidellm PATH [--exact]`; the tables in bench/load/README.md and
bench/results/agreement.csv come from here. All three send the same prompts of as many words as tokens to
/v1/completions: of SGLang without a prefix cache, or (--exact) of a scripted server whose times are known and which no
client slows down. Medians are the ones that each client prints; ask for an odd number of requests, for of an even
number GuideLLM prints the lower middle one. Clients that start together stay in step: on SGLang all are told not to.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_misa.bench.load.stats import geometric_mean
from sglang_misa.bench.quality.words import NAMES, VALUES
from sglang_misa.demo import MODEL
from sglang_misa.procs import HOST, ServerProcess, free_port, is_healthy

START_S = 300.0
CONFIDENCE = 0.95
MOCK = Path(__file__).with_name("mock_server.py")
REAL = "--device cpu --sleep-on-idle --skip-server-warmup --disable-radix-cache --misa-preset dsa"
EXACT_TTFT_S, EXACT_ITL_S = 0.3, 0.01
EXACT = f"--ttft {EXACT_TTFT_S} --itl {EXACT_ITL_S}"
ONE_THREAD = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
VALID, INVALID = 0, 3  # our exit codes: an invalid run is shown as one
MARGIN = 0.1  # of the time between two starts, within which bench_serving's random times must be even


@dataclass(frozen=True)
class Load:
    """One run of one client. spread_s: seconds over which the clients of the closed loop start."""

    url: str
    folder: Path  # with prompts.jsonl and conversations.jsonl, and for what the client writes
    requests: int
    concurrency: int
    spread_s: float


@dataclass(frozen=True)
class Figures:
    """Medians in ms; output tokens a second by the client's own window, and from the first start to the last end."""

    ttft_ms: float
    tpot_ms: float
    own_tokens_per_s: float
    tokens_per_s: float
    valid: bool = True


def ours(load: Load) -> Figures:
    """`python -m sglang_misa.bench.load run`."""
    out = Path(tempfile.mkdtemp(dir=load.folder))
    command = [sys.executable, "-m", "sglang_misa.bench.load", "run", load.url, "--api", "completions"]
    command += ["--dataset", str(load.folder / "prompts.jsonl"), "--requests", str(load.requests), "--warmup", "1"]
    command += ["--concurrency", str(load.concurrency), "--ramp-s", str(load.spread_s), "--out", str(out)]
    code = _run(command, VALID, INVALID)
    with (out / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    with (out / "requests.csv").open() as file:
        requests = list(csv.DictReader(file))
    begun = min(float(r["dispatched"]) for r in requests)
    ended = max(float(r["dispatched"]) + float(r["e2e"]) for r in requests)
    return Figures(
        1000 * float(row["ttft_p50"]),
        1000 * float(row["tpot_p50"]),
        float(row["output_throughput"]),
        sum(int(r["output_tokens"]) for r in requests) / (ended - begun),
        code == VALID,
    )


def bench_serving(load: Load) -> Figures:
    """`python -m sglang.bench_serving`, whose only way to start apart is a rate of Poisson arrivals."""
    out = Path(tempfile.mkdtemp(dir=load.folder)) / "out.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "sglang.bench_serving", "--backend", "sglang-oai"]
    command += ["--base-url", load.url, "--model", str(MODEL), "--dataset-name", "custom", "--disable-tqdm"]
    command += ["--dataset-path", str(load.folder / "conversations.jsonl"), "--num-prompts", str(load.requests)]
    command += ["--max-concurrency", str(load.concurrency), "--warmup-requests", "1", "--output-file", str(out)]
    if load.spread_s > 0:
        rate = load.concurrency / load.spread_s
        command += ["--request-rate", str(rate), "--seed", str(_even_seed(load.concurrency, load.requests))]
    _run(command)
    found = json.loads(out.read_text())
    throughput = found["output_throughput"]
    return Figures(found["median_ttft_ms"], found["median_tpot_ms"], throughput, throughput)


def guidellm(program: str) -> Callable[[Load], Figures]:
    """GuideLLM with one worker process; its ITL is what the other two call TPOT.

    Its ramp (0.8.1) starts the last client together with the one before: these two stay in step.
    """

    def run(load: Load) -> Figures:
        folder = Path(tempfile.mkdtemp(dir=load.folder))
        scenario, out = folder / "scenario.json", folder / "out.json"
        backend = {"kind": "openai_http", "target": load.url, "request_format": "/v1/completions"}
        spec = {
            "backend": backend | {"extras": {"body": {"temperature": 0.0}}},
            "profile": {"kind": "concurrent", "streams": [load.concurrency], "rampup_duration": load.spread_s},
            "constraints": [{"kind": "max_requests", "count": load.requests}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(MODEL)},
            "data": [{"kind": "json_file", "path": str(load.folder / "prompts.jsonl")}],
            "outputs": [{"kind": "json", "path": str(out)}],
        }
        scenario.write_text(json.dumps({"spec": spec}))
        one_worker = {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        _run([program, "run", "--config", str(scenario), "--disable-console"], environ=one_worker)
        (found,) = json.loads(out.read_text())["benchmarks"]
        requests, metrics = found["requests"]["successful"], found["metrics"]
        begun, ended = min(r["request_start_time"] for r in requests), max(r["request_end_time"] for r in requests)
        return Figures(
            metrics["time_to_first_token_ms"]["successful"]["median"],
            metrics["inter_token_latency_ms"]["successful"]["median"],
            metrics["output_tokens_per_second"]["successful"]["mean"],
            sum(r["output_tokens"] for r in requests) / (ended - begun),
            len(requests) == load.requests,
        )

    return run


def _run(command: Sequence[str], *accepted: int, environ: dict[str, str] | None = None) -> int:
    """Exit code, one of `accepted` (0). Raises RuntimeError with the end of the output otherwise."""
    done = subprocess.run(
        command, env={**os.environ, **ONE_THREAD, **(environ or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode not in (accepted or (VALID,)):
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.returncode


def _even_seed(clients: int, requests: int) -> int:
    """A seed of bench_serving's whose first arrivals are even, and whose later ones keep no client waiting."""
    for seed in range(1_000_000):
        late = np.cumsum(np.random.RandomState(seed).exponential(1.0, requests)) - np.arange(1, requests + 1)
        if (np.abs(late[: clients - 1]) < MARGIN).all() and (late[clients - 1 :] < -MARGIN).all():
            return seed
    raise ValueError(f"expected a seed for {clients} clients and {requests} requests, got none; ask for fewer")


def _turns(clients: list[str], rounds: int) -> list[str]:
    """A B C C B A, then B C A A C B …: a drift of the machine falls on no client alone."""
    orders = [clients[i % len(clients) :] + clients[: i % len(clients)] for i in range(rounds)]
    return [client for order in orders for client in (*order, *reversed(order))]


def write_prompts(folder: Path, count: int, prompt_len: int, output_len: int) -> None:
    """The same prompts for all, in the two files that they read: a word is a token of the model."""
    rng = random.Random(0)
    prompts = [" " + " ".join(rng.choices(NAMES + VALUES, k=prompt_len)) for _ in range(count)]
    rows = [{"prompt": p, "output_len": output_len, "output_tokens_count": output_len} for p in prompts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = " " + " ".join(NAMES[:1] * output_len)
    talks = [{"conversations": [{"value": p}, {"value": answer}]} for p in prompts]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))


def table(rows: Sequence[dict[str, Any]], clients: Sequence[str]) -> str:
    """Geometric means over the turns, and the ratio to the first client's with its 95 % interval, in Markdown."""
    columns = {"ttft_ms": "TTFT p50, ms", "tpot_ms": "TPOT p50, ms", "tokens_per_s": "output tokens/s"}
    keys = ("server", "concurrency", "requests")
    head = ["server", "at once", "requests", "client", *columns.values()]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in dict.fromkeys(tuple(str(row[key]) for key in keys) for row in rows):
        runs = [row for row in rows if tuple(str(row[key]) for key in keys) == cell]
        for client in clients:
            cells = [*cell, client]
            for column in columns:
                values, first = ([float(r[column]) for r in runs if r["client"] == c] for c in (client, clients[0]))
                text = f"{geometric_mean(values, CONFIDENCE).value:.4g}"
                if client != clients[0]:
                    found = geometric_mean([v / f for v, f in zip(values, first, strict=True)], CONFIDENCE)
                    text += f", × {found.value:.3f}"
                    if found.low is not None:  # more than one turn
                        text += f" ({found.low:.3f}–{found.high:.3f})"
                cells.append(text)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _command(port: int, *, exact: bool) -> list[str]:
    """What starts the server, on `port`."""
    if exact:
        return [sys.executable, str(MOCK), "--port", str(port), *EXACT.split()]
    real = ["-m", "sglang_misa.launch_server", "--model-path", str(MODEL), *REAL.split()]
    return [sys.executable, *real, "--host", HOST, "--port", str(port)]


def _spread_s(url: str, folder: Path, concurrency: int, output_len: int) -> float:
    """Seconds over which clients start on SGLang: a prefill delays them all, so one's cycle has the prefills of all."""
    alone = ours(Load(url, folder, 3, 1, 0.0))
    return (concurrency * alone.ttft_ms + output_len * alone.tpot_ms) / 1000 if concurrency > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", default="guidellm", help="its program, of an environment of its own")
    parser.add_argument("--exact", action="store_true", help="ask the scripted server, not SGLang")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=9, help="of one run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of two for each client")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("agreement.csv"), help="runs that are there stay")
    options = parser.parse_args()
    clients = {"ours": ours, "bench_serving": bench_serving, "GuideLLM": guidellm(options.guidellm)}
    folder, port = Path(tempfile.mkdtemp(prefix="agreement-")), free_port()
    write_prompts(folder, options.requests, options.prompt_len, options.output_len)
    rows: list[dict[str, Any]] = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    command = _command(port, exact=options.exact)
    with ServerProcess(command, folder / "server.log", environ={**os.environ, **ONE_THREAD}) as server:
        server.wait_ready(lambda: is_healthy(port), START_S)
        url, concurrency = f"http://{HOST}:{port}", options.concurrency
        spread_s = 0.0 if options.exact else _spread_s(url, folder, concurrency, options.output_len)
        for client in _turns(list(clients), options.rounds):
            figures = clients[client](Load(url, folder, options.requests, concurrency, spread_s))
            run = {"server": "scripted" if options.exact else "SGLang", "concurrency": concurrency, "client": client}
            rows.append(run | {"requests": options.requests} | asdict(figures))
            print(rows[-1], flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows, list(clients)))


if __name__ == "__main__":
    main()
