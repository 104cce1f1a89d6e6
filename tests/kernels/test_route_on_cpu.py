"""Prefill: the CUDA source of the router and the residual, compiled for the CPU (simt/), against numpy in fp64."""

import ctypes
import math

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call, ints

from sglang_misa import reference
from sglang_misa.kernels import layout
from sglang_misa.kernels.layout import Router

PAGE, WIDTH = 64, 700  # tokens of a block, and blocks: more than stay in shared memory at once
INF, NAN = math.inf, math.nan
ROUTERS = [router for router in layout.ROUTERS if router != "error"]  # of which only the products are made here

LIBRARIES = [("route", {"index_heads": heads}) for heads in (32, 64)]

pytestmark = COMPILER


@pytest.fixture(scope="module", params=[32, 64], ids="H={}".format)
def kernels(request, library) -> tuple[ctypes.CDLL, int]:
    loaded = library("route", index_heads=request.param)
    loaded.route_rows.restype = loaded.residuals.restype = ctypes.c_bool
    return loaded, request.param


def e4m3(values: np.ndarray) -> np.ndarray:
    return aligned(torch.from_numpy(values).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy(), np.uint8)


def of_e4m3(held: np.ndarray) -> np.ndarray:
    return torch.from_numpy(held).view(torch.float8_e4m3fn).double().numpy()


