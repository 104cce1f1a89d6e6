"""The scan over sketches and its candidates: CUDA sources on the CPU (simt/), and what stands in for them there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call
from sketched_rows import cheap_scores, sketched

from sglang_misa.kernels.decode.operands import SketchPolicy
from sglang_misa.kernels.decode.route_pages import Columns
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches, score_keys
from sglang_misa.kernels.layout import HEAD_DIM, PAGE

SCANS = [(1, 8, True), (2, 8, True), (2, 4, True), (1, 16, False), (2, 32, False)]  # bits, columns, residual
LIBRARIES = [
    *(("sketch_scan", {"sketch_bits": bits, "columns": columns}) for bits, columns, _ in SCANS),
    ("sketch_candidates", {}),
]
LINE = 128  # bytes that the listing gives up at once
Library = Callable[..., ctypes.CDLL]


@COMPILER
@pytest.mark.parametrize(("bits", "columns", "residual"), SCANS)
def test_the_scan_scores_every_sketched_key(library: Library, bits: int, columns: int, residual: bool) -> None:
    lens = (0, 64, 128, 191, 192, 5 * PAGE, 23 * PAGE + 5, 40 * PAGE)
    batch = sketched(lens, bits, "cpu", heads=max(columns, 32), width=44)
    scan = library("sketch_scan", sketch_bits=bits, columns=columns).scan_rows
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(-127, 128, (len(lens), columns, HEAD_DIM), dtype=torch.int8, generator=random)
    queries = aligned(numbers.numpy(), np.int8)
    gates = batch.head_gates[:, :columns].contiguous()
    longest, span, rows = 128, 9 if columns <= 8 else 21, len(lens)  # one window of pages, or two
    blocks, room = -(-44 // (span * 4)), 44 * PAGE
    got = aligned(np.full((rows, room), 0xABCD), np.uint16)
    means = aligned(batch.page_means.view(torch.uint8).numpy(), np.uint8)
    sketches = aligned(batch.sketches.numpy(), np.uint8)
    table, seq_lens = batch.page_table.contiguous().numpy(), batch.seq_lens.numpy()
    call(
        scan, queries, gates.numpy(), means, sketches, table, seq_lens, got, 44, room, columns,
        int(residual), longest, span, blocks, rows,
    )  # fmt: skip
    on_cpu = torch.full((rows, room), 0xABCD, dtype=torch.int32).to(torch.uint16)
    policy = SketchPolicy(columns - residual, "peak", residual, longest)
    own = Columns(numbers, gates)
    scan_sketches(own, batch.operands, batch.stats, policy, scores=on_cpu)
    for row, length in enumerate(lens):
        scored = (length // PAGE - 1) * PAGE if length > longest else 0
        assert (got[row, scored:] == 0xABCD).all()
        if not scored:
            continue
        truth = cheap_scores(batch, row, numbers[row], gates[row], residual)
        size = cheap_scores(batch, row, numbers[row], gates[row], residual, of=torch.abs)
        near = 4e-6 * truth.abs().max()
        for keys, slack in (
            (torch.from_numpy(got[row, :scored].astype(np.int32)), near + 2**-9 * size),  # columns and gates in tf32
            (on_cpu[row, :scored].to(torch.int32), near),
        ):
            low, high = (score_keys((truth + by).float()) for by in (-slack, slack))
            assert ((keys >= low) & (keys <= high)).all()


@COMPILER
def test_a_nan_page_scores_below_all_others(library: Library) -> None:
    batch = sketched((6 * PAGE,), 2, "cpu")
    batch.page_means[batch.page_table[0, 2].long()] = torch.nan
    scan = library("sketch_scan", sketch_bits=2, columns=8).scan_rows
    got = aligned(np.full((1, 6 * PAGE), 0xABCD), np.uint16)
    operands = [
        torch.ones(1, 8, HEAD_DIM, dtype=torch.int8),
        batch.head_gates[:, :8],
        batch.page_means.view(torch.uint8),
    ]
    q, gates, means = (aligned(x.contiguous().numpy(), x.numpy().dtype) for x in operands)
    call(
        scan, q, gates, means, aligned(batch.sketches.numpy(), np.uint8), batch.page_table.numpy(),
        batch.seq_lens.numpy(), got, 6, 6 * PAGE, 8, 0, 100, 4, 1, 1,
    )  # fmt: skip
    assert (got[0, 2 * PAGE : 3 * PAGE] == 0).all()
    assert (np.delete(got[0, : 5 * PAGE], np.s_[2 * PAGE : 3 * PAGE]) > 0).all()


def test_score_keys_order_like_scores() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(4096, generator=random) * 2.0 ** torch.randint(-40, 40, (4096,), generator=random)
    extremes = torch.tensor([0.0, -torch.inf, torch.inf, 1e-45, -3e38])
    scores = torch.cat([scores, extremes]).sort().values
    keys = score_keys(scores)
    assert (keys.diff() >= 0).all()
    assert keys.min() >= 1
    assert keys.max() <= 0xFFFF
    assert score_keys(torch.tensor([torch.nan])) == 0
    near = score_keys(torch.tensor([3.0, 3.0 * (1 + 2**-9), -3.0, -3.0 * (1 + 2**-9)]))
    assert near[0] < near[1]
    assert near[2] > near[3]


@pytest.fixture(scope="module")
def lister(library: Library) -> ctypes.CDLL:
    return library("sketch_candidates")


@COMPILER
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_candidates_are_the_best_keys_and_the_newest_tokens(lister: ctypes.CDLL, blocks: int) -> None:
    candidates, room = 256, 60 * PAGE
    random = np.random.default_rng(0)
    cases = [
        random.integers(0, 0x10000, room),  # all of it
        np.full(room, 0x8000),  # all alike
        random.choice([0, 1, 0xFFFE], room),  # NaN, the lowest, the highest
        0x8000 + np.arange(room) // 3,
        (random.normal(0, 900, room) + 0x9000).clip(0, 0xFFFE),
        (random.normal(0, 9, room) + 0x8000).round(),  # around zero
    ]
    lens = [0, 256, 257, 319, 320, 60 * PAGE - 1]
    for case in cases:
        keys = np.tile(case, (len(lens), 1)).astype(np.uint16)
        seq_lens = np.asarray(lens, np.int32)
        got = aligned(np.full((len(lens), candidates), -9), np.int32)
        call(lister.list_rows, aligned(keys, np.uint16, LINE), seq_lens, got, room, candidates, len(lens), blocks)
        expected = torch.full((len(lens), candidates), -9, dtype=torch.int32)
        list_candidates(torch.from_numpy(keys), torch.from_numpy(seq_lens), positions=expected)
        assert np.array_equal(got, expected.numpy())
    _expect_by_definition(keys, lens, expected)


@COMPILER
@pytest.mark.parametrize(
    ("blocks", "pages"),
    [(1, 1500), (2, 1200), (8, 2100)],  # a warp has six chunks, more than it holds; three; two, and some warps none
)
def test_candidates_come_from_all_blocks_and_from_keys_that_none_holds(
    lister: ctypes.CDLL, blocks: int, pages: int
) -> None:
    candidates, room = 4096, pages * PAGE
    random = np.random.default_rng(0)
    crowded = (random.normal(0, 900, room) + 0x9000).clip(0, 0xFFFE)
    bunched = crowded + 3000 * (np.arange(room) // 500 % 40 == 7)  # whole runs of lanes are chosen
    # no more keys above zero than about the candidates: the sample's bounds lie on both sides of it, far apart as keys
    above = [random.random(room) < share * candidates / room for share in (0.95, 1.2)]
    signs = [np.where(these, 0xC000, 0x3000) + random.normal(0, 300, room) for these in above]
    late = crowded + 3000 * (np.arange(room) > 0.95 * room)  # nearly all that is chosen lies together
    keys = np.stack([crowded, crowded // 512 * 512, bunched, late, *signs]).astype(np.uint16)
    lens = [room - 1, room - 70, room, room, room, room - 1]
    got = torch.full((len(lens), candidates), -9, dtype=torch.int32)
    given, lengths = aligned(keys, np.uint16, LINE), np.asarray(lens, np.int32)
    call(lister.list_rows, given, lengths, got.numpy(), room, candidates, len(lens), blocks)
    _expect_by_definition(keys, lens, got)


def _expect_by_definition(keys: np.ndarray, lens: list[int], positions: torch.Tensor) -> None:
    candidates = positions.shape[1]
    for row, length in enumerate(lens):
        scored = (length // PAGE - 1) * PAGE
        token = np.arange(length)
        if length > candidates:
            order = np.argsort(-keys[row, :scored].astype(np.int64), kind="stable")
            token = np.sort(np.concatenate([order[: candidates - (length - scored)], token[scored:]]))
        assert np.array_equal(positions[row, : len(token)].numpy(), token)
