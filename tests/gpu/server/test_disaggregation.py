"""Prefill on one server, decode on another of the same GPU: statistics of pages that came by Mooncake over TCP.

Skipped without the package mooncake-transfer-engine-cuda13 and its libibverbs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.server.servers import SHAPE, Server, ask, common_prefix, decode_steps, post, stop

from sglang_misa.procs import free_port

pytest.importorskip(
    "mooncake.engine", reason="needs mooncake-transfer-engine-cuda13 and libibverbs", exc_type=ImportError
)

LENGTHS, NEW = (3000, 20000, 6400, 2496), 100  # every request completes a page of its own
SKETCHED = {"heads": 7, "router": "peak", "residual": True, "sketch": 2, "candidates": 4096, "block_size": 64}
DECODE = {"decode": {**SKETCHED, "min_len": 2048}}
ENVIRON = {"MOONCAKE_PROTOCOL": "tcp", "SGLANG_HOST_IP": "127.0.0.1", "SGLANG_LOCAL_IP_NIC": "lo"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Iterator[tuple[dict[str, Server], int]]:
    """One that does both, and two that share the work; and the port where the two meet."""
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else tmp_path_factory.mktemp("disaggregation")
    meeting = free_port()
    transfer = f"--disaggregation-transfer-backend mooncake --disaggregation-bootstrap-port {meeting}"
    watched = DECODE | {"verify_stats": "raise"}
    arms: dict[str, tuple[dict[str, Any] | None, str]] = {
        "both": (watched, ""),
        "prefill": (None, f"{transfer} --disaggregation-mode prefill"),
        "decode": (watched | {"allow_unverified": True}, f"{transfer} --disaggregation-mode decode"),
    }
    started = {
        name: Server(config, folder / f"{name}.log", flags.split(), environ=ENVIRON)
        for name, (config, flags) in arms.items()
    }
    try:
        for server in started.values():
            server.wait()
        yield started, meeting
    finally:
        stop(started.values())


def test_decode_selects_by_statistics_of_its_own(servers: tuple[dict[str, Server], int]) -> None:
    started, meeting = servers
    both, decode = started["both"], started["decode"]
    rng = np.random.default_rng(0)
    agreed = []
    for number, length in enumerate(LENGTHS, start=1):
        prompt = rng.integers(2, SHAPE.vocab, length).tolist()
        (expected,) = ask(both, [prompt], NEW, tail=False)
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": meeting,
            "bootstrap_room": number,
        }
        urls = [f"{each.url}/generate" for each in (started["prefill"], decode)]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(post, urls, [body, body]))[1]["output_ids"]
        assert len(got) == NEW
        agreed.append(common_prefix(got, expected.output_ids))
    print(
        "leading tokens that agree with one server:", agreed, "of", NEW, "each;", decode.misa()["page_stats_verified"]
    )
    steps = decode_steps(decode)
    assert sum(count for path, count in steps.items() if path != "dsa") > 0, steps
    for server in (both, decode):
        seen = server.misa()["page_stats_verified"]
        assert seen["pages"] > 0
        assert seen["mismatches"] == 0
    assert min(agreed) > 0, "a server that decodes on what another wrote begins as one that did both"
