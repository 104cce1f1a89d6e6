"""Prefill: the tilt (Triton) and the choice of heads by error (CUDA, compiled for the CPU), one by one and in a row."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call, ints
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.layout import HEAD_DIM, TILT
from sglang_misa.kernels.prefill.tilt import tilt
from sglang_misa.reference_products import Products

SIZE = 64
LENS = [700 * SIZE + 5, 30, 70 * SIZE, 2 * SIZE, SIZE + 63]  # of requests; rows see that, and less
BATCH = [0] * 40 + [1] * 2 + [2] * 30 + [3, 3, 4]
NAN = math.nan
LIBRARIES = [("choose_heads", {"index_heads": heads}) for heads in (32, 64)]


def operands(device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query of each row, block means of all requests with NaN where not complete, requests, and lengths."""
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(len(BATCH), HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    means = torch.randn(len(LENS), 700, HEAD_DIM, generator=rng) + 2 * torch.randn(HEAD_DIM, generator=rng)
    for request, length in enumerate(LENS):
        means[request, length // SIZE :] = NAN
    lens = [max(LENS[batch] - 37 * (i % 5), 0) for i, batch in enumerate(BATCH)]
    rows = (torch.tensor(values, dtype=torch.int32, device=device) for values in (BATCH, lens))
    return query.to(device), means.bfloat16().to(device), *rows


def directions(query: Tensor, means: Tensor, batch: Tensor, lens: Tensor) -> Tensor:
    """As the module says, in fp64."""
    wanted = torch.zeros(len(query), HEAD_DIM, dtype=torch.float64)
    for t, (request, length) in enumerate(zip(batch.tolist(), lens.tolist(), strict=True)):
        keys = means[request, : length // SIZE].double().cpu()
        scores = keys @ query[t].double().cpu()
        if len(keys) and scores.std(correction=0) > 0:
            off = scores - scores.mean()
            wanted[t] = TILT * (off @ keys) / (len(keys) * scores.std(correction=0))
    return wanted


def test_directions_lead_to_the_keys_that_score_high(device: str) -> None:
    call_ = operands(device)
    found = tilt(*call_, SIZE)
    assert found.shape == (len(BATCH), HEAD_DIM)
    torch.testing.assert_close(found.double().cpu(), directions(*call_), rtol=2e-4, atol=2e-4)


def test_a_row_alone_has_the_direction_that_it_has_among_others(device: str) -> None:
    query, means, batch, lens = operands(device, seed=1)
    whole = tilt(query, means, batch, lens, SIZE)
    # To the bit, but in the interpreter: the order in which NumPy's BLAS adds up depends on a row's place on some CPUs.
    rounding = 0 if device == "cuda" else 1e-5
    for rows in (slice(3, 4), slice(38, 45), slice(0, 33)):
        alone = tilt(query[rows], means, batch[rows], lens[rows], SIZE)
        torch.testing.assert_close(alone, whole[rows], rtol=rounding, atol=rounding)


def test_a_broken_block_and_equal_blocks_give_no_direction_that_spreads(device: str) -> None:
    query, means, batch, lens = operands(device, seed=2)
    means[2] = means[2, 0]  # 70 equal scores, whose mean is rounded
    means[3, 1] = NAN
    found = tilt(query, means, batch, lens, SIZE)
    assert torch.isfinite(found).all()
    assert not found[batch == 2].any()
    assert not found[batch == 4].any()  # one block
    healthy = batch == 0
    torch.testing.assert_close(
        found[healthy].double().cpu(), directions(query, means, batch, lens)[healthy.cpu()], rtol=2e-4, atol=2e-4
    )


@pytest.fixture(scope="module", params=[32, 64], ids="H={}".format)
def choose(request: pytest.FixtureRequest, library: Callable[..., ctypes.CDLL]) -> tuple[ctypes.CDLL, int]:
    heads: int = request.param
    loaded = library("choose_heads", index_heads=heads)
    loaded.choose.restype = ctypes.c_bool
    return loaded, heads


def chosen(
    choose: tuple[ctypes.CDLL, int], q: Tensor, gates: Tensor, products: Tensor, direction: Tensor, lens: Tensor
) -> tuple[np.ndarray, Tensor]:
    """Ids of three heads [T, 3], and the residual as numbers [T, 128]."""
    rows = len(q)
    ids = ints(np.full((rows, 3), -7))
    query, scale = aligned(np.full((rows, HEAD_DIM), 0x55), np.uint8), aligned(np.full(rows, NAN), np.float32)
    arrays = (aligned(x.numpy(), np.float32) for x in (gates, products, direction))
    weights, moments, tilts = arrays
    held = aligned(q.view(torch.uint8).numpy(), np.uint8)
    call(choose[0].choose, held, weights, ints(lens), moments, tilts, ids, query, scale, rows, 700, SIZE, 3)
    return ids, torch.from_numpy(query).view(torch.float8_e4m3fn).float() * torch.from_numpy(scale)[:, None]


@COMPILER
def test_from_products_to_heads_and_residual_as_the_reference(choose: tuple[ctypes.CDLL, int], device: str) -> None:
    """Products as route.cu leaves them, the direction of the residual of all heads, and the choice."""
    heads = choose[1]
    _, means, batch, lens = (x.cpu() for x in operands("cpu", seed=3))
    rng = torch.Generator().manual_seed(4)
    q = torch.randn(len(BATCH), heads, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    gates = torch.randn(len(BATCH), heads, generator=rng)
    gates[:, 5], gates[7, 6] = NAN, math.inf
    wanted, every, moments = [], [], []
    for t, (request, length) in enumerate(zip(batch.tolist(), lens.tolist(), strict=True)):
        keys = means[request][None].nan_to_num().float()
        row, complete = (q[t][None, None], gates[t][None, None]), torch.tensor([[length // SIZE]])
        plain = reference.block_statistics(*row, keys, complete, reference.RouterView("error", tilted=False))
        none = torch.empty(1, 1, 0, dtype=torch.int64)
        every.append(reference.residual_query(*row, none, plain.positive)[0][0, 0])
        found = reference.block_statistics(*row, keys, complete, reference.RouterView("error"))
        ids = reference.top_heads(found.heads, 3)
        query, scale = reference.residual_query(*row, ids, found.positive)
        wanted.append((ids[0, 0].tolist(), query[0, 0] * scale[0, 0]))
        x = q[t].float() @ means[request, : length // SIZE].float().T
        seen = x.shape[1] > 0
        moments.append(torch.stack([x.mean(1), x.std(1, correction=0)], 1) if seen else torch.zeros(heads, 2))
    query = torch.stack(every).to(torch.float8_e4m3fn)
    direction = tilt(query.to(device), means.to(device), batch.to(device), lens.to(device), SIZE).cpu()
    ids, residual = chosen(choose, q, gates, torch.stack(moments), direction, lens)
    for t, (heads_of_row, column) in enumerate(wanted):
        assert ids[t].tolist() == heads_of_row, f"row {t}"
        near = (residual[t] - column).abs() <= column.abs() / 8 + column.abs().max() / 448
        assert near.all(), f"row {t}"


@COMPILER
def test_what_is_not_finite_is_not_chosen_and_not_in_the_residual(choose: tuple[ctypes.CDLL, int]) -> None:
    heads = choose[1]
    rng = torch.Generator().manual_seed(5)
    q = torch.randn(4, heads, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    gates, products = torch.ones(4, heads), torch.zeros(4, heads, 2)
    products[..., 0], products[..., 1] = torch.randn(4, heads, generator=rng), 1.0
    products[0, 7] = torch.tensor([-math.inf, 0.0])  # as of a NaN among its products
    gates[1, 9], gates[1, 10] = NAN, math.inf
    held = q.view(torch.uint8)
    held[2, 11, 3] = 0x7F
    products[2, 11] = torch.tensor([-math.inf, 0.0])
    direction = torch.randn(4, HEAD_DIM, generator=rng) * 0.1
    direction[3] = 0.0
    ids, residual = chosen(choose, q, gates, products, direction, torch.full((4,), 9 * SIZE))
    assert torch.isfinite(residual).all()
    assert 7 not in ids[0]
    assert 9 not in ids[1]
    assert 10 in ids[1]
    assert 11 not in ids[2]
    error = Products(torch.empty(0), torch.empty(0), products[3, :, 0], products[3, :, 1]).linear_part()[1]
    assert ids[3].tolist() == sorted(error.argsort(descending=True)[:3].tolist())
