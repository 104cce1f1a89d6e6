"""Every preset through the engine that serves, on inputs by name, at full size: sampled rows against fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_misa.bench import inputs
from sglang_misa.bench import layer as bench
from sglang_misa.call import spans
from sglang_misa.config import PRESETS, Phase, SelectionPolicy
from sglang_misa.selection import runs

K = bench.TOPK
TRAINED = Path(__file__).parents[3] / "shared/trained/layer2.safetensors"
SOURCES = ["random", "topics", *(f"hostile:{name}" for name in inputs.names())]


def presets(phase: Phase) -> list[str]:
    return [name for name, config in PRESETS.items() if config.policy(phase).active and name != "misa-hisa"]


def assert_extends(policy: SelectionPolicy, shape: bench.Shape) -> None:
    layer = bench.Layer.make(shape)
    engine = bench.engine_of(policy, shape, [layer.index_k_pages])
    select, slots = bench.extend(policy, layer, engine)
    select()
    verdict = bench.judge(policy, layer, engine, 0, slots)
    assert verdict.flaw is None, verdict.flaw
    if policy.exact:
        assert verdict.recall > 0.995


def assert_decodes(policy: SelectionPolicy, shape: bench.Shape, repeats: int = 5) -> None:
    layer = bench.Layer.make(shape)
    engine = bench.engine_of(policy, shape, [layer.index_k_pages])
    layer.keep_statistics(engine)
    call = layer.decode_call(0, torch.full((shape.rows, K), -1, dtype=torch.int32, device="cuda"))
    engine.decode(call, policy)
    verdict = bench.judge(policy, layer, engine, 0, call.ids)
    assert verdict.flaw is None, verdict.flaw
    first = call.ids.sort(1).values
    for _ in range(repeats):
        engine.decode(call, policy)
        assert torch.equal(call.ids.sort(1).values, first), "differs between repeats"


@pytest.mark.parametrize("name", presets("prefill"))
@pytest.mark.parametrize("source", SOURCES)
def test_prefill_on_any_input(name: str, source: str) -> None:
    assert_extends(PRESETS[name].prefill, bench.Shape("prefill", 64, 64, 30000, source))


@pytest.mark.parametrize("name", presets("prefill"))
@pytest.mark.parametrize("index_heads", [64, 32])
@pytest.mark.parametrize(
    ("rows", "length", "requests"), [(1, 131072, 1), (512, 131072, 1), (64, 20000, 64), (96, 9000, 3)]
)
def test_prefill_of_any_shape(name: str, index_heads: int, rows: int, length: int, requests: int) -> None:
    assert_extends(PRESETS[name].prefill, bench.Shape("prefill", index_heads, rows, length, "topics", requests))


@pytest.mark.parametrize("name", ["fast", "faithful"])
def test_of_prompts_that_end_in_a_call_the_tails_are_selected_by_all_heads(name: str) -> None:
    rows, length, requests = 200, 20000, 3
    layer = bench.Layer.make(bench.Shape("prefill", 64, requests * rows, length, "topics", requests))
    policy = PRESETS[name].prefill.model_copy(update={"min_len": 0})
    engine = bench.engine_of(policy, layer.shape, [layer.index_k_pages])

    def selected(by: SelectionPolicy, prompts: Sequence[int]) -> torch.Tensor:
        ids = torch.full((requests * rows, K), -1, dtype=torch.int32, device="cuda")
        call = replace(layer.extend_call(ids), spans=spans([rows] * requests, [length] * requests, prompts))
        engine.extend(call, runs(by, call.spans))
        return ids.sort(1).values

    is_tail = (torch.arange(requests * rows) % rows >= rows - policy.tail) & (layer.row_batch.cpu() != 1)
    found = selected(policy, [length, length + policy.tail, length])
    assert torch.equal(found[~is_tail], selected(policy, ())[~is_tail])
    assert torch.equal(found[is_tail], selected(SelectionPolicy(exact=True, min_len=0), ())[is_tail])


@pytest.mark.skipif(not TRAINED.exists(), reason=f"needs {TRAINED}")
@pytest.mark.parametrize("name", presets("prefill"))
def test_prefill_of_trained_tensors(name: str) -> None:
    assert_extends(PRESETS[name].prefill, bench.Shape("prefill", 64, 128, 131072, f"trained:{TRAINED}"))


@pytest.mark.parametrize("name", presets("decode"))
@pytest.mark.parametrize("source", SOURCES)
def test_decode_on_any_input(name: str, source: str) -> None:
    assert_decodes(PRESETS[name].decode, bench.Shape("decode", 64, 5, 40000, source))


@pytest.mark.parametrize("name", presets("decode"))
@pytest.mark.parametrize("index_heads", [64, 32])
@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("length", [1, 63, 64, 65, K - 1, K, K + 1, 8191, 8192, 8193, 8320, 131071, 131072])
def test_decode_of_any_length(name: str, index_heads: int, rows: int, length: int) -> None:
    assert_decodes(PRESETS[name].decode, bench.Shape("decode", index_heads, rows, length, "topics"))


@pytest.mark.parametrize("name", presets("decode"))
@pytest.mark.parametrize("rows", [17, 64])
def test_every_step_of_many_rows_is_the_same(name: str, rows: int) -> None:
    """A race between copies and loads shows in one step of a hundred."""
    assert_decodes(PRESETS[name].decode, bench.Shape("decode", 64, rows, 131072, "random"), repeats=500)


@pytest.mark.parametrize("name", presets("decode"))
def test_decode_of_no_more_tokens_than_are_kept_is_dsa(name: str) -> None:
    policy = PRESETS[name].decode
    kept = policy.candidates or (policy.blocks or 0) * policy.block_size
    shape = bench.Shape("decode", 64, 4, kept, "topics")
    layer = bench.Layer.make(shape)
    engine = bench.engine_of(policy, shape, [layer.index_k_pages])
    layer.keep_statistics(engine)
    call = layer.decode_call(0, torch.full((4, K), -1, dtype=torch.int32, device="cuda"))
    engine.decode(call, policy)
    assert bench.judge(SelectionPolicy(), layer, engine, 0, call.ids).flaw is None


@pytest.mark.skipif(not TRAINED.exists(), reason=f"needs {TRAINED}")
@pytest.mark.parametrize("name", presets("decode"))
def test_decode_of_trained_tensors(name: str) -> None:
    assert_decodes(PRESETS[name].decode, bench.Shape("decode", 64, 8, 131072, f"trained:{TRAINED}"))
