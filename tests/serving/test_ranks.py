"""Two ranks of a server, on a core each: they select the same, know it, and neither goes on without the other.

`tests/gpu/server/test_ranks.py` asks the same of GPUs.
"""

import http.client
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_misa import versions
from sglang_misa.config import PRESETS
from sglang_misa.procs import free_port

RANKS = 2
FAITHFUL = PRESETS["faithful"].prefill.label
RUNG = re.compile(r'^sglang_misa:rung\{(?=.*layer="(\w+)")(?=.*phase="(\w+)")(?=.*tp_rank="(\d)").*\} ([\d.]+)$', re.M)
STOP_LIMIT = 120  # seconds that a server may take to end once its ranks have parted

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < RANKS, reason="SGLang wants a core for each rank"),
]


@pytest.fixture(scope="module")
def of_ranks() -> dict[str, str]:
    """What the environment of a server with two ranks needs."""
    return {
        "OMP_NUM_THREADS": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:RANKS])),
        "SGLANG_NCCL_SO_PATH": "/nowhere",  # with NCCL at hand SGLang makes a communicator, which the CPU cannot have
    }


@pytest.fixture
def prompts() -> Iterator[list[int]]:
    numbers = random.Random(1)
    return ([numbers.randrange(2, 300) for _ in range(length)] for length in (700, 40, 900, 300, 500))


def rungs(metrics: str) -> list[dict[tuple[str, str], float]]:
    """By rank, the rung of each ladder that has moved."""
    found: list[dict[tuple[str, str], float]] = [{} for _ in range(RANKS)]
    for layer, phase, rank, rung in RUNG.findall(metrics):
        found[int(rank)][phase, layer] = float(rung)
    return found


def test_all_ranks_select_the_same_sets(
    start: Any, model: Path, tmp_path: Path, of_ranks: dict[str, str], prompts: Iterator[list[int]]
) -> None:
    selections, parted = tmp_path / "selections", tmp_path / "parted"
    selections.mkdir()
    words = "--misa-audit-rows 64 --misa-recall-floor 0.99 --misa-verify-ranks 2 --misa-verify-stats raise"
    watched = {"WATCH_SELECTIONS": str(selections), "PARTED_RANK": "1", "PARTED": str(parted)}
    with start(f"--tp {RANKS} --enable-metrics {words}", model, tmp_path / "log", **of_ranks, **watched) as server:
        for _ in range(4):
            server.generate(next(prompts), new=6)
        status, metrics = server.misa(), server.request("/metrics")[1].decode()
        logs = [log.read_text().splitlines() for log in selections.iterdir()]
        parted.touch()
        with pytest.raises((OSError, http.client.HTTPException)):
            server.generate(next(prompts))
        server.process.wait(STOP_LIMIT)
    assert {rows["policy"] for rows in status["ladder"]["prefill"].values()} <= {"dsa", FAITHFUL}
    first, *others = rungs(metrics)
    assert first
    assert others == [first]
    assert "sglang:prompt_tokens_total" in metrics  # the HTTP process's own: prometheus_client was imported in time
    assert status["ranks_compared"] > 0
    assert status["page_stats_verified"]["mismatches"] == 0
    assert len(logs) == RANKS
    assert {line.split()[0] for line in logs[0]} == {"get_topk_ragged", "get_topk_paged"}
    done = min(map(len, logs))  # one may be a step ahead
    assert logs[0][:done] == logs[1][:done]
    assert f"expected all {RANKS} ranks to select the same in the last 2 steps" in (tmp_path / "log").read_text()


@pytest.mark.skipif(versions.installed() == "0.5.17", reason="its data-parallel attention needs a GPU")
def test_replicas_select_alike_while_the_other_one_idles(
    start: Any, model: Path, tmp_path: Path, of_ranks: dict[str, str], prompts: Iterator[list[int]], together: Any
) -> None:
    words = f"--tp {RANKS} --dp {RANKS} --enable-dp-attention --misa-verify-stats raise --enable-return-indexer-topk"
    with start(words, model, tmp_path / "log", **of_ranks) as server:
        prompt = next(prompts)
        extra = {"return_indexer_topk": True}
        bodies = [server.body(prompt, 70) | extra | {"routed_dp_rank": replica} for replica in range(RANKS)]
        alone = [server.json("/generate", body) for body in bodies]
        both = together(lambda body: server.json("/generate", body), bodies)
        statuses = [state["misa"] for state in server.json("/server_info")["internal_states"]]
    assert [answer["meta_info"]["cached_tokens"] for answer in alone] == [0] * RANKS, "each replica answered"
    assert alone[0]["output_ids"] == alone[1]["output_ids"]
    assert alone[0]["meta_info"]["indexer_topk"] == alone[1]["meta_info"]["indexer_topk"]
    assert [answer["output_ids"] for answer in both] == [answer["output_ids"] for answer in alone]
    for status in statuses:
        assert all(status["calls"][phase][path] for phase, path in status["policy"].items())
        assert status["page_stats_verified"]["pages"] > 0
        assert status["page_stats_verified"]["mismatches"] == 0


def test_a_hook_undone_in_one_rank_stops_the_launch_of_all(
    begin: Any, model: Path, tmp_path: Path, of_ranks: dict[str, str]
) -> None:
    words = f"--misa-preset misa-hier --misa-prefill-candidates 64 --device cpu --tp {RANKS} --port {free_port()}"
    ended = begin(*words.split(), "--model-path", model, **of_ranks, UNDONE_RANK="1")()
    assert ended.returncode != 0
    assert "sglang-misa stops the launch" in ended.stdout
    assert "_get_topk_ragged" in ended.stdout
