"""Processes that are the ranks of one gloo group, for what ranks decide together."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

RANKS = 2
Work = Callable[[int, distributed.ProcessGroup], Any]


def told_by_ranks(work: Work, folder: Path) -> list[Any]:
    """What `work(rank, peers)`, a function of a module, returns in each of RANKS processes. Fails where one does.

    folder: an empty one, where they meet.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_run, args=(rank, str(folder / "store"), work, results)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    told = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return [told[rank] for rank in range(RANKS)]


def _run(rank: int, store: str, work: Work, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
    results.put((rank, work(rank, distributed.new_group(range(RANKS), backend="gloo"))))
    distributed.destroy_process_group()
