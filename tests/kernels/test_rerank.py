"""Exact re-scoring against plain fp32 PyTorch: odd widths, hostile candidates, contiguous and paged keys alike."""

import pytest
import torch

from sglang_misa.kernels.rerank import rerank, rerank_paged

PAGE, HEAD_DIM = 64, 128
INF = float("inf")
WIDTH = 2049
COUNTS = [0, 1, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 10**6]


def naive_rerank(
    q: torch.Tensor, gates: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """fp32 [T, C]: k_scale·Σ_j w·ReLU(q·k) of valid candidates, else -inf."""
    valid = (torch.arange(ids.shape[1]) < counts[:, None]) & (ids >= 0) & (ids < len(k))
    safe = ids.where(valid, 0).long()
    x = torch.einsum("thd,tcd->tch", q.float(), k.float()[safe]).relu()
    return (torch.einsum("tch,th->tc", x, gates) * scale[safe]).where(valid, -INF)


def make(rows: int, index_heads: int, keys: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q, gates, keys, scales and shuffled candidates [rows, WIDTH], on the CPU."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, index_heads, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    k = torch.randn(keys, HEAD_DIM, generator=rng).to(torch.float8_e4m3fn)
    gates, scale = torch.randn(rows, index_heads, generator=rng), torch.rand(keys, generator=rng) + 0.5
    ids = torch.stack([torch.randperm(keys, generator=rng)[:WIDTH] for _ in range(rows)]).to(torch.int32)
    return q, gates, k, scale, ids


def paged(k: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys in shuffled pages of a pool (free pages hold NaN) and the candidates as slots; hostile ids stay."""
    pages = -(-len(k) // PAGE)
    where = torch.randperm(pages + 2, generator=torch.Generator().manual_seed(seed))
    pool = torch.full((pages + 2, 8448), 0xFF, dtype=torch.uint8)
    for page in range(pages):
        part = slice(page * PAGE, min((page + 1) * PAGE, len(k)))
        count = part.stop - part.start
        pool[where[page], : count * HEAD_DIM] = k[part].view(torch.uint8).flatten()
        pool[where[page], PAGE * HEAD_DIM : PAGE * HEAD_DIM + 4 * count] = scale[part].view(torch.uint8)
    inside = (ids >= 0) & (ids < len(k))
    safe = ids.where(inside, 0).long()
    return pool, (where[safe // PAGE] * PAGE + safe % PAGE).to(torch.int32).where(inside, ids)


@pytest.mark.parametrize("index_heads", [32, 64])
def test_counts_around_tile_edges(device: str, index_heads: int) -> None:
    q, gates, k, scale, ids = make(len(COUNTS), index_heads, 2100)
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    for row, count in enumerate(COUNTS):
        ids[row, count:] = torch.tensor([-1, 2**31 - 1, 3])[row % 3]
    pool, slots = paged(k, scale, ids)

    got = rerank(*(x.to(device) for x in (q, gates, k, scale, ids, counts))).cpu()
    got_paged = rerank_paged(*(x.to(device) for x in (q, gates, pool, slots, counts))).cpu()
    assert torch.equal(got, got_paged)
    torch.testing.assert_close(got, naive_rerank(q, gates, k, scale, ids, counts), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 15, 16, 17])
@pytest.mark.parametrize("width", [1, 127, 128, 300])
def test_rows_widths_and_padded_strides(device: str, rows: int, width: int) -> None:
    q, gates, k, scale, ids = (x.to(device) for x in make(rows, 64, 2100))
    ids = ids[:, :width]
    counts = torch.full((rows,), width, dtype=torch.int32, device=device)
    out = torch.full((rows, width + 3), 7.0, device=device)
    assert rerank(q, gates, k, scale, ids, counts, out[:, :width]).data_ptr() == out.data_ptr()
    expected = naive_rerank(*(x.cpu() for x in (q, gates, k, scale, ids, counts)))
    torch.testing.assert_close(out[:, :width].cpu(), expected, rtol=1e-4, atol=1e-2)
    assert (out[:, width:] == 7.0).all()


def test_hostile_candidates_are_absent(device: str) -> None:
    q, gates, k, scale, ids = make(2, 64, 2100)
    ids[0, :6] = torch.tensor([-1, -(2**31), 2100, 2**31 - 1, 10**9, 0])
    counts = torch.tensor([200, -5], dtype=torch.int32)
    got = rerank(*(x.to(device) for x in (q, gates, k, scale, ids, counts))).cpu()
    assert got[0, :5].tolist() == [-INF] * 5
    assert (got[1] == -INF).all()
    torch.testing.assert_close(got, naive_rerank(q, gates, k, scale, ids, counts), rtol=1e-4, atol=1e-2)


def test_hostile_gates_and_scales_stay_where_they_are(device: str) -> None:
    """A NaN gate spoils its own row, an infinite scale its own key."""
    q, gates, k, scale, ids = make(3, 64, 2100)
    gates[1, 5] = float("nan")
    scale[ids[0, 9]] = INF
    ids[2] = ids[2].where(ids[2] != ids[0, 9], 0)
    counts = torch.full((3,), WIDTH, dtype=torch.int32)
    got = rerank(*(x.to(device) for x in (q, gates, k, scale, ids, counts))).cpu()
    assert got[1].isnan().all()
    assert got[0, 9].isinf()
    assert got[0, :9].isfinite().all()
    assert got[2].isfinite().all()


def test_nothing_to_do_and_wrong_layouts(device: str) -> None:
    q, gates, k, scale, ids = (x.to(device) for x in make(2, 64, 2100))
    counts = torch.ones(2, dtype=torch.int32, device=device)
    assert rerank(q[:0], gates[:0], k, scale, ids[:0], counts[:0]).shape == (0, WIDTH)
    assert rerank(q, gates, k, scale, ids[:, :0], counts).shape == (2, 0)
    with pytest.raises(ValueError, match="candidates: expected"):
        rerank(q, gates, k, scale, ids.long(), counts)
    with pytest.raises(ValueError, match="expected 32 or 64 index heads, got 48"):
        rerank(q[:, :48].contiguous(), gates[:, :48].contiguous(), k, scale, ids, counts)
    with pytest.raises(ValueError, match="pool"):
        rerank_paged(q, gates, k.view(torch.uint8), ids, counts)
