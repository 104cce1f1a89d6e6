"""Selection inside a program, against a stable sort: any numbers, any k."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_misa.kernels.decode.rank_select import kth_largest, places, ranked, wins_and_ties

LOWEST = torch.finfo(torch.float32).min
N, WIDTH = 64, 16


@triton.jit
def _select_kernel(scores, out, n, k, N: tl.constexpr, WIDTH: tl.constexpr):
    o_n = tl.arange(0, N)
    x = ranked(tl.load(scores + o_n), o_n < n)
    threshold, room = kth_largest(x, n, k, WIDTH)
    taken, place = places(wins_and_ties(x, threshold), room)
    tl.store(out + place, o_n, mask=taken)


def select(values: list[float], k: int, device: str) -> list[int]:
    x = torch.full((N,), float("nan"), device=device)
    x[: len(values)] = torch.tensor(values, dtype=torch.float32)
    out = torch.full((N + 1,), -7, dtype=torch.int32, device=device)
    _select_kernel[(1,)](x, out, len(values), k, N=N, WIDTH=WIDTH)
    count = min(k, len(values))
    assert (out[count:] == -7).all(), "wrote past its share"
    return out[:count].tolist()


def expected(values: list[float], k: int) -> list[int]:
    ranked = torch.tensor(values, dtype=torch.float32).nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
    return sorted(torch.sort(ranked, descending=True, stable=True).indices[:k].tolist())


FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, float("inf"), -float("inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(values=st.lists(FLOATS, max_size=N), k=st.integers(0, N))
def test_takes_the_largest_and_the_earliest_of_ties(device: str, values: list[float], k: int) -> None:
    assert select(values, k, device) == expected(values, k)


@pytest.mark.parametrize("spread", [1e-38, 1.0, 1e38])
def test_takes_the_largest_of_a_full_row(device: str, spread: float) -> None:
    values = (torch.randn(N, generator=torch.Generator().manual_seed(1)) * spread).tolist()
    for k in (1, N // 2, N - 1):
        assert select(values, k, device) == expected(values, k)
