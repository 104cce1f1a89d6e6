"""Speculative decoding (multi-token prediction) must not change what a server generates.

Two servers an arm, one of them with a draft layer. Verification is greedy, so whatever is drafted, the tokens are the
target's: both servers give the same until two logits nearly tie, as they multiply matrices of other shapes. The weights
are random, so nearly every draft is refused, and its keys are written over by the next step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu.server.servers import SHAPE, Server, ask, common_prefix, decode_steps, stop
from gpu.server.setups import ARMS, DRAFTS, GATED

LENGTHS = (4096, 40960)  # on both sides of the gate
TOGETHER, NEW_TOKENS = 4, 16  # prompts in a message
AGREE = 4  # leading tokens in which an answer must agree, in half of the answers
STOCK_AGREES = 2  # and one of stock: with 0.5.23 its own drafts left 6, 1, 3 and 2 alike


@pytest.fixture(scope="module", params=["stock", "misa-hisa"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Servers of one arm: without drafts and with them."""
    arm: str = request.param
    folder = Path(os.environ["OUT"]) / "mtp" if "OUT" in os.environ else tmp_path_factory.mktemp("mtp")
    folder.mkdir(parents=True, exist_ok=True)
    servers: list[Server] = []
    try:
        for name, flags in ((arm, []), (f"{arm}-mtp", DRAFTS.split())):
            shape = replace(SHAPE, draft_layers=1)
            servers.append(Server(ARMS[arm], folder / f"{name}.log", flags, shape=shape))
        for server in servers:
            server.wait()
            ask(server, [[5] * 3000], 4, tail=False)
        yield servers[0], servers[1]
    finally:
        stop(servers)


@pytest.mark.parametrize("length", LENGTHS)
def test_drafts_change_no_answer(pair: tuple[Server, Server], length: int) -> None:
    plain, drafting = pair
    rng = np.random.default_rng(length)
    prompts = [rng.integers(2, SHAPE.vocab, length).tolist() for _ in range(TOGETHER)]
    expected = ask(plain, prompts, NEW_TOKENS, tail=False)
    before = decode_steps(drafting)
    answers = ask(drafting, prompts, NEW_TOKENS, tail=False)
    sides = {path for path, count in decode_steps(drafting).items() if count > before.get(path, 0)}
    same = [common_prefix(a.output_ids, b.output_ids) for a, b in zip(expected, answers, strict=True)]
    assert all(answer.verified for answer in answers), "a request without a verified step"
    agree = AGREE if drafting.misa() else STOCK_AGREES
    assert 2 * sum(count >= agree for count in same) >= TOGETHER, f"equal leading tokens: {same}"
    if drafting.misa():
        assert sides == {"dsa" if length + NEW_TOKENS < GATED["decode"]["min_len"] else "hisa"}
