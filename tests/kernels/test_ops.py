"""The public operations: kernels agree with their reference twins, twins with oracles, and SGLang is not needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import op_cases
import pytest
import torch
from oracles import OUTSIDE, Extend, stable_best
from torch import Tensor

from sglang_misa import ops
from sglang_misa.kernels.layout import Router


@pytest.mark.parametrize("case", op_cases.ON_TRITON, ids=lambda case: case.__name__)
def test_kernels_and_reference_agree(case, device: str) -> None:
    op_cases.assert_agree(case, device)


def test_every_operation_has_a_case() -> None:
    functions = {name for name in ops.__all__ if name.islower()} - {"sketch_bytes"}
    assert {case.__name__ for case in op_cases.CASES} == functions


def positions(found: Tensor, row: int) -> Tensor:
    return found[row][found[row] >= 0].long().sort().values


@pytest.mark.parametrize("residual", [False, True])
def test_the_twins_of_prefill_are_the_oracles(residual: bool) -> None:
    """The CUDA kernels themselves are held to these oracles on the CPU (test_topk_*_on_cpu) and on GPUs."""
    x: Extend = op_cases.rows("cpu", residual=residual)
    routed = ops.topk_routed(*x.operands, op_cases.output(x), backend="reference")
    reranked = ops.topk_reranked(*x.operands, 256, op_cases.output(x), backend="reference")
    for row in range(0, x.rows, 3):
        cheap, full = (x.exact_scores(row, routed=word) for word in (True, False))
        assert torch.equal(positions(routed, row), stable_best(cheap, op_cases.TOPK) - x.ks[row])
        among = torch.full_like(full, OUTSIDE)
        best = stable_best(cheap, 256)
        among[best] = full[best]
        assert torch.equal(positions(reranked, row), stable_best(among, op_cases.TOPK) - x.ks[row])


def test_all_heads_and_all_blocks_are_dsa() -> None:
    x = op_cases.rows("cpu")
    every = torch.arange(64, dtype=torch.int32).expand(x.rows, -1).contiguous()
    queries, keys, _ = x.operands
    exact = ops.topk_routed(queries, keys, ops.RoutedHeads(every), op_cases.output(x), backend="reference")
    scores = torch.zeros(x.rows, 24)
    blocks = ops.topk_blocks(queries, keys, scores, 24, 64, op_cases.output(x), backend="reference")
    for row in range(0, x.rows, 5):
        best = stable_best(x.exact_scores(row, routed=False), op_cases.TOPK) - x.ks[row]
        assert torch.equal(positions(exact, row), best)
        assert torch.equal(positions(blocks, row), best)


def test_routing_follows_the_statistic_of_the_paper() -> None:
    index_q, gates, blocks = op_cases._routing("cpu")
    routed = ops.route(index_q, gates, blocks, 7, backend="reference")
    row, means = 69, blocks.block_means
    count = min(int(blocks.row_len[row]) // 64, means.shape[1])
    products = (index_q[row].float() @ means[blocks.row_batch[row], :count].float().T).relu()
    best = (gates[row].abs() * products.mean(1)).sort(descending=True, stable=True).indices[:7].sort().values
    assert torch.equal(routed.head_ids[row].long(), best)
    assert (routed.residual.scale > 0).all()


def test_a_wrong_backend_and_a_wrong_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = op_cases.rows("cpu")
    with pytest.raises(ValueError, match='expected "kernels" or "reference", got \'gpu\''):
        ops.topk_routed(*x.operands, op_cases.output(x), backend="gpu")  # type: ignore[arg-type]
    monkeypatch.setattr(ops.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match='got cpu; move them, or pass backend="reference"'):
        ops.topk_routed(*x.operands, op_cases.output(x))


def wrong_calls() -> dict[str, Callable[[], object]]:
    """Calls of the reference twins that no kernel takes, by what is wrong with them."""
    x, (queries, pages) = op_cases.rows("cpu"), op_cases._decoding("cpu")
    rows, keys, heads = x.operands
    place, scores = op_cases.output(x), torch.zeros(x.rows, 24)
    index_q, gates, blocks = op_cases._routing("cpu")
    pool, table, lens = op_cases.pages("cpu")
    few, policy = ops.Output(place.ids[1:]), ops.SketchPolicy(8, "peak", residual=False, candidates=128)

    def route(
        heads: int = 7, q: Tensor = index_q, w: Tensor = gates, size: int = 64, router: Router = "error"
    ) -> object:
        return ops.route(q, w, replace(blocks, block_size=size), heads, router=router, backend="reference")

    def statistics(size: int = 64, means: Tensor = pages.means) -> object:
        return ops.page_statistics(pool, table, lens, size, page_means=means, backend="reference")

    def pruned(blocks: int, size: int, k: int = op_cases.TOPK) -> object:
        return ops.decode_topk_blocks(queries, pages.means, blocks, size, k, backend="reference")

    return {
        "heads": lambda: route(heads=64),
        "heads: expected 1 to 63": lambda: route(heads=0),
        "router": lambda: route(router="loudest"),  # type: ignore[arg-type]
        "index_q": lambda: route(q=index_q.half()),
        "head_gates": lambda: route(w=gates[1:]),
        "block_size": lambda: route(size=100),
        "block_size: expected a positive": lambda: statistics(size=0),
        "page_means": lambda: statistics(means=pages.means.float()),
        "head_ids": lambda: ops.topk_routed(
            rows, keys, ops.RoutedHeads(heads.head_ids.long()), place, backend="reference"
        ),
        "ids": lambda: ops.topk_routed(rows, keys, heads, few, backend="reference"),
        "k_scale": lambda: ops.topk_routed(
            rows, replace(keys, k_scale=keys.k_scale[1:]), heads, place, backend="reference"
        ),
        "candidates": lambda: ops.topk_reranked(rows, keys, heads, 50, place, backend="reference"),
        "block_scores": lambda: ops.topk_blocks(rows, keys, scores.half(), 4, 64, place, backend="reference"),
        "blocks": lambda: ops.topk_blocks(rows, keys, scores, 1, 128, place, backend="reference"),
        "blocks: expected 2 or more": lambda: pruned(1, 128),
        "k: expected 1 or more": lambda: pruned(4, 64, k=0),
        "candidates: .* k = 129": lambda: ops.decode_topk_sketched(queries, pages, policy, 129, backend="reference"),
        "seq_lens": lambda: ops.decode_topk_sketched(
            replace(queries, seq_lens=queries.seq_lens.long()), pages, policy, 96, backend="reference"
        ),
    }


def test_the_twins_refuse_what_the_kernels_refuse() -> None:
    for named, call in wrong_calls().items():
        with pytest.raises(ValueError, match=f"^{named}.* got "):
            call()


def test_a_block_alone_cannot_be_the_first_and_the_newest(device: str) -> None:
    queries, stats = op_cases._decoding(device)
    with pytest.raises(ValueError, match="blocks: expected 2 or more, of k = 32 tokens"):
        ops.decode_topk_blocks(queries, stats.means, 1, 64, 32)


def test_sglang_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "from sglang_misa import ops\n"
        "print(sorted(name for name in sys.modules if name.startswith('sglang.')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
