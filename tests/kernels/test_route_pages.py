"""Decode's routed columns and residual are the reference's."""

from __future__ import annotations

import pytest
import torch
from sketched_rows import sketched

from sglang_misa import reference
from sglang_misa.kernels.decode import route_pages as route_pages_module
from sglang_misa.kernels.decode.operands import SketchPolicy
from sglang_misa.kernels.decode.route_pages import FEW_ROWS, Columns, RouteTuning, route_pages
from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.prefill.route import Router


@pytest.mark.parametrize("router", ["mean", "peak", "signed", "weight"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tuning", [FEW_ROWS, RouteTuning(256, 4)])
def test_columns_are_those_of_the_reference(
    device: str, router: Router, residual: bool, tuning: RouteTuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_pages_module, "FEW_ROWS", tuning)
    lens = (0, 128, 2 * PAGE + 1, 66 * PAGE, 131 * PAGE + 3)
    batch = sketched(lens, 1, device, heads=64)
    heads = 7 if residual else 8
    columns = Columns.allocate(len(lens), batch.page_table.shape[1], 64, 8, torch.device(device))
    for _ in range(2):
        route_pages(batch.operands, batch.page_means, SketchPolicy(heads, router, residual, 128), out=columns)
    assert not columns.done.any()
    for row, length in enumerate(lens):
        if length <= 128:
            continue
        pages = batch.page_table[row, : length // PAGE - 1].long()
        q, gates, means = (
            batch.index_q[None, row, None],
            batch.head_gates[None, row, None],
            batch.page_means[pages][None],
        )
        complete = torch.tensor([[len(pages)]], device=device)
        stats = reference.block_statistics(q, gates, means.float(), complete, router)
        ids = reference.top_heads(stats.heads, heads)
        numbers, unit = reference.to_int8(q[0, 0, ids[0, 0]].float())
        assert torch.equal(columns.queries[row, :heads].float(), numbers)
        assert torch.equal(columns.gates[row, :heads], gates[0, 0, ids[0, 0]] * unit)
        if residual:
            numbers, unit = (part[0, 0] for part in reference.residual_query(q, gates, ids, stats.positive, int8=True))
            assert (columns.queries[row, heads].float() - numbers).abs().max() <= 1
            torch.testing.assert_close(columns.gates[row, heads], unit, rtol=1e-4, atol=0)


def test_all_heads_are_columns_as_they_are(device: str) -> None:
    batch = sketched((9 * PAGE, 100), 1, device, heads=32)
    batch.index_q[0, 5] = 0.0
    columns = Columns.allocate(2, batch.page_table.shape[1], 32, 32, torch.device(device))
    route_pages(batch.operands, batch.page_means, SketchPolicy(None, "peak", False, 128), out=columns)
    numbers, unit = reference.to_int8(batch.index_q[0].float())
    assert torch.equal(columns.queries[0].float(), numbers)
    assert torch.equal(columns.gates[0], batch.head_gates[0] * unit)


@pytest.mark.parametrize("router", ["mean", "peak", "signed", "weight"])
def test_heads_that_are_not_finite_are_not_routed_and_leave_the_residual_finite(device: str, router: Router) -> None:
    batch = sketched((5 * PAGE,), 1, device, heads=32)
    batch.head_gates[0, 3] = torch.nan
    batch.head_gates[0, 11] = torch.nan
    columns = Columns.allocate(1, batch.page_table.shape[1], 32, 8, torch.device(device))
    route_pages(batch.operands, batch.page_means, SketchPolicy(7, router, True, 128), out=columns)
    assert torch.isfinite(columns.gates).all()
    assert torch.isfinite(columns.queries.float()).all()