class Case:
    """Requests of 700, 0, 520 and 3 complete blocks, rows of which see fewer; what is not complete is NaN.

    Small integers, whose sums no order rounds, so that ties are ties; `normal`: numbers as they come.
    """

    LENGTHS = (WIDTH * PAGE + 5, 30, 520 * PAGE, 3 * PAGE + 63)

    def __init__(self, index_heads: int, seed: int = 0, normal: bool = False):
        random = np.random.default_rng(seed)
        self.batch = ints([0] * 4 + [1] * 2 + [2] * 3 + [3, 3, 0])
        reach = [0, 1, 70, 640 * PAGE]  # shorter than the request by so much
        back = [reach[i % 4] for i in range(len(self.batch))]
        self.lens = ints([max(self.LENGTHS[b] - n, 0) for b, n in zip(self.batch, back, strict=True)])
        self.rows, self.index_heads = len(self.batch), index_heads
        shape = (self.rows, index_heads, 128)
        q = random.normal(size=shape) if normal else random.integers(-1, 2, shape)
        keys = (4, WIDTH, 128)
        pooled = random.normal(size=keys) if normal else random.integers(-1, 2, keys).astype(float)
        gates = random.normal(size=shape[:2]) if normal else random.choice([1.0, 2.0, -1.0, -0.0], shape[:2])
        self.q, self.gates = e4m3(q), aligned(gates, np.float32)
        for request, length in enumerate(self.LENGTHS):
            pooled[request, length // PAGE :] = NAN
        self.keep(pooled)

    def keep(self, pooled: np.ndarray) -> None:
        held = torch.from_numpy(np.asarray(pooled, np.float64)).bfloat16()
        self.pooled, self.bits = (
            held.double().numpy(),
            aligned(held.view(torch.int16).numpy().view(np.uint16), np.uint16),
        )

    def products(self, row: int) -> np.ndarray:
        blocks = min(self.lens[row] // PAGE, WIDTH)
        with np.errstate(invalid="ignore"):
            return of_e4m3(self.q[row]) @ self.pooled[self.batch[row], :blocks].T

    def statistic(self, row: int, router: Router) -> np.ndarray:
        w, x = self.gates[row].astype(np.float64), self.products(row)
        if router == "weight" or x.shape[1] == 0:
            return np.abs(w)
        activity = np.where(np.isnan(x), 0, np.maximum(x, 0))
        with np.errstate(invalid="ignore"):
            return {
                "mean": np.abs(w) * activity.sum(1),
                "peak": np.abs(w) * activity.max(1),
                "signed": w * activity.sum(1),
            }[router]

    def share(self, row: int) -> np.ndarray:
        x = self.products(row)
        if x.shape[1] == 0:
            return np.full(self.index_heads, 0.5)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean, deviation = x.mean(1), x.std(1)
            found = [0.5 * math.erfc(-r / math.sqrt(2)) for r in np.nan_to_num(mean / deviation, posinf=9, neginf=-9)]
        return np.where(np.isfinite(mean) & np.isfinite(deviation), found, 0.0)

    def run(self, kernels: ctypes.CDLL, heads: int, router: Router, residual: bool, share: int, workers: int):
        head_ids = ints(np.full((self.rows, heads), -7))
        gates = np.full((self.rows, self.index_heads), NAN, np.float32) if residual else None
        sizes = (self.rows, len(self.pooled), WIDTH, PAGE, heads, ROUTERS.index(router), share, workers)
        call(kernels.route_rows, self.q, self.gates, self.bits, self.batch, self.lens, *sizes, head_ids, gates, None)
        return head_ids, gates

    def products_of(self, kernels: ctypes.CDLL) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [T, H, 2] of each head's products, and the residual's gates of all heads."""
        gates = np.full((self.rows, self.index_heads), NAN, np.float32)
        products = aligned(np.full((self.rows, self.index_heads, 2), NAN), np.float32)
        sizes = (self.rows, len(self.pooled), WIDTH, PAGE, 3, ROUTERS.index("weight"), 12, 1)
        call(kernels.route_rows, self.q, self.gates, self.bits, self.batch, self.lens, *sizes, None, gates, products)
        return products, gates


def best(statistic: np.ndarray, heads: int) -> list[int]:
    """Ascending; ties to the lower head, NaN below every number."""
    order = sorted(range(len(statistic)), key=lambda j: (math.isnan(statistic[j]), -np.nan_to_num(statistic[j]), j))
    return sorted(order[:heads])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("router", ROUTERS)
def test_heads_and_gates_of_the_others(kernels, router, residual):
    loaded, index_heads = kernels
    case = Case(index_heads)
    head_ids, gates = case.run(loaded, 7, router, residual, share=5, workers=2)
    for row in range(case.rows):
        assert head_ids[row].tolist() == best(case.statistic(row, router), 7), f"row {row}"
        if residual:
            wanted = case.gates[row] * case.share(row)
            wanted[head_ids[row]] = 0
            np.testing.assert_allclose(gates[row], wanted, rtol=0, atol=4e-5)


def hostile(case: Case) -> None:
    """A query, a key and gates that are not finite or tiny, each where it must not spread."""
    q = of_e4m3(case.q)
    q[0, 3], q[1, 5, 17] = NAN, NAN
    q[2] = 0
    case.q = e4m3(q)
    case.gates[3, :6] = [NAN, INF, -INF, 0.0, -0.0, 1e-40]
    case.gates[6] = -1e-42
    pooled = case.pooled.copy()
    pooled[2, 100] = NAN
    pooled[2, 101, 0] = INF
    pooled[3, 0] = 1e-39
    case.keep(pooled)


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_not_finite_wins_no_place_and_spoils_no_residual(kernels, router):
    loaded, index_heads = kernels
    case = Case(index_heads, seed=1)
    hostile(case)
    head_ids, gates = case.run(loaded, 5, router, True, share=20, workers=1)
    for row in range(case.rows):
        assert head_ids[row].tolist() == best(case.statistic(row, router), 5), f"row {row}"
        with np.errstate(invalid="ignore"):
            wanted = np.nan_to_num(case.gates[row] * case.share(row), posinf=0, neginf=0)
        wanted[head_ids[row]] = 0
        tiny = case.batch[row] == 3  # squares of products below 2^-63 are 0 in single precision
        np.testing.assert_allclose(gates[row], wanted, rtol=0, atol=2.0 if tiny else 4e-5, err_msg=f"row {row}")


def test_moments_hold_where_the_mean_is_far_from_zero(kernels):
    """Products of mean 1 and deviation r give Φ(1/r), the more of them the better conditioned."""
    loaded, index_heads = kernels
    case = Case(index_heads, normal=True, seed=2)
    random = np.random.default_rng(2)
    q = np.zeros((case.rows, index_heads, 128))
    q[:, :, 0], q[:, :, 1] = 1, np.linspace(-4, 4, index_heads)  # products 1 + c · z, z of deviation 1/4 …
    q[:, ::2] *= -1
    case.q = e4m3(q)
    pooled = np.zeros((4, WIDTH, 128))
    pooled[:, :, 0], pooled[:, :, 1] = 200, random.normal(size=(4, WIDTH)) * 50
    case.keep(pooled)
    _, gates = case.run(loaded, 1, "weight", True, share=12, workers=1)
    for row in range(case.rows):
        wanted, others = case.gates[row] * case.share(row), gates[row] != 0
        np.testing.assert_allclose(gates[row][others], wanted[others], rtol=0, atol=2e-5)
        assert (np.abs(wanted[~others]) < 1e-4).sum() >= (~others).sum() - 1


@pytest.mark.parametrize("router", ["mean", "peak"])
def test_a_row_does_not_depend_on_its_neighbours(kernels, router):
    loaded, index_heads = kernels
    case = Case(index_heads, normal=True, seed=3)
    whole = case.run(loaded, 7, router, True, share=12, workers=1)
    for share, workers in ((1, 5), (3, 2)):
        for got, wanted in zip(case.run(loaded, 7, router, True, share, workers), whole, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_the_residual_is_the_quantised_sum_of_its_heads(kernels):
    loaded, index_heads = kernels
    random = np.random.default_rng(4)
    rows = 11
    q = e4m3(random.normal(size=(rows, index_heads, 128)) * 10.0 ** random.integers(-2, 2, (rows, 1, 1)))
    q[3, 5, ::7] = 0x7F  # NaN, as 0
    gates = random.normal(size=(rows, index_heads)) * (random.random((rows, index_heads)) < 0.8)
    gates[0], gates[1, 1:] = 0, 0
    gates[2] *= 1e-30
    gates[4] *= 1e-42
    gates[5], q[5] = 3e38, 0x7E
    gates = aligned(gates, np.float32)
    query, scale = aligned(np.full((rows, 128), 0x55), np.uint8), aligned(np.full(rows, NAN), np.float32)
    call(loaded.residuals, q, gates, rows, query, scale)

    for row in range(rows):
        exact = gates[row].astype(np.float64) @ np.nan_to_num(of_e4m3(q[row]))
        step = np.abs(exact).max() / 448
        if row in (0, 5):  # nothing, and a sum that overflows
            assert scale[row] == 1
            assert not query[row].any()
            continue
        np.testing.assert_allclose(scale[row], step, rtol=1e-5, atol=1e-45)
        # half a step of e4m3: 1/16 of a number, or half of the smallest one
        np.testing.assert_allclose(
            of_e4m3(query[row]) * step, exact, rtol=0.0626, atol=2**-9.9 * step if row != 4 else 1
        )


def test_products_and_the_gates_of_all_heads(kernels):
    loaded, index_heads = kernels
    case = Case(index_heads, seed=1)
    hostile(case)
    products, gates = case.products_of(loaded)
    for row in range(case.rows):
        x = case.products(row)
        if x.shape[1] == 0:
            assert not (products[row, :, 1] > 0).any()  # a head of no products has no deviation
        else:
            with np.errstate(invalid="ignore"):
                mean, deviation = x.mean(1), x.std(1)
            finite = np.isfinite(mean) & np.isfinite(deviation)
            np.testing.assert_allclose(products[row, finite, 0], mean[finite], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(products[row, finite, 1], deviation[finite], rtol=1e-4, atol=2e-2)
            assert (products[row, ~finite] == [-INF, 0]).all()
        with np.errstate(invalid="ignore"):
            wanted = np.nan_to_num(case.gates[row] * case.share(row), posinf=0, neginf=0)
        tiny = case.batch[row] == 3
        np.testing.assert_allclose(gates[row], wanted, rtol=0, atol=2.0 if tiny else 4e-5, err_msg=f"row {row}")


def test_the_reference_says_the_same(kernels):
    loaded, index_heads = kernels
    case = Case(index_heads, normal=True, seed=5)
    heads = 7
    head_ids, gates = case.run(loaded, heads, "peak", True, share=12, workers=1)
    query, scale = aligned(np.zeros((case.rows, 128)), np.uint8), aligned(np.zeros(case.rows), np.float32)
    call(loaded.residuals, case.q, gates, case.rows, query, scale)
    q, w = torch.from_numpy(of_e4m3(case.q)).float(), torch.from_numpy(case.gates)
    for row in range(case.rows):
        k_tilde = torch.from_numpy(np.nan_to_num(case.pooled[case.batch[row]])).float()
        complete = torch.tensor([[case.lens[row] // PAGE]]).clamp(max=WIDTH)
        one = (q[row][None, None], w[row][None, None])
        statistics = reference.block_statistics(*one, k_tilde[None], complete, reference.RouterView("peak"))
        ids = reference.top_heads(statistics.heads, heads)
        assert ids.flatten().tolist() == head_ids[row].tolist()
        wanted, step = reference.residual_query(*one, ids, statistics.positive)
        np.testing.assert_allclose(scale[row], step.item(), rtol=1e-4)
        # sums that differ in their last bits may round to neighbouring numbers
        got = of_e4m3(query[row])
        np.testing.assert_allclose(got, wanted.flatten().double().numpy(), rtol=0.126, atol=2**-8.9)
        assert (got == wanted.flatten().double().numpy()).mean() > 0.9
