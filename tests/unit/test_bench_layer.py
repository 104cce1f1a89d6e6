"""The bench's layer through the engine that serves where there is no GPU: what it measures is what it checks."""

import itertools

import pytest
import torch

from sglang_misa.bench import layer as bench
from sglang_misa.config import SelectionPolicy

K = bench.TOPK
POLICIES = {
    "misa": SelectionPolicy(heads=8),
    "residual": SelectionPolicy(heads=7, router="peak", residual=True, block_size=128),
    "reranked": SelectionPolicy(heads=7, router="peak", residual=True, candidates=K, block_size=128),
    "hisa": SelectionPolicy(blocks=17, block_size=128),
    "exact": SelectionPolicy(exact=True),
}


def prefill(policy: SelectionPolicy, rows: int, requests: int, source: str = "topics"):
    shape = bench.Shape("prefill", 32, rows, K + 700, source, requests, device="cpu")
    layer = bench.Layer.make(shape)
    engine = bench.engine_of(policy, shape, [layer.index_k_pages])
    select, slots = bench.extend(policy, layer, engine)
    select()
    return layer, engine, slots


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("requests", [1, 2])
def test_an_extend_call_selects_what_its_check_expects(name: str, requests: int) -> None:
    layer, engine, slots = prefill(POLICIES[name], 4, requests)
    verdict = bench.judge(POLICIES[name], layer, engine, 0, slots)
    assert verdict.flaw is None
    assert 0.5 < verdict.recall <= 1
    if name == "exact":
        assert verdict.recall > 0.999


def test_a_planted_wrong_row_is_found() -> None:
    layer, engine, slots = prefill(POLICIES["misa"], 3, 1)
    slots[1] = slots[2]
    assert "row 1" in bench.judge(POLICIES["misa"], layer, engine, 0, slots).flaw


def test_a_slot_of_another_request_is_found() -> None:
    layer, engine, slots = prefill(POLICIES["misa"], 2, 2)
    slots[0, 5] = slots[1, 5]
    assert "row 0" in bench.judge(POLICIES["misa"], layer, engine, 0, slots).flaw


def decode(policy: SelectionPolicy):
    shape = bench.Shape("decode", 32, 2, K + 900, "topics", device="cpu")
    layer = bench.Layer.make(shape)
    engine = bench.engine_of(policy, shape, [layer.index_k_pages])
    layer.keep_statistics(engine)
    call = layer.decode_call(0, torch.full((2, K), -1, dtype=torch.int32))
    engine.decode(call, policy)
    return layer, engine, call


def test_a_decode_step_selects_what_its_check_expects() -> None:
    policy = POLICIES["hisa"]
    layer, engine, call = decode(policy)
    assert bench.judge(policy, layer, engine, 0, call.ids).flaw is None
    call.ids[0, 0] = call.ids[0, 1]
    assert "row 0" in bench.judge(policy, layer, engine, 0, call.ids).flaw


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("heads", [None, 7])
def test_a_decode_step_over_sketches_selects_what_its_check_expects(bits: int, heads: int | None) -> None:
    routed = {} if heads is None else {"heads": heads, "router": "peak", "residual": True}
    policy = SelectionPolicy(sketch=bits, candidates=K + 256, block_size=64, **routed)
    layer, engine, call = decode(policy)
    verdict = bench.judge(policy, layer, engine, 0, call.ids)
    assert verdict.flaw is None
    assert verdict.recall > 0.9
    call.ids[0] = call.ids[1]
    assert "row 0" in bench.judge(policy, layer, engine, 0, call.ids).flaw


@pytest.mark.parametrize("count", [1, 2, 22, 23, 24, 64, 4096, 8192])
def test_rows_that_are_checked_lie_anywhere_in_a_row_block(count: int) -> None:
    """Over some cases; at both ends and spread over the call in each."""
    block = min(16, count)
    cases = [bench.checked_rows(count, str(case)) for case in range(60)]
    for rows in cases:
        assert min(count, 22) <= len(rows) <= bench.CHECKED_ROWS
        assert rows == sorted(set(rows))
        assert (rows[0], rows[-1]) == (0, count - 1)
        assert all(after - before < 2 * -(-count // 22) for before, after in itertools.pairwise(rows))
    assert {row % block for rows in cases for row in rows[1:-1] or rows} == set(range(block))
    assert cases[0] == bench.checked_rows(count, "0"), "the same for the same case"
