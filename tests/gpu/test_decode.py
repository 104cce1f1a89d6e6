"""Decode by HISA's block filter at full size: kept blocks, scores, tokens and slots of every row against fp32."""

from __future__ import annotations

import pytest
import torch
from gpu.decoding import BLOCK_SIZE, BLOCKS, DEVICE, POOL_PAGES, TOPK, Call, Pool
from oracles import assert_block_filter

from sglang_misa.kernels.decode.operands import Chosen
from sglang_misa.kernels.decode.topk_kept import topk_kept
from sglang_misa.kernels.layout import PAGE

KIB = 1024
EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 8191, 8192, 8193, 8319, 8320]
SIZES = [(1, 2 * KIB), (1, 128 * KIB), (4, 32 * KIB), (16, 128 * KIB), (64, 32 * KIB), (64, 128 * KIB)]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool.random(POOL_PAGES)


def assert_right(call: Call) -> None:
    call.run()
    batch, kept = call.batch, call.scratch.kept
    for row, length in enumerate(batch.seq_lens.tolist()):
        assert_block_filter(batch, row, kept, call.out[row], call.positions[row], blocks=BLOCKS, block_size=BLOCK_SIZE)
        count = int(kept.lens[row]) if length else 0
        if count > TOPK:
            place = torch.arange(count, device=DEVICE)
            token = kept.blocks[row].long()[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            bounds, found = batch.scores(row), call.scratch.logits[row, :count]
            right = (found >= bounds.low[token]) & (found <= bounds.high[token])
            assert right.all(), f"row {row} of {length} tokens: a score that fp32 does not explain"


@pytest.mark.parametrize("heads", [64, 32])
def test_lengths_around_every_edge(pool: Pool, heads: int) -> None:
    assert_right(Call.of(pool.rows(EDGES, heads, 1)))


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize(("rows", "longest"), SIZES)
def test_any_batch_and_its_repeats(pool: Pool, rows: int, longest: int, heads: int) -> None:
    torch.manual_seed(rows + longest)
    lens = [longest, *torch.randint(max(1, longest // 8), longest + 1, (rows - 1,)).tolist()]
    call = Call.of(pool.rows(lens, heads, 2))
    assert_right(call)
    first = call.out.clone()
    for _ in range(20):
        call.out.fill_(-7)
        call.run()
        assert torch.equal(call.out, first), "differs between repeats"


def test_one_captured_graph_follows_lengths_and_page_tables(pool: Pool) -> None:
    """They change in place; each replay equals an eager call."""
    batch = pool.rows([128 * KIB] * 16, 64, 3)
    call = Call.of(batch)
    call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    for seed in range(4):
        torch.manual_seed(seed)
        lens = torch.randint(0, 128 * KIB, (16,)).tolist()
        lens[:6] = [1, 64, 2048 + seed, 8319 + seed, 8191 + seed, 100]
        fresh = pool.rows(lens, 64, 10 + seed)
        for name in ("index_q", "head_gates", "page_table", "seq_lens"):
            getattr(batch, name).copy_(getattr(fresh, name))
        call.out.fill_(-7)
        graph.replay()
        eager = Call.of(fresh)
        assert_right(eager)
        assert torch.equal(call.out, eager.out), f"replay {seed}: differs from eager"
        assert torch.equal(call.positions, eager.positions), f"replay {seed}: positions differ from eager"


ROOM = (BLOCKS + 1) * BLOCK_SIZE
LENS = [0, 1, 63, 2047, 2048, 2049, 4095, 4097, 8191, 8192, ROOM - 1, ROOM]
SHAPE = len(LENS), ROOM
HOSTILE = {
    "normal": lambda: torch.randn(SHAPE),
    "equal": lambda: torch.full(SHAPE, -0.25),
    "few values": lambda: torch.randint(-2, 2, SHAPE).float(),
    "mostly zero": lambda: torch.randn(SHAPE).relu() * (torch.rand(SHAPE) < 0.1),
    "cluster": lambda: 1000 + torch.randint(0, 3000, SHAPE).float() * 2**-14,
    "outlier": lambda: torch.randn(SHAPE).index_fill_(1, torch.tensor([5]), 1e30),
    "whole range": lambda: torch.randint(-(2**31), 2**31 - 1, SHAPE).int().view(torch.float32),
    "tiny": lambda: torch.randint(0, 5000, SHAPE).int().view(torch.float32),
    "infinite": lambda: torch.randn(SHAPE).index_fill_(1, torch.arange(7), torch.inf),
    "broken": lambda: torch.where(torch.rand(SHAPE) < 0.9, torch.nan, torch.randn(SHAPE)),
    "nan": lambda: torch.full(SHAPE, torch.nan),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_selection_alone_is_a_stable_sort_of_hostile_scores(name: str) -> None:
    torch.manual_seed(0)
    lowest = torch.finfo(torch.float32).min
    kept = Call.of(Pool.random(64).rows([1] * len(LENS), 64, 0)).scratch.kept
    kept.pages.copy_(torch.randperm(1 << 20)[: kept.pages.numel()].view_as(kept.pages))
    kept.blocks.copy_(torch.arange(BLOCKS + 1).expand_as(kept.blocks) * 3)
    kept.lens.copy_(torch.tensor(LENS))
    scores = HOSTILE[name]()
    clean, logits = scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest), scores.to(DEVICE)
    for row, length in enumerate(LENS):
        logits[row, length:] = torch.nan
    out = torch.full((len(LENS), TOPK), -7, dtype=torch.int32, device=DEVICE)
    positions = out.clone()
    topk_kept(logits, kept, Chosen(out, positions))
    for row, length in enumerate(LENS):
        token = clean[row, :length].sort(descending=True, stable=True).indices[:TOPK].sort().values
        wanted = torch.full((TOPK,), -1)
        wanted[: len(token)] = token // BLOCK_SIZE * 3 * BLOCK_SIZE + token % BLOCK_SIZE
        assert torch.equal(positions[row].long().cpu(), wanted), f"{length} tokens: positions"
        wanted[: len(token)] = kept.pages[row].cpu()[token // PAGE].long() * PAGE + token % PAGE
        assert torch.equal(out[row].long().cpu(), wanted), f"{length} tokens: slots"
