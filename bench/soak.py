"""A mixed load on one server for minutes on end, its canary on `raise`, with faults injected.

    python -m sglang_misa.bench.soak --minutes 30 --out soak.json [--scale cpu|gpu] [--model-path DIR flags…]

Without --model-path a random model is served from a pool that is too small for its load, in front of a host cache and
a disk that fills up. The report has the memory after a warm-up and at the end in bytes: resident in the server's
processes, and in tensors of theirs on GPUs, whoever else is there. `memory` tells of the second half what each process
has of each kind, and what is added to it an hour. Exit status 1 where a kind of event was never seen, a statistic was
wrong, a request failed, or memory grew by more than GROWTH, or of a process by STEADY_GROWTH in that half.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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

import torch

from sglang_misa import random_model, versions
from sglang_misa.admission import STORAGE_TRIED
from sglang_misa.bench import resident, sabotage
from sglang_misa.kernels.layout import PAGE
from sglang_misa.procs import HOST, ServerProcess, free_port, is_healthy

CLIENTS = 6  # requests at once
NEW = (10, 120)  # tokens of an answer
PAUSE_S = 1.0  # between SIGSTOP and SIGCONT
TIMEOUT_S, START_S = 120.0, 600.0
WARM_UP = 0.25  # share of the time before memory_start is taken
GROWTH = 1.1  # of memory, after that
STEADY_S = 300.0  # that the second half must last for a trend in it to be one
STEADY_GROWTH = 0.02  # of all processes' own memory, that one may add to its own in the second half
TURNS = ("short", "long", "shared prefix", "next turn", "left mid-stream", "too long")
# Beside retractions for want of room, after which SGLang admits fewer requests.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
COUNTED = {
    "evicted": "sglang:evicted_tokens_total",
    "restored from the host": "sglang:load_back_tokens_total",
}
LOGGED = {"retracted": r"#retracted_reqs: (\d+)"}
HOST_CACHE = "--enable-hierarchical-cache --hicache-ratio 3"
if versions.installed() in STORAGE_TRIED:
    COUNTED |= {"saved to disk": "sglang:backuped_tokens_total", "read from disk": "sglang:prefetched_tokens_total"}
    LOGGED |= {"disk full": r"(No) space left on device"}
    HOST_CACHE += ' --hicache-storage-backend file --hicache-storage-backend-extra-config {"prefetch_threshold":64}'
KINDS = (*TURNS, "flushed", "stopped and continued", *COUNTED, *LOGGED)


@dataclass(frozen=True)
class Scale:
    """A model and the sizes of its load, in tokens: on a GPU ours select past 2048, on the CPU all of it is small."""

    shape: random_model.Shape
    pool: int  # for all requests
    context: int
    words: range  # of a prompt
    short: tuple[int, int]
    long: tuple[int, int]
    prefix: int  # that prompts share
    alike: int  # of the probe's answer; a GPU adds up in another order each time
    found_within: int  # steps: 20 times the pages of all layers of a request, a sample's size of them at each step
    disk: int  # files that it takes: more than a request's, which are counted if all were saved
    flags: str

    @property
    def server(self) -> list[str]:
        """Flags of the server, the model's folder left out."""
        sizes = f"--max-total-tokens {self.pool} --max-running-requests {CLIENTS} --context-length {self.context}"
        common = "--misa-verify-stats raise --enable-metrics --enable-cache-report --schedule-conservativeness 0"
        return f"{self.flags} {sizes} {common} {HOST_CACHE}".split()


SCALES = {
    "cpu": Scale(
        shape=random_model.CPU,
        pool=1280,
        context=2048,
        words=range(2, 250),
        short=(20, 100),
        long=(300, 600),
        prefix=300,
        alike=100,
        found_within=64,
        disk=40,
        flags="--misa-preset misa --misa-prefill-min-len 100 --misa-prefill-block-size 64 "
        "--misa-decode-blocks 4 --misa-decode-block-size 64 --misa-decode-min-len 100 "
        "--device cpu --chunked-prefill-size 256",
    ),
    "gpu": Scale(
        shape=random_model.GPU,
        pool=24576,
        context=16384,
        words=range(2, random_model.GPU.vocab),
        short=(500, 2500),
        long=(5000, 11000),
        prefix=5000,
        alike=1,
        found_within=640,
        disk=1000,
        flags="--misa-preset fast --misa-prefill-min-len 2048 --misa-decode-min-len 2048 --misa-decode-min-rows 1 "
        "--misa-decode-candidates 4096 --mem-fraction-static 0.5 --chunked-prefill-size 2048 "
        f"--cuda-graph-max-bs-decode {CLIENTS} {random_model.GPU_FLAGS}",
    ),
}
tell = functools.partial(print, file=sys.stderr, flush=True)


