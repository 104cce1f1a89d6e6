"""Servers on two GPUs: tensor-parallel ranks that must agree, and data-parallel attention, whose ranks idle in turn.

    python -m pytest -m gpu tests/gpu/server/test_ranks.py        (-k "not dp" starts fewer servers)

The servers of all collected tests start side by side, which takes hardly longer than one; then each is asked in its
turn, as kernels of several servers would wait for each other's collectives. In the end one rank of one server parts
from the other.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.server.servers import EQUAL, SHAPE, Answer, Server, ask, overlaps, stop
from gpu.server.setups import ARMS, DRAFTS, EXACT_ENV, EXACT_TOPK, GATED, NEW_TOKENS

RANKS = 2
# A decoding request completes a page before NEW tokens are out: each of these lengths ends 8 to 28 tokens under one.
NEW = 4 * NEW_TOKENS
SHORT, LONG, PREFIX, TAILS = 4096, 41004, 40960, (100, 172, 243, 312)
POOL = "--max-total-tokens 49152 --mem-fraction-static 0.9"
# SGLang divides the chunk by the replicas: rows share a product with as many others as on one replica.
REPLICAS = f"--dp-size {RANKS} --enable-dp-attention --chunked-prefill-size {RANKS * 8192}"
VERIFIED = {"verify_ranks": 1, "verify_stats": "raise"}
SINKING = GATED | {"audit": {"rows": 32, "every": 1, "floor": 0.999}} | VERIFIED  # random weights keep less
WATCH = Path(__file__).parents[2] / "serving/watch"
START_LIMIT, END_LIMIT = 420, 120  # seconds

NAMES = ("stock", "fast", "faithful", "hisa")
OURS = NAMES[1:]
PARTS = "hisa"  # the arm whose second rank parts in the end
RUNG = re.compile(r'^sglang_misa:rung\{(?=.*layer="(\w+)")(?=.*phase="(\w+)")(?=.*tp_rank="(\d)").*\} ([\d.]+)$', re.M)


@dataclass(frozen=True)
class Arm:
    """One server: its configuration, what SGLang's arguments add, and how many replicas answer."""

    config: dict[str, Any] | None
    words: str
    replicas: int = 1


def verified(name: str) -> dict[str, Any] | None:
    config = ARMS[name]
    return None if config is None else config | VERIFIED


SERVED = {
    **{name: Arm(verified(name), " ".join(EXACT_TOPK)) for name in NAMES},
    **{f"{name}-dp": Arm(verified(name), " ".join((*EXACT_TOPK, REPLICAS)), RANKS) for name in NAMES},
    "sinking-mtp": Arm(SINKING, f"{DRAFTS} --enable-metrics"),
}


@dataclass
class Heard:
    """What one server answered."""

    alone: list[Answer]  # to the long prompt, of each replica while the others idle
    together: list[Answer]  # to prompts that share a prefix of it, in one message
    status: list[dict[str, Any]]  # of each replica
    metrics: str


@dataclass
class Wave:
    """What came of all servers that ran side by side."""

    heard: dict[str, Heard] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)  # of servers that did not start, answer or end
    problems: dict[str, list[str]] = field(default_factory=dict)  # of ranks whose rows have other digests
    ended: dict[str, tuple[int, str]] = field(default_factory=dict)  # exit status and log of servers that ended

    def of(self, name: str) -> Heard:
        """What server `name` answered. Fails the test where it did not."""
        self._went_well(name)
        return self.heard[name]

    def end_of(self, name: str) -> tuple[int, str]:
        """Exit status and log of a server that had to end. Fails the test where it did not."""
        self._went_well(name)
        return self.ended[name]

    def _went_well(self, name: str) -> None:
        if name in self.failed:
            pytest.fail(f"{name}: {self.failed[name]}")

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """Keep what goes wrong with one server for its own tests."""
        try:
            yield
        except Exception as error:
            self.failed[name] = error


@pytest.fixture(scope="module")
def wave(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: None) -> Wave:
    """The servers of every collected test of this file, asked, and one of them parted."""
    if torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, got {torch.cuda.device_count()}")
    folder = Path(os.environ["OUT"]) / "ranks" if "OUT" in os.environ else tmp_path_factory.mktemp("ranks")
    folder.mkdir(parents=True, exist_ok=True)
    parted = folder / "parted"
    parted.unlink(missing_ok=True)
    items = [item for item in request.session.items if item.path == request.path]
    wanted = {name for item in items if hasattr(item, "callspec") for name in item.callspec.params["arms"]}
    names = [name for name in SERVED if name in wanted]
    servers: dict[str, Server] = {}
    python = {"PYTHONPATH": os.pathsep.join((str(WATCH), *filter(None, (os.environ.get("PYTHONPATH"),))))}
    spoiled = {
        PARTS: python | {"PARTED": str(parted), "PARTED_RANK": "1"},
        "undone": python | {"UNDONE_RANK": "1"},
    }
    started = {name: SERVED[name] for name in names} | {"undone": SERVED["fast"]}
    result = Wave()
    try:
        for number, (name, arm) in enumerate(started.items()):
            servers[name] = Server(
                arm.config,
                folder / f"{name}.log",
                f"{POOL} {arm.words}".split(),
                port=31000 + 20 * number,  # a server with replicas takes some ports behind its own
                ranks=RANKS,
                shape=replace(SHAPE, draft_layers=1),
                environ=EXACT_ENV | spoiled.get(name, {}),
            )
        deadline = time.monotonic() + START_LIMIT
        for name in names:
            with result.going_on(name):
                result.heard[name] = _hear(servers[name], SERVED[name], deadline)
        with result.going_on("undone"):
            result.ended["undone"] = servers["undone"].ended(END_LIMIT), _log(servers["undone"])
        if PARTS in result.heard:
            parted.touch()
            with result.going_on("parted"):
                result.ended["parted"] = _part(servers[PARTS])
    finally:
        stop(servers.values(), grace_s=2)
    result.problems = {
        name: server.rank_problems() for name, server in servers.items() if name in NAMES and name != PARTS
    }
    print(f"wave: {time.monotonic() - deadline + START_LIMIT:.0f} s", flush=True)
    return result


