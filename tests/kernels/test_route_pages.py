"""Decode's routed columns and residual are the reference's, as called and as the CUDA source on the CPU (simt/)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call
from sketched_rows import Sketched, sketched

from sglang_misa import reference
from sglang_misa.kernels.decode.operands import SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns, route_pages
from sglang_misa.kernels.layout import INDEX_HEADS, PAGE, ROUTED_PAGES, ROUTERS, Router

Way = Callable[[Sketched, SketchPolicy], Columns]
LONGER_THAN = 128
LIBRARIES = [("sketch_route", {"index_heads": heads}) for heads in INDEX_HEADS]
LENS = (
    0,
    1,
    LONGER_THAN,
    2 * PAGE + 1,
    66 * PAGE,
    257 * PAGE,
    258 * PAGE + 63,
    331 * PAGE + 3,
)  # by all pages or every second


def as_called(batch: Sketched, policy: SketchPolicy) -> Columns:
    columns = _room(batch, policy)
    route_pages(batch.operands, batch.page_means, policy, out=columns)
    return columns


def _room(batch: Sketched, policy: SketchPolicy) -> Columns:
    rows, heads, _ = batch.index_q.shape
    columns = heads if policy.heads is None else policy.heads + policy.residual
    return Columns.allocate(rows, columns, batch.index_q.device)


@pytest.fixture(scope="module")
def libraries(library: Callable[..., ctypes.CDLL]) -> Callable[[int], ctypes.CDLL]:
    def of(heads: int) -> ctypes.CDLL:
        loaded = library("sketch_route", index_heads=heads)
        loaded.route_rows.restype = ctypes.c_bool
        return loaded

    return of


@pytest.fixture(params=["called", pytest.param("emulated", marks=COMPILER)])
def route(request: pytest.FixtureRequest, libraries: Callable[[int], ctypes.CDLL], device: str) -> Way:
    def emulated(batch: Sketched, policy: SketchPolicy) -> Columns:
        batch = Sketched(**{name: tensor.cpu() for name, tensor in vars(batch).items()})
        rows, heads, _ = batch.index_q.shape
        columns = _room(batch, policy)
        queries, gates = aligned(columns.queries.numpy(), np.int8), columns.gates.numpy()
        q, means = (aligned(x.view(torch.uint8).numpy(), np.uint8) for x in (batch.index_q, batch.page_means))
        table = batch.page_table.contiguous()
        call(
            libraries(heads).route_rows, q, batch.head_gates.numpy(), means, table.numpy(), batch.seq_lens.numpy(),
            queries, gates, table.stride(0), heads if policy.heads is None else policy.heads,
            ROUTERS.index(policy.router), int(policy.residual), policy.candidates, rows,
        )  # fmt: skip
        return Columns(torch.from_numpy(queries).to(device), columns.gates.to(device))

    return emulated if request.param == "emulated" else as_called


def check(batch: Sketched, policy: SketchPolicy, columns: Columns) -> None:
    """Routed columns are the reference's bit by bit, and the residual within a unit; no other row is written."""
    heads = policy.heads or batch.index_q.shape[1]
    empty = _room(batch, policy)
    for row, length in enumerate(batch.seq_lens.tolist()):
        if length <= policy.candidates:
            assert torch.equal(columns.queries[row], empty.queries[row])
            assert columns.gates[row].isnan().all()
            continue
        known = length // PAGE - 1
        pages = batch.page_table[row, : known : -(-known // ROUTED_PAGES)].long()
        q, gates = batch.index_q[None, row, None], batch.head_gates[None, row, None]
        complete = torch.tensor([[len(pages)]], device=q.device)
        view = reference.RouterView(policy.router, tilted=False)
        stats = reference.block_statistics(q, gates, batch.page_means[pages][None].float(), complete, view)
        ids = reference.top_heads(stats.heads, heads)
        numbers, unit = reference.to_int8(q[0, 0, ids[0, 0]].float())
        assert torch.equal(columns.queries[row, :heads].float(), numbers)
        assert torch.equal(columns.gates[row, :heads].nan_to_num(9), (gates[0, 0, ids[0, 0]] * unit).nan_to_num(9))
        if policy.residual:
            numbers, unit = (part[0, 0] for part in reference.residual_query(q, gates, ids, stats.positive, int8=True))
            assert (columns.queries[row, heads].float() - numbers).abs().max() <= 1
            torch.testing.assert_close(columns.gates[row, heads], unit, rtol=1e-4, atol=0)


@pytest.mark.parametrize("index_heads", INDEX_HEADS)
@pytest.mark.parametrize("router", ROUTERS)
def test_columns_are_those_of_the_reference(route: Way, device: str, router: Router, index_heads: int) -> None:
    batch = sketched(LENS, 1, device, heads=index_heads, width=340)
    plain = [] if router == "error" else [(16, False)]
    for heads, residual in ((7, True), *plain, (index_heads - 1, True)):
        policy = SketchPolicy(heads, router, residual, LONGER_THAN)
        check(batch, policy, route(batch, policy))


@pytest.mark.parametrize("index_heads", INDEX_HEADS)
def test_all_heads_are_columns_as_they_are(route: Way, device: str, index_heads: int) -> None:
    batch = sketched((9 * PAGE, 100), 1, device, heads=index_heads)
    batch.index_q[0, 5] = 0.0
    batch.index_q[0, 6, 3] = torch.nan
    policy = SketchPolicy(None, "peak", False, LONGER_THAN)
    columns = route(batch, policy)
    check(batch, policy, columns)
    assert columns.gates[0, 5] == 0
    assert columns.queries[0, 6, 3] == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_heads_that_are_not_finite_are_not_routed_and_leave_the_residual_finite(
    route: Way, device: str, router: Router
) -> None:
    batch = sketched((5 * PAGE, 300 * PAGE), 1, device, heads=32)
    batch.head_gates[:, 3] = batch.head_gates[:, 11] = torch.nan
    if router != "weight":  # which asks no query
        batch.index_q[:, 7, 100] = torch.nan
    policy = SketchPolicy(7, router, True, LONGER_THAN)
    columns = route(batch, policy)
    check(batch, policy, columns)
    assert torch.isfinite(columns.gates).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 3e38])
