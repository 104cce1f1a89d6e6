"""With an fp8 KV cache and SGLang's fused top-k, `exact` must not change what a server generates.

Prefill's selection is then an offset into the keys that the extend call gathered, over all of its requests, and no
longer a position of its own request. Sets cannot be compared (they are slots), so greedy tokens are.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from gpu.server.servers import SHAPE, Server, ask, common_prefix, stop
from gpu.server.setups import ARMS, FP8_KV

LENGTHS = (4096, 9000, 20000, 2100)  # of the prompts that share an extend call
NEW_TOKENS = 16
AGREE = 4  # leading tokens in which an answer must agree, in half of the answers: logits of random weights nearly tie


def test_exact_selection_changes_no_answer(tmp_path: Path, installed: None) -> None:
    folder = Path(os.environ["OUT"]) / "fp8" if "OUT" in os.environ else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, SHAPE.vocab, length).tolist() for length in LENGTHS]
    servers: list[Server] = []
    try:
        for arm in ("stock", "exact"):
            servers.append(Server(ARMS[arm], folder / f"{arm}.log", FP8_KV.split()))
        answers = []
        for server in servers:
            server.wait()
            ask(server, [[5] * 3000], 4, tail=False)
            answers.append(ask(server, prompts, NEW_TOKENS, tail=False))
        calls = servers[1].misa()["calls"]["prefill"]
    finally:
        stop(servers)
    same = [common_prefix(a.output_ids, b.output_ids) for a, b in zip(*answers, strict=True)]
    assert 2 * sum(count >= AGREE for count in same) >= len(prompts), f"equal leading tokens: {same}"
    assert calls.get("exact"), f"got calls {calls}"
