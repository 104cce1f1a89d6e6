"""Decode over sketches as a whole: candidates, tokens and slots of every row against oracles."""

from __future__ import annotations

import ctypes
import pathlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from on_cpu import COMPILER, aligned, call, compiled
from oracles import assert_best
from paged_rows import PRECISION
from sketched_rows import Sketched, cheap_scores, sketched
from torch import Tensor

from sglang_misa.kernels.decode.operands import Chosen, SketchPolicy
from sglang_misa.kernels.decode.topk_sketched import SketchScratch, rescore, sketch_topk
from sglang_misa.kernels.layout import HEAD_DIM, INDEX_HEADS, PAGE, SKETCH_BITS
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_page_means, update_slots

EDGES = (0, 1, 63, 64, 65, 128, 191, 192, 193, 2047, 2048, 2049)
TOPK = 96


@dataclass(frozen=True)
class Result:
    slots: Tensor
    positions: Tensor
    scratch: SketchScratch


def run(batch: Sketched, policy: SketchPolicy, scratch: SketchScratch | None = None, k: int = TOPK) -> Result:
    rows, heads, _ = batch.index_q.shape
    device = batch.index_q.device
    scratch = scratch or SketchScratch.allocate(rows, batch.page_table.shape[1], heads, policy, device)
    out = torch.empty(rows, k, dtype=torch.int32, device=device)
    positions = torch.empty_like(out)
    sketch_topk(batch.operands, batch.stats, scratch=scratch, out=Chosen(out, positions))
    return Result(out, positions, scratch)