def _log(server: Server) -> str:
    return server.log.read_text(errors="replace")


def _hear(server: Server, arm: Arm, deadline: float) -> Heard:
    seconds = server.wait(max(deadline - time.monotonic(), 0))
    rng = np.random.default_rng(0)
    tail = "--enable-return-indexer-topk" in arm.words
    short, long = (rng.integers(2, SHAPE.vocab, length).tolist() for length in (SHORT, LONG))
    together = [long[:PREFIX] + rng.integers(2, SHAPE.vocab, length).tolist() for length in TAILS]
    replicas = range(arm.replicas) if arm.replicas > 1 else (None,)
    for replica in replicas:
        ask(server, [short], NEW_TOKENS, tail=False, replica=replica)
    alone = [ask(server, [long], NEW, tail=tail, replica=replica)[0] for replica in replicas]
    heard = ask(server, together, NEW, tail=tail)
    metrics = ""
    if "--enable-metrics" in arm.words:
        with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
    print(f"{server.log.stem}: ready {seconds:.0f} s after the servers before it were asked", flush=True)
    status = server.replicas()
    server.log.with_suffix(".status.json").write_text(json.dumps(status, indent=1))
    return Heard(alone, heard, status, metrics)


def _part(server: Server) -> tuple[int, str]:
    """A last prompt, which one rank selects for otherwise: nobody answers it, and the server ends."""
    prompt = np.random.default_rng(2).integers(2, SHAPE.vocab, LONG).tolist()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, [prompt], NEW, tail=False)
        status = server.ended(END_LIMIT)
        assert asked.exception(END_LIMIT) is not None
    return status, _log(server)


def each(*names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("arms", names, ids="-and-".join)


ALL_OURS = [(name,) for name in (*OURS, *(f"{name}-dp" for name in OURS), "sinking-mtp")]


@each(*ALL_OURS)
def test_policies_selected_in_both_phases(wave: Wave, arms: tuple[str]) -> None:
    for status in wave.of(arms[0]).status:
        seen = {"prefill": status["calls"]["prefill"], "decode": status["calls"]["decode"] | status["replays"]}
        assert all(seen[phase].get(policy) for phase, policy in status["policy"].items()), seen


@each(*((name,) for name in OURS), ("sinking-mtp",))
def test_ranks_compared_and_found_the_same(wave: Wave, arms: tuple[str]) -> None:
    (status,) = wave.of(arms[0]).status
    assert status["ranks_compared"] > NEW
    assert status["page_stats_verified"]["pages"] > 0
    assert status["page_stats_verified"]["mismatches"] == 0


@each(*((name,) for name in NAMES if name != PARTS))
def test_the_rows_of_every_rank_have_the_same_digest(wave: Wave, arms: tuple[str]) -> None:
    assert wave.of(arms[0]).alone
    assert wave.problems[arms[0]] == []


@each(*((name, f"{name}-dp") for name in NAMES))
def test_a_replica_beside_an_idle_one_selects_what_ranks_select(wave: Wave, arms: tuple[str, str]) -> None:
    ranks, replicas = (wave.of(name) for name in arms)
    (expected,) = ranks.alone
    prompt_rows = slice(0, 1 - NEW)
    for replica, answer in enumerate(replicas.alone):
        assert answer.cached <= PREFIX // 2, "it is the other replica that answered"
        found = overlaps(expected.selected[prompt_rows], answer.selected[prompt_rows])
        assert found[0] >= EQUAL, f"replica {replica}: overlap by layer {found}"


@each(*((f"{name}-dp",) for name in NAMES))
def test_replicas_answer_together(wave: Wave, arms: tuple[str]) -> None:
    heard = wave.of(arms[0])
    assert [len(answer.output_ids) for answer in heard.together] == [NEW] * len(TAILS)
    for status in heard.status if SERVED[arms[0]].config else ():
        assert status["page_stats_verified"]["pages"] > 0
        assert status["page_stats_verified"]["mismatches"] == 0


@each(("sinking-mtp",))
def test_a_floor_moves_the_same_layers_in_every_rank(wave: Wave, arms: tuple[str]) -> None:
    heard = wave.of(arms[0])
    rungs: list[dict[tuple[str, str], float]] = [{} for _ in range(RANKS)]
    for layer, phase, rank, rung in RUNG.findall(heard.metrics):
        rungs[int(rank)][phase, layer] = float(rung)
    assert {phase for phase, _ in rungs[0]} == {"prefill", "decode"}
    assert rungs[1] == rungs[0]
    assert all(answer.verified for answer in (*heard.alone, *heard.together)), "a request without a verified step"


@each(("fast",))
def test_a_hook_undone_in_one_rank_stops_the_launch_of_all(wave: Wave, arms: tuple[str]) -> None:
    status, log = wave.end_of("undone")
    assert status != 0
    assert "sglang-misa stops the launch" in log
    assert "_get_topk_ragged" in log


@each((PARTS,))
def test_ranks_that_part_stop_the_server(wave: Wave, arms: tuple[str]) -> None:
    assert wave.of(arms[0])
    status, log = wave.end_of("parted")
    assert status != 0
    assert f"expected all {RANKS} ranks to select the same in the last 1 steps, got other tokens in layers" in log