def test_a_broken_page_leaves_the_lowest_heads_and_no_residual(route: Way, device: str, broken: float) -> None:
    batch = sketched((40 * PAGE,), 1, device, heads=64)
    batch.page_means[batch.page_table[0, 17].long(), ::2] = broken
    policy = SketchPolicy(7, "mean", True, LONGER_THAN)
    columns = route(batch, policy)
    if broken != broken:
        check(batch, policy, columns)
        assert torch.equal(columns.queries[0, :7].float(), reference.to_int8(batch.index_q[0, :7].float())[0])
    assert columns.gates[0, 7] == 0
    assert not columns.queries[0, 7].any()


def test_equal_heads_are_taken_from_the_lowest_on(route: Way, device: str) -> None:
    batch = sketched((12 * PAGE,), 1, device, heads=64)
    batch.index_q[0] = batch.index_q[0, :4].clone().repeat(16, 1)
    batch.head_gates[0] = torch.tensor([1.0, -1.0, 0.5, 0.25], device=device).repeat(16)
    policy = SketchPolicy(31, "peak", True, LONGER_THAN)
    check(batch, policy, route(batch, policy))


def test_a_row_alone_is_the_row_among_others(route: Way, device: str) -> None:
    batch = sketched((300 * PAGE, 66 * PAGE, 5 * PAGE), 1, device, heads=64)
    policy = SketchPolicy(7, "peak", True, LONGER_THAN)
    together = route(batch, policy)
    names = ("index_q", "head_gates", "page_table", "seq_lens")
    for row in range(3):
        alone = route(replace(batch, **{name: getattr(batch, name)[row : row + 1] for name in names}), policy)
        assert torch.equal(alone.queries[0], together.queries[row])
        assert torch.equal(alone.gates[0], together.gates[row])


def test_heads_that_no_kernel_takes_are_named(device: str) -> None:
    with pytest.raises(ValueError, match="index_q: expected 32 or 64 index heads, got 16"):
        as_called(sketched((300,), 1, device, heads=16), SketchPolicy(7, "peak", True, LONGER_THAN))
    with pytest.raises(ValueError, match="heads: expected at most the model's 32, a residual counted, got 64"):
        as_called(sketched((300,), 1, device, heads=32), SketchPolicy(63, "peak", True, LONGER_THAN))
