"""Head routing and block scores against plain fp32 PyTorch: odd sizes, hostile gates, requests that meet in a tile."""

from collections.abc import Sequence

import pytest
import torch

from sglang_misa.kernels import route as routing
from sglang_misa.kernels.route import block_scores, pool_blocks, route

PAGE, HEAD_DIM = 64, 128
INF, NAN = float("inf"), float("nan")


def naive_pool_blocks(means: torch.Tensor, pages: Sequence[int], block_pages: int) -> torch.Tensor:
    """bf16 [blocks, 128] of one request whose complete pages are `pages`."""
    blocks = len(pages) // block_pages
    return means[list(pages[: blocks * block_pages])].float().view(blocks, block_pages, HEAD_DIM).mean(1).bfloat16()


def naive_statistic(gates: torch.Tensor, x: torch.Tensor, router: str) -> torch.Tensor:
    """[H] of one row: `x` is ReLU(q·k̃) [H, M] over the row's complete blocks."""
    if router == "weight" or x.shape[1] == 0:
        return gates.abs()
    weighted = gates[:, None] * x
    return (weighted.abs() if router == "abs" else weighted).mean(1)


def naive_heads(statistic: torch.Tensor, heads: int) -> list[int]:
    """The top h: larger first, ties to the lower head, NaN last."""
    order = sorted(range(len(statistic)), key=lambda j: (statistic[j].isnan().item(), -statistic[j].item(), j))
    return sorted(order[:heads])