def check(batch: Sketched, result: Result) -> None:
    """Candidates are the best by the row's own columns; tokens are the best of those by all heads; slots are theirs."""
    policy, k = result.scratch.policy, result.slots.shape[1]
    for row, length in enumerate(batch.seq_lens.tolist()):
        count = min(length, policy.candidates)
        candidates = result.scratch.positions[row, :count].long()
        assert (candidates.diff() > 0).all()
        if length <= policy.candidates:
            assert torch.equal(candidates.cpu(), torch.arange(length))
        else:
            scored = (length // PAGE - 1) * PAGE
            newest = candidates[candidates >= scored]
            assert torch.equal(newest.cpu(), torch.arange(scored, length))
            columns = result.scratch.columns
            cheap = cheap_scores(batch, row, columns.queries[row], columns.gates[row], policy.residual)
            in_list = torch.zeros(scored, dtype=torch.bool)
            in_list[candidates[candidates < scored].cpu()] = True
            # a key holds nine bits of fraction, so a score under the cut by less than 2⁻⁹ of it may be in
            worst, best = cheap[in_list].min(), cheap[~in_list].max()
            assert best - worst <= 2**-9 * worst.abs() + 1e-5 * cheap.abs().max()
        taken = result.positions[row]
        there = taken[taken >= 0].long()
        assert len(there) == min(k, length)
        assert (taken[len(there) :] == -1).all()
        assert (result.slots[row, len(there) :] == -1).all()
        assert (there.diff() > 0).all()
        if length:
            assert_best(there, candidates, batch.scores(row, PRECISION), k)
        slots = batch.page_table[row, there // PAGE] * PAGE + there % PAGE
        assert torch.equal(result.slots[row, : len(there)].long(), slots.long())


@pytest.mark.parametrize("bits", SKETCH_BITS)
@pytest.mark.parametrize(
    "policy",
    [
        SketchPolicy(7, "peak", True, 512),
        SketchPolicy(8, "mean", False, 256),
        SketchPolicy(None, "peak", False, 192),
        SketchPolicy(3, "signed", True, 320),
    ],
)
def test_rows_of_every_length_match_the_oracle(device: str, bits: int, policy: SketchPolicy) -> None:
    batch = sketched((*EDGES, 255, 256, 257, 511, 513), bits, device, width=40)
    check(batch, run(batch, policy))


def test_candidates_for_all_is_dsa(device: str) -> None:
    batch = sketched((2048, 700, 97, 96, 5), 1, device)
    result = run(batch, SketchPolicy(7, "peak", True, 2048))
    for row, length in enumerate(batch.seq_lens.tolist()):
        taken = result.positions[row][result.positions[row] >= 0].long()
        assert_best(taken, torch.arange(length, device=device), batch.scores(row, PRECISION), TOPK)


def test_physical_pages_and_stale_entries_do_not_matter(device: str) -> None:
    batch = sketched((1500, 900, 300), 2, device)
    policy = SketchPolicy(7, "peak", True, 256)
    expected = run(batch, policy)
    order = torch.randperm(len(batch.index_k_pages), generator=torch.Generator().manual_seed(5)).to(device)
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order), device=device)
    used = torch.arange(batch.page_table.shape[1], device=device) < -(-batch.seq_lens[:, None] // PAGE)
    table = torch.where(used, moved[batch.page_table.clamp(0, len(order) - 1).long()].int(), -12345)
    pools = {name: getattr(batch, name)[order] for name in ("index_k_pages", "page_means", "sketches")}
    result = run(replace(batch, page_table=table, **pools), policy)
    assert torch.equal(result.positions, expected.positions)


def test_one_scratch_serves_every_step_and_its_pages_complete_in_it(device: str) -> None:
    """A row grows by tokens; each step's newest page gets its statistics at the step's end and not before."""
    grown = sketched((1100, 1100), 2, device)
    policy = SketchPolicy(7, "peak", True, 192)
    scratch = SketchScratch.allocate(2, grown.page_table.shape[1] + 3, 32, policy, torch.device(device))
    means = torch.full_like(grown.page_means, torch.nan)
    sketches = torch.full_like(grown.sketches, 0xFF)
    start = torch.full((2,), 4 * PAGE + 60, dtype=torch.int32, device=device)
    update_page_means(grown.index_k_pages, means, grown.page_table, start, sketches)
    layers = Layers.of([grown.index_k_pages], [means], [sketches])
    for length in (4 * PAGE + 61, 4 * PAGE + 63, 5 * PAGE, 5 * PAGE + 1, 5 * PAGE + 64, 6 * PAGE + 1, 6 * PAGE + 2):
        lens = torch.tensor([length, length - 60], dtype=torch.int32, device=device)
        batch = replace(grown, page_means=means, sketches=sketches, seq_lens=lens)
        check(batch, run(batch, policy, scratch))
        update_last_page_means(layers, grown.page_table, lens)


def test_a_nan_key_costs_its_own_page_only(device: str) -> None:
    batch = sketched((20 * PAGE,), 2, device)
    page = int(batch.page_table[0, 4])
    batch.index_k_pages[page, PAGE * HEAD_DIM :].view(torch.float32)[3] = torch.nan  # one key's scale
    update_slots(
        batch.index_k_pages, batch.page_means, torch.tensor([page * PAGE + PAGE - 1], device=device), batch.sketches
    )
    result = run(batch, SketchPolicy(None, "peak", False, 512))
    candidates = result.scratch.positions[0].long()
    assert not torch.isin(candidates, torch.arange(4 * PAGE, 5 * PAGE, device=device)).any()
    columns = result.scratch.columns
    cheap = cheap_scores(batch, 0, columns.queries[0], columns.gates[0], False)
    ranked = torch.where(cheap.isnan(), -torch.inf, cheap).sort(descending=True).values
    cut = ranked[511 - PAGE]
    assert cheap[candidates[candidates < 19 * PAGE].cpu()].min() >= cut - 2**-8 * cut.abs()


def test_wrong_policies_and_scratch_are_named(device: str) -> None:
    with pytest.raises(ValueError, match="heads"):
        SketchPolicy(8, "peak", True, 512)
    with pytest.raises(ValueError, match="router"):
        SketchPolicy(8, "best", False, 512)
    with pytest.raises(ValueError, match="candidates"):
        SketchPolicy(8, "peak", False, 64)
    batch = sketched((300,), 2, device)
    with pytest.raises(ValueError, match="raise the candidates"):
        run(batch, SketchPolicy(8, "peak", False, 128), k=256)
    policy = SketchPolicy(8, "peak", False, 256)
    with pytest.raises(ValueError, match="widest page table"):
        run(batch, policy, SketchScratch.allocate(2, 5, 32, policy, torch.device(device)))


@COMPILER
@pytest.mark.parametrize("index_heads", INDEX_HEADS)
def test_candidates_are_scored_on_their_stored_keys(tmp_path: pathlib.Path, index_heads: int) -> None:
    """The CUDA source on the CPU (simt/) and what stands in for it there: one tile of a block, a few, all of them."""
    lens, policy = (0, 1, TOPK, TOPK + 1, 257, 700, 1025, 3000), SketchPolicy(8, "peak", False, 1024)
    batch = sketched(lens, 1, "cpu", heads=index_heads)
    rows, count = len(lens), policy.candidates
    scratch = SketchScratch.allocate(rows, 50, index_heads, policy, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    for row, length in enumerate(lens):
        chosen = torch.randperm(length, generator=random)[:count].sort().values
        scratch.positions[row, : len(chosen)] = chosen
    rescore(batch.operands, topk=TOPK, scratch=scratch)

    library = compiled(tmp_path, "sketch_rescore", index_heads=index_heads)
    library.rescore_rows.restype = ctypes.c_bool
    q, pages = (aligned(x.view(torch.uint8).numpy(), np.uint8) for x in (batch.index_q, batch.index_k_pages))
    gates, positions = aligned(batch.head_gates.numpy(), np.float32), aligned(scratch.positions.numpy(), np.int32)
    for span in (None, 1, 3, 16):
        logits = scratch.logits
        if span is not None:
            got = aligned(np.full((rows, count), np.nan), np.float32)
            call(
                library.rescore_rows, q, gates, pages, batch.page_table.numpy(), batch.seq_lens.numpy(), positions,
                got, batch.page_table.stride(0), count, TOPK, span, -(-count // (64 * span)), rows,
            )  # fmt: skip
            logits = torch.from_numpy(got)
        for row, length in enumerate(lens):
            scored = min(length, count) if length > TOPK else 0
            assert logits[row, scored:].isnan().all()
            if scored:
                bounds, chosen = batch.scores(row, PRECISION), scratch.positions[row, :scored].long()
                assert (logits[row, :scored] >= bounds.low[chosen]).all()
                assert (logits[row, :scored] <= bounds.high[chosen]).all()
