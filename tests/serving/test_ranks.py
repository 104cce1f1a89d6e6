"""Tensor parallelism: every rank selects for itself, and all of them select the same, also while layers sink."""

import os
import random
from pathlib import Path

import pytest

from sglang_misa.config import PRESETS

pytestmark = pytest.mark.serving

RANKS = 2
FAITHFUL = PRESETS["faithful"].prefill.label


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < RANKS, reason="SGLang wants a core for each rank")
def test_all_ranks_select_the_same_sets(start, model: Path, tmp_path: Path) -> None:
    selections = tmp_path / "selections"
    selections.mkdir()
    cores = sorted(os.sched_getaffinity(0))[:RANKS]
    with start(
        f"--tp {RANKS} --misa-audit-rows 64 --misa-recall-floor 0.99",
        model,
        tmp_path / "log",
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(Path(__file__).parent / "watch"),
        WATCH_SELECTIONS=str(selections),
        SGLANG_CPU_OMP_THREADS_BIND="|".join(map(str, cores)),
        SGLANG_NCCL_SO_PATH="/nowhere",  # with NCCL at hand SGLang makes a communicator, which the CPU cannot have
    ) as server:
        numbers = random.Random(1)
        for length in (700, 40, 900, 300):
            server.generate([numbers.randrange(2, 300) for _ in range(length)], new=6)
        status = server.misa()
    assert {rows["policy"] for rows in status["ladder"]["prefill"].values()} <= {"dsa", FAITHFUL}
    assert status["ladder"]["prefill"]
    logs = [log.read_text().splitlines() for log in selections.iterdir()]
    assert len(logs) == RANKS
    assert {line.split()[0] for line in logs[0]} == {"get_topk_ragged", "get_topk_paged"}
    assert logs[0] == logs[1]