def make_rows(rows: int, index_heads: int, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    index_q = torch.randn(rows, index_heads, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    return index_q.to(device), torch.randn(rows, index_heads, generator=rng).to(device)


def make_blocks(lengths: Sequence[int], block_size: int, width: int, device: str, seed: int = 0) -> torch.Tensor:
    """bf16 [B, M, 128]; NaN in every block that is not complete."""
    rng = torch.Generator().manual_seed(seed)
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
    heads: int,
    block_size: int,
    router: str = "abs",
) -> None:
    """Kernel first, then the oracle: close block scores, heads the top h of the statistic but for near ties."""
    with_scores = route(index_q, gates, blocks, batch, lens, heads, block_size, router, want_block_scores=True)
    head_ids, none = route(index_q, gates, blocks, batch, lens, heads, block_size, router)
    alone = block_scores(index_q, gates, blocks, batch, lens, block_size)
    assert none is None
    assert torch.equal(with_scores[0], head_ids)
    torch.testing.assert_close(with_scores[1], alone, rtol=0, atol=0, equal_nan=True)
    for t in range(len(index_q)):
        count = min(int(lens[t]) // block_size, blocks.shape[1])
        x = (index_q[t].float() @ blocks[batch[t], :count].float().T).relu()
        torch.testing.assert_close(alone[t, :count], gates[t] @ x, rtol=1e-4, atol=1e-3, equal_nan=True)
        assert (alone[t, count:] == -INF).all()
        statistic = naive_statistic(gates[t], x, router).cpu()
        got, expected = head_ids[t].tolist(), naive_heads(statistic, heads)
        assert got == sorted(set(got))
        assert len(got) == heads
        for extra, missed in zip(sorted({*got} - {*expected}), sorted({*expected} - {*got}), strict=True):
            torch.testing.assert_close(statistic[extra], statistic[missed], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [64, 192, 256])
def test_pool_blocks_follows_the_table_and_stops_at_the_last_complete_block(device: str, block_size: int) -> None:
    lengths = [0, 1, 63, 64, 65, 127, 128, 2047, 2048, 2049]
    block_pages, width = block_size // PAGE, 33
    rng = torch.Generator().manual_seed(1)
    ids = torch.randperm(200, generator=rng)
    table = torch.full((len(lengths), width), -(2**31), dtype=torch.int32)
    means = torch.full((200, HEAD_DIM), NAN, dtype=torch.bfloat16)
    start = 0
    for row, n in enumerate(lengths):
        table[row, : n // PAGE] = ids[start : start + n // PAGE]
        start += n // PAGE
    means[ids[:start]] = torch.randn(start, HEAD_DIM, generator=rng).bfloat16()
    pooled = pool_blocks(means.to(device), table.to(device), ints(lengths, device), block_size).cpu()
    assert pooled.shape == (len(lengths), width // block_pages, HEAD_DIM)
    for row, n in enumerate(lengths):
        expected = naive_pool_blocks(means, table[row, : n // PAGE].tolist(), block_pages)
        torch.testing.assert_close(pooled[row, : len(expected)], expected, rtol=2**-7, atol=1e-6)
        assert pooled[row, len(expected) :].isnan().all()


@pytest.mark.parametrize("index_heads", [32, 64])
@pytest.mark.parametrize("rows", [1, 15, 16, 17])
@pytest.mark.parametrize("router", ["abs", "signed", "weight"])
def test_one_request(device: str, index_heads: int, rows: int, router: str) -> None:
    length, block_size = 2049, 64
    index_q, gates = make_rows(rows, index_heads, device)
    blocks = make_blocks([length], block_size, length // block_size, device)
    lens = torch.linspace(1, length, rows).to(torch.int32).to(device) if rows > 1 else ints([length], device)
    check(index_q, gates, blocks, ints([0] * rows, device), lens, 8, block_size, router)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 4095, 4096, 4097, 2**31 - 1])
def test_lengths_around_block_and_tile_edges(device: str, length: int) -> None:
    index_q, gates = make_rows(3, 64, device)
    check(
        index_q, gates, make_blocks([8192], 64, 128, device), ints([0] * 3, device), ints([length] * 3, device), 4, 64
    )


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
    check(index_q, gates, blocks, ints(batch, device), ints(lens, device), 8, 64)


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
            parts = [route(index_q[c], gates[c], blocks, batch[c], lens[c], 8, 64, "abs", True) for c in chunks]
            results.append([torch.cat(part) for part in zip(*parts, strict=True)])
    for head_ids, scores in results[1:]:
        assert torch.equal(head_ids, results[0][0])
        if device == "cuda":  # the interpreter multiplies through BLAS, whose order of summation follows the shape
            assert torch.equal(scores, results[0][1])


@pytest.mark.parametrize("heads", [4, 8, 16, 32, 64])
def test_every_number_of_heads(device: str, heads: int) -> None:
    index_q, gates = make_rows(5, 64, device)
    blocks = make_blocks([640], 64, 10, device)
    check(index_q, gates, blocks, ints([0] * 5, device), ints([640, 639, 128, 64, 63], device), heads, 64)
    if heads == 64:
        ids, _ = route(index_q, gates, blocks, ints([0] * 5, device), ints([640] * 5, device), heads, 64)
        assert torch.equal(ids, ints(list(range(64)), device).expand(5, -1))


@pytest.mark.parametrize("router", ["abs", "signed"])
def test_hostile_gates(device: str, router: str) -> None:
    """A NaN statistic loses to every number, -inf included; ties and signed zeros go to the lower head."""
    index_q = torch.ones(6, 64, HEAD_DIM, device=device).to(torch.float8_e4m3fn)
    blocks = torch.ones(1, 2, HEAD_DIM, dtype=torch.bfloat16, device=device)
    gates = torch.ones(6, 64, device=device)
    gates[1] = 0.0
    gates[1, ::2] = -0.0
    gates[2] = NAN
    gates[2, 50:56] = -1.0
    gates[3, :60] = NAN
    gates[3, 60:] = torch.tensor([-INF, INF, -3e38, 0.0])
    gates[4] = -INF
    gates[4, :62] = NAN
    gates[5] = torch.arange(64)
    ids, _ = route(index_q, gates, blocks, ints([0] * 6, device), ints([128] * 6, device), 4, 64, router)
    assert ids.tolist() == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [50, 51, 52, 53],
        [60, 61, 62, 63],
        [0, 1, 62, 63],
        [60, 61, 62, 63],
    ]


def test_a_nan_among_candidates_of_other_rows_stays_there(device: str) -> None:
    index_q, gates = make_rows(4, 64, device)
    gates[1, 7] = NAN
    check(index_q, gates, make_blocks([640], 64, 10, device), ints([0] * 4, device), ints([640] * 4, device), 8, 64)


def test_no_rows_and_no_blocks(device: str) -> None:
    index_q, gates = make_rows(2, 64, device)
    nothing = torch.empty(1, 0, HEAD_DIM, dtype=torch.bfloat16, device=device)
    ids, scores = route(index_q, gates, nothing, ints([0, 0], device), ints([50, 9], device), 8, 64, "abs", True)
    assert ids.tolist() == [naive_heads(row.abs(), 8) for row in gates.cpu()]
    assert scores is not None
    assert scores.shape == (2, 0)
    ids, _ = route(index_q[:0], gates[:0], nothing, ints([], device), ints([], device), 8, 64)
    assert ids.shape == (0, 8)


def test_wrong_arguments_are_named(device: str) -> None:
    index_q, gates = make_rows(2, 64, device)
    blocks = make_blocks([640], 64, 10, device)
    rows = ints([0, 0], device)
    with pytest.raises(ValueError, match="heads: expected 1 to the model's 64 index heads, got 65"):
        route(index_q, gates, blocks, rows, rows, 65, 64)
    with pytest.raises(ValueError, match="router: expected one of abs, signed, weight, got 'qnorm'"):
        route(index_q, gates, blocks, rows, rows, 8, 64, "qnorm")
    with pytest.raises(ValueError, match="head_gates"):
        route(index_q, gates.bfloat16(), blocks, rows, rows, 8, 64)
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        pool_blocks(blocks[0], rows[None], rows[:1], 100)