@dataclass
class Report:
    device: str = ""
    sglang: str = ""
    minutes: float = 0.0
    requests: int = 0
    events: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    pages_verified: int = 0
    mismatches: int = 0
    errors: list[str] = field(default_factory=list)
    memory_start: int = 0
    memory_end: int = 0
    gpu_memory_start: int = 0
    gpu_memory_end: int = 0
    memory: list[resident.Growth] = field(default_factory=list)  # of the second half
    corruption_found_within: int = 0  # steps allowed
    corruption_found_after_steps: int = 0

    def problems(self) -> list[str]:
        """Sentences for what a clean run would not have."""
        found = [f"expected the event {kind!r}, got none" for kind, seen in self.events.items() if not seen]
        if self.mismatches or not self.pages_verified:
            found.append(f"expected pages verified and no mismatch, got {self.pages_verified} and {self.mismatches}")
        steps, allowed_steps = self.corruption_found_after_steps, self.corruption_found_within
        if not 0 < steps <= allowed_steps:
            found.append(f"expected a corrupted statistic found within {allowed_steps} steps, got {steps} (0: never)")
        for what, start, end in (
            ("memory", self.memory_start, self.memory_end),
            ("memory on GPUs", self.gpu_memory_start, self.gpu_memory_end),
        ):
            if end > start * GROWTH:
                found.append(f"expected {what} to stay, got {start} bytes at first and {end} last")
        own = [growth for growth in self.memory if growth.kind == "anon"]
        half_s, allowed = self.minutes * 60 / 2, STEADY_GROWTH * sum(growth.resident for growth in own)
        for growth in own:
            added = growth.per_hour * half_s / resident.HOUR_S
            if half_s >= STEADY_S and added > allowed:
                found.append(
                    f"expected the memory of {growth.process} to grow by {allowed:.0f} bytes at most in the second "
                    f"half, got {added:.0f}"
                )
        return [*found, *self.errors]


