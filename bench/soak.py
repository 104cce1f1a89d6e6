"""A mixed load on one server for minutes on end, its canary on `raise`, with faults injected.

    python -m sglang_misa.bench.soak --minutes 30 --out soak.json [--model-path DIR] [flags of the launcher]

Without --model-path a tiny random model is served from a pool that is too small for its load. The report has the
minutes, requests, events by kind, mismatches, errors, and the server's memory at start and end in bytes. Exit status 1
where a kind of event was never seen, a statistic was wrong, a request failed, or memory grew by more than GROWTH.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_misa import random_model
from sglang_misa.procs import HOST, ServerProcess, free_port, is_healthy

CLIENTS, POOL = 6, 1280  # requests at once, and tokens for all of them
CONTEXT = 2048
WORDS = range(2, 250)  # token ids of a prompt
SHORT, LONG, PREFIX = (20, 100), (300, 600), 300
PAUSE_S = 1.0  # between SIGSTOP and SIGCONT
TIMEOUT_S, START_S = 120.0, 300.0
GROWTH = 1.1  # of memory, after the first tenth of the time
FOUND_WITHIN = 64  # steps: 20 times the pages of all layers of the request, a sample's size of them at each step
TURNS = ("short", "long", "shared prefix", "next turn", "left mid-stream", "too long")
KINDS = (*TURNS, "flushed", "stopped and continued", "retracted", "evicted", "restored from the host")
SERVER = (
    "--misa-preset dsa --misa-decode-blocks 4 --misa-decode-block-size 64 --misa-decode-min-len 100 "
    "--misa-verify-stats raise --device cpu --enable-metrics --enable-cache-report --schedule-conservativeness 0 "
    f"--max-total-tokens {POOL} --max-running-requests {CLIENTS} --context-length {CONTEXT} "
    "--enable-hierarchical-cache --hicache-ratio 3 --hicache-io-backend direct --hicache-mem-layout page_first_direct"
)
# Beside retractions for want of room, after which SGLang admits fewer requests.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
COUNTED = {"evicted": "sglang:evicted_tokens_total", "restored from the host": "sglang:load_back_tokens_total"}


@dataclass
class Report:
    minutes: float = 0.0
    requests: int = 0
    events: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    pages_verified: int = 0
    mismatches: int = 0
    errors: list[str] = field(default_factory=list)
    memory_start: int = 0
    memory_end: int = 0
    corruption_found_after_steps: int = 0

    def problems(self) -> list[str]:
        """Sentences for what a clean run would not have."""
        found = [f"expected the event {kind!r}, got none" for kind, seen in self.events.items() if not seen]
        if self.mismatches or not self.pages_verified:
            found.append(f"expected pages verified and no mismatch, got {self.pages_verified} and {self.mismatches}")
        if not 0 < self.corruption_found_after_steps <= FOUND_WITHIN:
            found.append(
                f"expected a corrupted statistic found within {FOUND_WITHIN} steps, got "
                f"{self.corruption_found_after_steps} (0: never)"
            )
        if self.memory_end > self.memory_start * GROWTH:
            found.append(f"expected memory to stay, got {self.memory_start} bytes at first and {self.memory_end} last")
        return [*found, *self.errors]


class Soak:
    """The clients of one server, and what they saw."""

    def __init__(self, port: int, process: ServerProcess):
        self.port, self.process, self.report = port, process, Report()
        self._lock = threading.Lock()
        self.prefixes = [prompt(random.Random(seed), PREFIX) for seed in range(3)]

    def saw(self, kind: str) -> None:
        with self._lock:
            self.report.events[kind] += 1

    def _requested(self, path: str) -> None:
        with self._lock:
            self.report.requests += path == "/generate"

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, body) of a GET, or of a POST of JSON."""
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)) as connection:
            self._requested(path)
            connection.request(
                "GET" if body is None else "POST",
                path,
                None if body is None else json.dumps(body),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            text = answer.read().decode()
        with contextlib.suppress(json.JSONDecodeError):
            return answer.status, json.loads(text)
        return answer.status, text

    def generate(self, tokens: list[int], new: int) -> tuple[list[int], int]:
        """(greedy tokens, cached tokens). Raises RuntimeError for another answer than that many."""
        status, answer = self.ask("/generate", body(tokens, new))
        if status != 200 or len(answer["output_ids"]) != new:
            raise RuntimeError(f"expected {new} tokens, got {status} {str(answer)[:200]}")
        return answer["output_ids"], answer["meta_info"]["cached_tokens"]

    def leave(self, tokens: list[int]) -> None:
        """Ask for a stream and go after its first bytes."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            self._requested("/generate")
            connection.request("POST", "/generate", json.dumps(body(tokens, LONG[0]) | {"stream": True}))
            connection.getresponse().read1(64)

    def client(self, seed: int, until: float) -> None:
        """One client's requests, until the time is over: a turn of each kind, and again; each begins with another."""
        numbers = random.Random(seed)
        for turn in itertools.count(seed):
            if time.monotonic() > until:
                return
            try:
                self._turn(numbers, TURNS[turn % len(TURNS)])
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                with self._lock:
                    self.report.errors.append(f"client {seed}: {error!r}")
                return

    def _turn(self, numbers: random.Random, kind: str) -> None:
        new, tail = numbers.randrange(10, 120), prompt(numbers, numbers.randrange(*SHORT))
        if kind == "left mid-stream":
            self.leave(prompt(numbers, numbers.randrange(*LONG)))
        elif kind == "too long":
            status, answer = self.ask("/generate", body(prompt(numbers, CONTEXT + 1), new))
            if status != 400:
                raise RuntimeError(f"expected 400 for a prompt over the context, got {status} {str(answer)[:200]}")
        elif kind == "next turn":
            first, _ = self.generate(tail, new)
            self.generate([*tail, *first, *prompt(numbers, SHORT[0])], new)
        elif kind == "shared prefix":
            prefix = numbers.choice(self.prefixes)[: numbers.randrange(65, PREFIX)]
            self.generate([*prefix, *tail], new)
            if not self.generate([*prefix, *tail[::-1]], new)[1]:
                return  # somebody else's pages took its place
        else:
            self.generate(prompt(numbers, numbers.randrange(*LONG)) if kind == "long" else tail, new)
        self.saw(kind)

    def metrics(self) -> dict[str, float]:
        """SGLang's counters by name, summed over labels."""
        _, text = self.ask("/metrics")
        totals: defaultdict[str, float] = defaultdict(float)
        for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? ([-+.\deE]+)$", text, re.M):
            totals[name] += float(value)
        return totals

    def flush(self) -> None:
        """/flush_cache, refused while anything runs."""
        status, answer = self.ask("/flush_cache?timeout=60", {})
        if status != 200:
            raise RuntimeError(f"expected the cache flushed, got {status} {answer}")
        self.saw("flushed")

    def memory(self) -> int:
        """Resident bytes of the server's processes."""
        pages = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                pages += int(fields[21]) if int(fields[2]) == self.process.group else 0
        return pages * os.sysconf("SC_PAGESIZE")

    def load(self, seconds: float) -> None:
        """All clients for so long; halfway the server is stopped and goes on."""
        until = time.monotonic() + seconds
        clients = [threading.Thread(target=self.client, args=(seed, until)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(seconds / 2)
        os.killpg(self.process.group, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        os.killpg(self.process.group, signal.SIGCONT)
        self.saw("stopped and continued")
        for client in clients:
            client.join()

    def run(self, seconds: float) -> None:
        """The whole load: a probe asked before and after answers alike."""
        probe = prompt(random.Random(-1), LONG[0])
        before, _ = self.generate(probe, SHORT[1])
        begin = time.monotonic()
        self.load(seconds / 10)
        self.report.memory_start = self.memory()
        self.flush()
        self.load(seconds * 9 / 10)
        self.report.minutes = (time.monotonic() - begin) / 60
        self.report.memory_end = self.memory()
        metrics = self.metrics()
        for kind, name in COUNTED.items():
            self.report.events[kind] = int(metrics[name])
        log = self.process.log.read_text(errors="replace")
        self.report.events["retracted"] = sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log)))
        self.flush()
        after, _ = self.generate(probe, SHORT[1])
        if after != before:
            self.report.errors.append("expected the probe's text of before, got another")
        verified = self.ask("/server_info")[1]["internal_states"][0]["misa"]["page_stats_verified"]
        self.report.pages_verified, self.report.mismatches = verified["pages"], verified["mismatches"]

    def corrupt(self, folder: Path) -> None:
        """A statistic is corrupted while a request decodes: the server must stop and say why."""
        (folder / "now").touch()
        with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
            self.generate(prompt(random.Random(-2), LONG[0]), 4 * FOUND_WITHIN)
        with contextlib.suppress(Exception):
            self.process.wait(TIMEOUT_S)
        if "StaleStatistics" in self.process.log.read_text(errors="replace"):
            self.report.corruption_found_after_steps = int((folder / "steps").read_text())


def prompt(numbers: random.Random, length: int) -> list[int]:
    return [numbers.choice(WORDS) for _ in range(length)]


def body(tokens: list[int], new: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": tokens, "sampling_params": sampling}


@contextlib.contextmanager
def served(model: Path, folder: Path, flags: Sequence[str], environ: dict[str, str]) -> Iterator[Soak]:
    """The clients of a server that answers; it stops in the end. `folder` takes its log and the saboteur."""
    shutil.copy(Path(__file__).with_name("sabotage.py"), folder / "sitecustomize.py")
    port, path = free_port(), os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "sglang_misa.launch_server", *flags]
    command += ["--model-path", str(model), "--host", HOST, "--port", str(port)]
    environ = {**environ, **RETRACT, "PYTHONPATH": path, "SOAK_SABOTAGE": str(folder)}
    with ServerProcess(command, folder / "log", environ=environ) as process:
        process.wait_ready(lambda: is_healthy(port), START_S)
        yield Soak(port, process)


def run(model: Path, folder: Path, minutes: float, flags: Sequence[str], environ: dict[str, str]) -> Report:
    """The report of one soak. Raises ServerError where the server does not start."""
    with served(model, folder, flags, environ) as soak:
        try:
            soak.run(minutes * 60)
            soak.corrupt(folder)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            soak.report.errors.append(f"{error!r}; the server's last lines: {' | '.join(soak.process.tail())}")
        return soak.report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model-path", type=Path, help="a DSA model; the flags that serve it follow")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    given, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model_path or random_model.ensure(folder / "model", random_model.CPU)
        report = run(model, folder, given.minutes, flags or SERVER.split(), dict(os.environ))
    given.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    print(given.out.read_text(), *report.problems(), sep="\n")
    return 1 if report.problems() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
