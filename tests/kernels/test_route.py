"""Block scores against plain fp32 PyTorch: odd sizes, hostile blocks, requests that meet in a tile."""

from collections.abc import Sequence

import pytest
import torch

from sglang_misa.kernels.layout import HEAD_DIM
from sglang_misa.kernels.prefill import route as routing
from sglang_misa.kernels.prefill.route import Blocks, block_scores, route

INF, NAN = float("inf"), float("nan")


def make_rows(rows: int, index_heads: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    index_q = torch.randn(rows, index_heads, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    return index_q.to(device), torch.randn(rows, index_heads, generator=rng).to(device)


def make_blocks(lengths: Sequence[int], block_size: int, width: int, device: str) -> torch.Tensor:
    """bf16 [B, M, 128]; NaN in every block that is not complete."""
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randn(len(lengths), width, HEAD_DIM, generator=rng).bfloat16()
    for request, length in enumerate(lengths):
        blocks[request, length // block_size :] = NAN
    return blocks.to(device)


def ints(values: Sequence[int] | torch.Tensor, device: str) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def check(
    index_q: torch.Tensor,
    gates: torch.Tensor,
    blocks: torch.Tensor,
    batch: torch.Tensor,
    lens: torch.Tensor,
    block_size: int,
) -> None:
    """Kernel first, then the oracle."""
    scores = block_scores(index_q, gates, Blocks(blocks, block_size, batch, lens))
    assert scores.shape == (len(index_q), blocks.shape[1])
    for t in range(len(index_q)):
        count = min(int(lens[t]) // block_size, blocks.shape[1])
        x = (index_q[t].float() @ blocks[batch[t], :count].float().T).relu()
        torch.testing.assert_close(scores[t, :count], gates[t] @ x, rtol=1e-4, atol=1e-3, equal_nan=True)
        assert (scores[t, count:] == -INF).all()


@pytest.mark.parametrize("index_heads", [32, 64])
@pytest.mark.parametrize("rows", [1, 15, 16, 17])
def test_one_request(device: str, index_heads: int, rows: int) -> None:
    length, block_size = 2049, 64
    index_q, gates = make_rows(rows, index_heads, device)
    blocks = make_blocks([length], block_size, length // block_size, device)
    lens = torch.linspace(1, length, rows).to(torch.int32).to(device) if rows > 1 else ints([length], device)
    check(index_q, gates, blocks, ints([0] * rows, device), lens, block_size)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 4095, 4096, 4097, 2**31 - 1])
def test_lengths_around_block_and_tile_edges(device: str, length: int) -> None:
    index_q, gates = make_rows(3, 64, device)
    check(index_q, gates, make_blocks([8192], 64, 128, device), ints([0] * 3, device), ints([length] * 3, device), 64)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("index_heads", [32, 64])
def test_unequal_requests_meet_in_a_tile(
    device: str, wide: bool, index_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of length 1 beside long ones, out of order, ending in padded rows."""
    monkeypatch.setattr(routing, "_WIDE_FROM", 0 if wide else 10**9)
    lengths = [9000, 1, 700, 64, 8192]
    batch = [0] * 5 + [1] + [2] * 6 + [4] * 7 + [3] + [0] * 3
    lens = [8996, 8997, 8998, 8999, 9000, 1, *range(695, 701), *range(8186, 8193), 64, 0, 1, 1]
    index_q, gates = make_rows(len(batch), index_heads, device)
    blocks = make_blocks(lengths, 64, 150, device)
    check(index_q, gates, blocks, ints(batch, device), ints(lens, device), 64)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_launch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of a row are those it has alone, in a chunk, and among rows of another request."""
    index_q, gates = make_rows(12, 64, device)
    blocks = make_blocks([6400, 5000], 64, 100, device)
    batch, lens = ints([0] * 7 + [1] * 5, device), ints([*range(6394, 6401), *range(4996, 5001)], device)
    results = []
    for wide in (0, 10**9):
        monkeypatch.setattr(routing, "_WIDE_FROM", wide)
        for step in (12, 5, 1):
            chunks = [slice(i, i + step) for i in range(0, 12, step)]
            parts = [block_scores(index_q[c], gates[c], Blocks(blocks, 64, batch[c], lens[c])) for c in chunks]
            results.append(torch.cat(parts))
    for scores in results[1:]:
        if device == "cuda":
            assert torch.equal(scores, results[0])
        else:  # the interpreter multiplies through BLAS, whose order of summation follows the shape
            torch.testing.assert_close(scores, results[0], rtol=1e-5, atol=1e-5)


def test_a_nan_of_another_row_stays_there(device: str) -> None:
    index_q, gates = make_rows(4, 64, device)
    gates[1, 7] = NAN
    check(index_q, gates, make_blocks([640], 64, 10, device), ints([0] * 4, device), ints([640] * 4, device), 64)


def test_no_rows_and_no_blocks(device: str) -> None:
    index_q, gates = make_rows(2, 64, device)
    nothing = torch.empty(1, 0, HEAD_DIM, dtype=torch.bfloat16, device=device)
    none = Blocks(nothing, 64, ints([0, 0], device), ints([50, 9], device))
    assert block_scores(index_q, gates, none).shape == (2, 0)
    blocks = Blocks(make_blocks([640], 64, 10, device), 64, ints([], device), ints([], device))
    assert block_scores(index_q[:0], gates[:0], blocks).shape == (0, 10)


def test_wrong_arguments_are_named(device: str) -> None:
    index_q, gates = make_rows(2, 64, device)
    rows = ints([0, 0], device)
    blocks = Blocks(make_blocks([640], 64, 10, device), 64, rows, rows)
    with pytest.raises(ValueError, match="heads: expected 1 to the model's 64 index heads, got 65"):
        route(index_q, gates, blocks, 65)
    with pytest.raises(ValueError, match="router: expected one of mean, peak, signed, weight, error, got 'qnorm'"):
        route(index_q, gates, blocks, 8, "qnorm")
    with pytest.raises(ValueError, match="expected 1 to 63, which leaves a head to the residual, got 64"):
        route(index_q, gates, blocks, 64, residual=True)
    with pytest.raises(ValueError, match="head_gates"):
        block_scores(index_q, gates.bfloat16(), blocks)
    if device == "cpu":
        with pytest.raises(ValueError, match="contiguous, on a GPU, got"):
            route(index_q, gates, blocks, 8)
