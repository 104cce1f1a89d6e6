"""The public operations: kernels agree with their reference twins, twins with oracles, and SGLang is not needed."""

from __future__ import annotations

import subprocess
import sys

import op_cases
import pytest
import torch
from oracles import OUTSIDE, Extend, stable_best
from torch import Tensor

from sglang_misa import ops


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


def test_sglang_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "from sglang_misa import ops\n"
        "print(sorted(name for name in sys.modules if name.startswith('sglang.')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
