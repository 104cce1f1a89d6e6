"""The main job through HTTP: SGLang 0.5.17 on the CPU platform, MISA selecting in prefill and HISA in decode."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import pytest
import requests
from serving_reference import index_tensors, misa_selection
from serving_server import CONFIG, SHAPE, Server, start, stop

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

LENGTH = 600
OVERLAP = 0.97  # bf16 and ties move the rest


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def sets(selections: np.ndarray, layer: int = 0) -> list[set[int]]:
    return [set(row[row >= 0].tolist()) for row in selections[:, layer]]


def test_selection_is_the_independent_one(server: Server) -> None:
    ids = prompt(0)
    chosen = sets(server.selections(server.generate(ids, 1, return_indexer_topk=True)))[:LENGTH]
    q, gates, keys = index_tensors(server.model, ids)
    for row in range(SHAPE.index_topk):
        assert chosen[row] == set(range(row + 1))
    policy = CONFIG.prefill
    overlap = []
    for row in range(SHAPE.index_topk, LENGTH):
        heads = policy.heads if row + 1 >= policy.min_len else SHAPE.index_heads
        expected = misa_selection(q, gates, keys, row, heads, policy.block_size, SHAPE.index_topk)
        assert max(chosen[row]) <= row
        overlap.append(len(chosen[row] & expected) / SHAPE.index_topk)
    assert np.mean(overlap) >= OVERLAP, np.mean(overlap)
    dense = [
        len(chosen[r] & misa_selection(q, gates, keys, r, SHAPE.index_heads, policy.block_size, SHAPE.index_topk))
        for r in range(policy.min_len, LENGTH)
    ]
    assert np.mean(dense) / SHAPE.index_topk < OVERLAP  # so the check above tells MISA from stock DSA


def test_radix_hit_is_the_cold_run(server: Server) -> None:
    ids = prompt(1)
    assert server.post("/flush_cache").ok
    cold = server.generate(ids, return_indexer_topk=True)
    warm = server.generate(ids, return_indexer_topk=True)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] == LENGTH // 64 * 64
    assert warm["output_ids"] == cold["output_ids"]
    for layer in range(SHAPE.layers):
        assert sets(server.selections(warm), layer) == sets(server.selections(cold), layer)


def test_shared_prefix_is_cached_and_flush_empties_it(server: Server) -> None:
    ids = prompt(2)
    server.generate(ids)
    assert server.generate([*ids[:300], *prompt(3, 100)])["meta_info"]["cached_tokens"] == 256
    assert server.post("/flush_cache").ok
    assert server.generate(ids)["meta_info"]["cached_tokens"] == 0


def test_four_at_a_time(server: Server) -> None:
    prompts = [prompt(seed, 150 + 70 * seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.generate, prompts))
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [len(p) for p in prompts]


def test_chat_and_streaming(server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello " * 40}], "max_tokens": 4}
    answer = server.post("/v1/chat/completions", body)
    assert answer.ok
    assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
    with server.post("/v1/chat/completions", {**body, "stream": True}, stream=True) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == b"data: [DONE]"
    assert all("choices" in json.loads(line.removeprefix(b"data: ")) for line in lines[:-1])


def test_a_client_that_leaves_does_not_hurt(server: Server) -> None:
    body = {"input_ids": prompt(4), "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}, "stream": True}
    with server.post("/generate", body, stream=True) as stream:
        next(stream.iter_lines())
    assert len(server.generate(prompt(5, 200))["output_ids"]) == 4
    assert server.get("/health").ok


@pytest.mark.parametrize("body", [{"input_ids": [1] * 200_000}, {"text": ""}, {"input_ids": []}])
def test_bad_prompts_get_an_error_and_the_server_lives(server: Server, body: dict[str, object]) -> None:
    answer = server.post("/generate", {**body, "sampling_params": {"max_new_tokens": 1}})
    assert 400 <= answer.status_code < 500
    assert "error" in answer.json()
    assert server.get("/health").ok


def test_status_says_what_ran(server: Server) -> None:
    server.generate(prompt(6))
    status = server.status()
    assert status["enabled"]
    assert status["policy"] == {"prefill": "misa", "decode": "hisa"}
    assert status["calls"]["prefill"]["misa"] > 0
    assert status["calls"]["decode"]["hisa"] > 0
    assert set(status["recall"]) == {str(layer) for layer in range(SHAPE.layers)}
    assert all(0 < layer["recall"] <= 1 and layer["rows"] > 0 for layer in status["recall"].values())


def test_a_port_in_use_is_refused(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    other = start(server.model, tmp_path / "log", "--port", port)
    assert other.process.wait(60) == 2
    assert f"got {port}" in other.log.read_text()
    assert requests.get(server.url + "/health", timeout=60).ok


def test_a_model_without_sparse_attention_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    refused = start(folder, tmp_path / "log")
    assert refused.process.wait(60) == 2
    assert "got LlamaForCausalLM" in refused.log.read_text()


def test_a_sabotaged_hook_does_not_serve(server: Server, tmp_path: Path) -> None:
    """Other code puts SGLang's own method back after ours was armed: the launch must end."""
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    broken = start(server.model, tmp_path / "log", PYTHONPATH=str(tmp_path))
    try:
        assert broken.process.wait(300) != 0
        assert "_get_topk_ragged" in broken.log.read_text()
    finally:
        stop(broken)


# Read by every Python process of the launch: when SGLang has built the model, one patch is undone.
SABOTAGE = """
import sys
import torch

evaluate = torch.nn.Module.eval

def undo(module):
    indexer = sys.modules.get("sglang.srt.layers.attention.dsa.dsa_indexer")
    if indexer is not None:
        method = indexer.Indexer._get_topk_ragged
        indexer.Indexer._get_topk_ragged = getattr(method, "__wrapped__", method)
    return evaluate(module)

torch.nn.Module.eval = undo
"""