class Soak:
    """The clients of one server, and what they saw."""

    def __init__(self, port: int, process: ServerProcess, scale: Scale, folder: Path):
        self.port, self.process, self.scale = port, process, scale
        self.folder = folder
        self.report = Report(corruption_found_within=scale.found_within)
        self._lock = threading.Lock()
        self.prefixes = [self.prompt(random.Random(seed), scale.prefix) for seed in range(3)]

    def prompt(self, numbers: random.Random, length: int) -> list[int]:
        return [numbers.choice(self.scale.words) for _ in range(length)]

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
            method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, path, content, {"Content-Type": "application/json"})
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
            connection.request("POST", "/generate", json.dumps(body(tokens, self.scale.long[0]) | {"stream": True}))
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
        scale, prompt = self.scale, functools.partial(self.prompt, numbers)
        new, tail = numbers.randrange(*NEW), prompt(numbers.randrange(*scale.short))
        if kind == "left mid-stream":
            self.leave(prompt(numbers.randrange(*scale.long)))
        elif kind == "too long":
            status, answer = self.ask("/generate", body(prompt(scale.context + 1), new))
            if status != 400:
                raise RuntimeError(f"expected 400 for a prompt over the context, got {status} {str(answer)[:200]}")
        elif kind == "next turn":
            first, _ = self.generate(tail, new)
            self.generate([*tail, *first, *prompt(scale.short[0])], new)
        elif kind == "shared prefix":
            prefix = numbers.choice(self.prefixes)[: numbers.randrange(PAGE + 1, scale.prefix)]
            self.generate([*prefix, *tail], new)
            if not self.generate([*prefix, *tail[::-1]], new)[1]:
                return  # somebody else's pages took its place
        else:
            self.generate(prompt(numbers.randrange(*scale.long)) if kind == "long" else tail, new)
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

    def signal(self, number: int) -> None:
        """Send a signal to each of the server's processes."""
        for pid in resident.family(self.process.group):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def memory(self) -> int:
        """Resident bytes of the server's processes."""
        return resident.total(resident.family(self.process.group))

    def gpu_memory(self) -> int:
        """Bytes of the server's tensors on GPUs after its last step, as its processes say; 0 without any."""
        return sum(int(told.read_text()) for told in self.folder.glob(f"{sabotage.GPU_MEMORY}*"))

    def load(self, seconds: float) -> None:
        """All clients for so long; halfway the server is stopped and goes on."""
        until = time.monotonic() + seconds
        clients = [threading.Thread(target=self.client, args=(seed, until)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(seconds / 2)
        self.signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        if {process.state for process in resident.family(self.process.group).values()} <= {"T", "Z"}:
            self.saw("stopped and continued")
        self.signal(signal.SIGCONT)
        for client in clients:
            client.join()

    def run(self, seconds: float) -> None:
        """The whole load: a probe asked before and after answers alike."""
        probe, alike = self.prompt(random.Random(-1), self.scale.long[0]), self.scale.alike
        before, _ = self.generate(probe, alike)
        begin = time.monotonic()
        with resident.watch(self.process.group) as samples:
            self.load(seconds * WARM_UP)
            self.report.memory_start, self.report.gpu_memory_start = self.memory(), self.gpu_memory()
            self.flush()
            self.load(seconds * (1 - WARM_UP))
        end = time.monotonic()
        self.report.minutes = (end - begin) / 60
        self.report.memory_end, self.report.gpu_memory_end = self.memory(), self.gpu_memory()
        self.report.memory = resident.growths([sample for sample in samples if sample[0] > (begin + end) / 2])
        self.flush()
        after, _ = self.generate(probe, alike)
        metrics = self.metrics()
        for kind, name in COUNTED.items():
            self.report.events[kind] = int(metrics[name])
        log = self.process.log.read_text(errors="replace")
        for kind, line in LOGGED.items():
            self.report.events[kind] = sum(int(word) if word.isdigit() else 1 for word in re.findall(line, log))
        if after != before:
            self.report.errors.append("expected the probe's text of before, got another")
        _, info = self.ask("/server_info")
        self.report.device, self.report.sglang = info["device"], info["version"]
        verified = info["internal_states"][0]["misa"]["page_stats_verified"]
        self.report.pages_verified, self.report.mismatches = verified["pages"], verified["mismatches"]

    def corrupt(self) -> None:
        """A statistic is corrupted while a request decodes: the server must stop and say why."""
        (self.folder / sabotage.STEPS).write_text("0")
        try:
            self.generate(self.prompt(random.Random(-2), self.scale.long[0]), 4 * self.scale.found_within)
        except (OSError, RuntimeError, http.client.HTTPException):
            with contextlib.suppress(Exception):
                self.process.wait(TIMEOUT_S)
        steps = (self.folder / sabotage.STEPS).read_text()
        if "StaleStatistics" in self.process.log.read_text(errors="replace"):
            self.report.corruption_found_after_steps = int(steps.split()[0])
        else:
            self.report.errors.append(f"expected the server to stop for it, got steps after the fault: {steps}")


def body(tokens: list[int], new: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": tokens, "sampling_params": sampling}


@contextlib.contextmanager
def served(
    model: Path, folder: Path, log: Path, scale: Scale, flags: Sequence[str], environ: dict[str, str]
) -> Iterator[Soak]:
    """The clients of a server that answers; it stops in the end. `folder` takes its disk and the saboteur."""
    shutil.copy(sabotage.__file__, folder / "sitecustomize.py")
    port, path = free_port(), os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "sglang_misa.launch_server", *flags]
    command += ["--model-path", str(model), "--host", HOST, "--port", str(port)]
    faults = {sabotage.FOLDER: str(folder), sabotage.DISK_FILES: str(scale.disk)}
    disk = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder / "disk")}
    environ = {**environ, **RETRACT, **faults, **disk, "PYTHONPATH": path}
    with ServerProcess(command, log, environ=environ) as process:
        process.wait_ready(lambda: is_healthy(port), START_S)
        yield Soak(port, process, scale, folder)


def run(
    model: Path, folder: Path, log: Path, minutes: float, scale: Scale, flags: Sequence[str], environ: dict[str, str]
) -> Report:
    """The report of one soak. Raises ServerError where the server does not start."""
    tell("starting the server")
    with served(model, folder, log, scale, flags, environ) as soak:
        try:
            tell(f"{minutes:g} minutes of load")
            soak.run(minutes * 60)
            tell(f"{soak.report.requests} requests; corrupting a statistic")
            soak.corrupt()
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            soak.report.errors.append(f"{error!r}; the server's last lines: {' | '.join(soak.process.tail())}")
        return soak.report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_misa.bench.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--scale", choices=SCALES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-path", type=Path, help="a DSA model; the flags that serve it follow")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument("--log", type=Path, help="a file for the server's log, written as it runs")
    given, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, scale = Path(name), SCALES[given.scale]
        model = given.model_path or random_model.ensure(random_model.cache(), scale.shape)
        log = given.log or folder / "log"
        log.unlink(missing_ok=True)
        report = run(model, folder, log, given.minutes, scale, flags or scale.server, dict(os.environ))
    given.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    print(given.out.read_text(), *report.problems(), sep="\n")
    return 1 if report.problems() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
