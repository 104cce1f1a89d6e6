"""Decode over page sketches: quantiser, CUDA sources on the CPU (simt/), pipeline, recall on trained tensors."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cuda_on_cpu import aligned, call, compiled
from paged_rows import assert_best, make
from torch import Tensor

from sglang_misa import reference
from sglang_misa.kernels.decode.route_pages import Columns, route_pages
from sglang_misa.kernels.decode.scan_sketches import list_candidates, scan_sketches, score_keys, unpack
from sglang_misa.kernels.decode.topk_sketched import PageSketch, SketchPolicy, SketchScratch, sketch_topk
from sglang_misa.kernels.layout import HEAD_DIM, PAGE, SKETCH_BITS, sketch_bytes
from sglang_misa.kernels.page_means import Layers, update_last_page_means, update_page_means, update_slots

EDGES = (0, 1, 63, 64, 65, 128, 191, 192, 193, 2047, 2048, 2049)
TOPK = 96


def index_k_pages(n: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    keys = (torch.randn(n, PAGE * HEAD_DIM, generator=random) * 2).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(n, PAGE, generator=random).add_(0.5)
    return torch.cat([keys, scales.view(torch.uint8)], 1)


def hostile_pages() -> Tensor:
    """Whole pages of: random keys, one NaN scale, one NaN key, a zero key, one key 64 times, keys whose squares
    overflow, scales of zero, negative and tiny scales."""
    pages = index_k_pages(8)
    keys, scales = pages[:, : PAGE * HEAD_DIM].view(8, PAGE, HEAD_DIM), pages[:, PAGE * HEAD_DIM :].view(torch.float32)
    scales[1, 3] = torch.nan
    keys[2, 5, 7] = 0x7F
    keys[3, 9] = 0
    keys[4] = keys[4, :1].clone()
    scales[4] = 1
    scales[5] *= 1e20
    scales[6] = 0
    scales[7] = torch.linspace(-1, 1, PAGE) * 2.0**-120
    return pages


class TestQuantiser:
    @pytest.mark.parametrize("bits", SKETCH_BITS)
    def test_kernels_write_the_bits_of_the_reference(self, device: str, bits: int) -> None:
        """At extend, for written slots and for the newest page, and never a page that is not complete."""
        pages = hostile_pages().to(device)
        n = len(pages)
        table = torch.tensor([[3, 1, 0, -7], [6, 5, 4, 2], [7, 2**30, -1, 9]], dtype=torch.int32, device=device)
        lens = torch.tensor([3 * PAGE, 3 * PAGE + 63, PAGE], dtype=torch.int32, device=device)
        slots = torch.tensor([0, -1, *range(PAGE - 1, (n - 1) * PAGE, PAGE)], device=device)
        slots = slots[slots // PAGE != 2]
        updates = {
            "extend": lambda m, s: update_page_means(pages, m, table, lens, 128, s),
            "slots": lambda m, s: update_slots(pages, m, slots, s),
            "newest": lambda m, s: update_last_page_means(Layers.of([pages], [m], [s]), table, lens),
        }
        written = {"extend": {0, 1, 3, 4, 5, 6, 7}, "slots": {0, 1, 3, 4, 5, 6}, "newest": {0, 7}}
        for name, update in updates.items():
            means = torch.full((n, HEAD_DIM), 7.0, dtype=torch.bfloat16, device=device)
            sketches = torch.full((n, sketch_bytes(bits)), 0xA5, dtype=torch.uint8, device=device)
            update(means, sketches)
            for page in range(n):
                if page not in written[name]:
                    assert (means[page] == 7).all(), (name, page)
                    assert (sketches[page] == 0xA5).all(), (name, page)
                    continue
                codes, scales = reference.quantize_pages(pages[page, None], means[page, None], bits)
                own = unpack(sketches[page, None].cpu(), bits)
                assert torch.equal(own[0], codes.cpu()), (name, page)
                assert torch.equal(own[1].view(torch.int16), scales.cpu().view(torch.int16)), (name, page)

    @pytest.mark.parametrize("bits", SKETCH_BITS)
    def test_a_broken_key_stays_in_its_page(self, bits: int) -> None:
        pages = hostile_pages()
        means = reference.page_means(pages).bfloat16()
        codes, scales = reference.quantize_pages(pages, means, bits)
        assert torch.isfinite(scales.float()).all()
        for page in (1, 2):
            assert not codes[page].any()
            assert not scales[page].any()
        keys = reference.sketched_keys(codes, scales, means, bits)
        assert torch.isfinite(keys[[0, 3, 4, 6, 7]]).all()
        assert torch.equal(keys[4, 0], means[4].float())  # equal keys have no residual but the mean's rounding

    @pytest.mark.parametrize(("bits", "error"), [(1, 0.64), (2, 0.145)])
    def test_sketches_keep_inner_products_and_lose_what_levels_must(self, bits: int, error: float) -> None:
        """⟨r, r̂⟩ = ‖r‖² within bf16; of a Gaussian the rest is π/2 - 1 with one bit, 0.1188 / 0.8812 with two."""
        pages = index_k_pages(16)
        means = reference.page_means(pages).bfloat16()
        keys = reference.sketched_keys(*reference.quantize_pages(pages, means, bits), means, bits)
        truth, sketch = (x - means.float().unsqueeze(1) for x in (reference.dequantize_pages(pages), keys))
        energy = truth.square().sum(-1)
        torch.testing.assert_close((truth * sketch).sum(-1), energy, rtol=2**-8, atol=0)
        assert ((truth - sketch).square().sum(-1) / energy).mean() < error


@dataclass(frozen=True)
class Batch:
    """A batch of test_decode's hostile pool, with sketches: those that must not be read are NaN and ones."""

    index_q: Tensor
    head_gates: Tensor
    pool: Tensor
    stats: PageSketch
    page_table: Tensor
    seq_lens: Tensor
    keys: list[Tensor]


def sketched(lens: tuple[int, ...], bits: int, device: str, *, heads: int = 32, width: int | None = None) -> Batch:
    batch = make(lens, heads=heads, width=width)
    num_pages = len(batch.pool)
    sketches = torch.full((num_pages, sketch_bytes(bits)), 0xFF, dtype=torch.uint8)
    for row, length in enumerate(lens):
        pages = batch.page_table[row, : max(length // PAGE - 1, 0)].long()
        if len(pages):
            sketches[pages] = pack(*reference.quantize_pages(batch.pool[pages], batch.page_means[pages], bits), bits)
    keys = [batch.keys(row).to(device) for row in range(len(lens))]
    stats = PageSketch(batch.page_means.to(device), sketches.to(device))
    parts = (batch.index_q, batch.head_gates, batch.pool, batch.page_table, batch.seq_lens)
    q, gates, pool, table, seq_lens = (part.to(device) for part in parts)
    return Batch(q, gates, pool, stats, table, seq_lens, keys)


def pack(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`, code by code as `layout.sketch_bytes` says."""
    n = len(codes)
    words = torch.zeros(n, PAGE * HEAD_DIM * bits // 32, dtype=torch.int64)
    key, dim = torch.meshgrid(torch.arange(PAGE), torch.arange(HEAD_DIM), indexing="ij")
    group, r, odd, c, e = key // 16, key % 16 // 2, key % 2, dim // 32, dim % 4
    lane = 4 * r + c
    if bits == 1:
        word, bit = ((group // 2 * 32 + lane) * 2 + group % 2) * 2 + dim % 32 // 16, 8 * e + 2 * (dim % 16 // 4) + odd
    else:
        word, bit = (group * 32 + lane) * 4 + dim % 32 // 8, 8 * e + 4 * (dim % 8 // 4) + 2 * odd
    words.index_add_(1, word.flatten(), (codes.long() << bit).flatten(1))
    first = torch.arange(PAGE)
    ordered = torch.empty_like(scales)
    ordered[:, first % 16 // 2 * 8 + first // 16 * 2 + first % 2] = scales
    signed = torch.where(words >= 2**31, words - 2**32, words).int()
    return torch.cat([signed.view(torch.uint8), ordered.view(torch.uint8)], 1)


def cheap_scores(batch: Batch, row: int, queries: Tensor, gates: Tensor, residual: bool) -> Tensor:
    """fp64 scores of a row's sketched tokens by these columns, from the reference's sketched keys."""
    bits = batch.stats.bits
    pages = batch.page_table[row, : int(batch.seq_lens[row]) // PAGE - 1].long()
    codes, scales = unpack(batch.stats.sketches[pages].cpu(), bits)
    keys = reference.sketched_keys(codes, scales, batch.stats.means[pages].cpu(), bits).flatten(0, 1).double()
    products = keys @ queries.cpu().double().T
    columns = products.shape[1] - residual
    products[:, :columns].relu_()
    return products @ gates.cpu().double()


SIMT = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")


@SIMT
@pytest.mark.parametrize(
    ("bits", "columns", "residual"), [(1, 8, True), (2, 8, True), (2, 4, True), (1, 16, False), (2, 32, False)]
)
def test_the_scan_scores_every_sketched_key(tmp_path: pathlib.Path, bits: int, columns: int, residual: bool) -> None:
    lens = (0, 64, 128, 191, 192, 5 * PAGE, 23 * PAGE + 5, 40 * PAGE)
    batch = sketched(lens, bits, "cpu", heads=max(columns, 32), width=44)
    library = compiled(
        tmp_path, "sketch_scan", f"-DMISA_SKETCH_BITS={bits}", f"-DMISA_COLUMN_TILES={max(1, columns // 8)}"
    )
    library.scan_rows.restype = ctypes.c_bool
    queries = aligned(batch.index_q[:, :columns].contiguous().view(torch.uint8).numpy(), np.uint8)
    gates = batch.head_gates[:, :columns].contiguous()
    longest, span, rows = 150, 4, len(lens)
    blocks, room = -(-44 // (span * 4)), 44 * PAGE
    got = aligned(np.full((rows, room), 0xABCD), np.uint16)
    means = aligned(batch.stats.means.view(torch.uint8).numpy(), np.uint8)
    sketches = aligned(batch.stats.sketches.numpy(), np.uint8)
    table, seq_lens = batch.page_table.contiguous().numpy(), batch.seq_lens.numpy()
    call(
        library.scan_rows, queries, gates.numpy(), means, sketches, table, seq_lens, got, 44, room, columns,
        int(residual), longest, span, blocks, rows,
    )  # fmt: skip
    on_cpu = torch.full((rows, room), 0xABCD, dtype=torch.int32).to(torch.uint16)
    scan_sketches(
        batch.index_q[:, :columns], gates, batch.stats.means, batch.stats.sketches, batch.page_table, batch.seq_lens,
        bits=bits, residual=residual, leads=True, longer_than=longest, scores=on_cpu,
    )  # fmt: skip
    for row, length in enumerate(lens):
        scored = (length // PAGE - 1) * PAGE if length > longest else 0
        assert (got[row, scored:] == 0xABCD).all()
        if not scored:
            continue
        truth = cheap_scores(batch, row, batch.index_q[row, :columns].float(), gates[row], residual) / 512
        for keys in (torch.from_numpy(got[row, :scored].astype(np.int32)), on_cpu[row, :scored].to(torch.int32)):
            slack = 4e-6 * truth.abs().max()
            low, high = (score_keys((truth + by).float()) for by in (-slack, slack))
            assert ((keys >= low) & (keys <= high)).all()


@SIMT
def test_a_nan_page_scores_below_all_others(tmp_path: pathlib.Path) -> None:
    batch = sketched((6 * PAGE,), 2, "cpu")
    batch.stats.means[batch.page_table[0, 2].long()] = torch.nan
    library = compiled(tmp_path, "sketch_scan")
    library.scan_rows.restype = ctypes.c_bool
    got = aligned(np.full((1, 6 * PAGE), 0xABCD), np.uint16)
    operands = [
        batch.index_q[:, :8].contiguous().view(torch.uint8),
        batch.head_gates[:, :8],
        batch.stats.means.view(torch.uint8),
    ]
    q, gates, means = (aligned(x.contiguous().numpy(), x.numpy().dtype) for x in operands)
    call(
        library.scan_rows, q, gates, means, aligned(batch.stats.sketches.numpy(), np.uint8), batch.page_table.numpy(),
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


@SIMT
def test_candidates_are_the_best_keys_and_the_newest_tokens(tmp_path: pathlib.Path) -> None:
    library = compiled(tmp_path, "sketch_candidates")
    library.list_rows.restype = ctypes.c_bool
    candidates, room = 256, 60 * PAGE
    random = np.random.default_rng(0)
    cases = [
        random.integers(0, 0x10000, room),  # all of it
        np.full(room, 0x8000),  # all alike
        random.integers(0x9000, 0x9010, room),  # one bin of the upper bits
        random.choice([0, 1, 0xFFFF], room),  # NaN, the lowest, the highest
        0x8000 + np.arange(room) // 3,
        (random.normal(0, 900, room) + 0x9000).clip(0, 0xFFFF),
    ]
    lens = [0, 1, 255, 256, 257, 3 * PAGE, 319, 320, 59 * PAGE, 60 * PAGE - 1, 60 * PAGE]
    for case in cases:
        keys = aligned(np.tile(case, (len(lens), 1)), np.uint16)
        seq_lens = np.asarray(lens, np.int32)
        got = aligned(np.full((len(lens), candidates), -9), np.int32)
        call(library.list_rows, keys, seq_lens, got, room, candidates, len(lens))
        expected = torch.full((len(lens), candidates), -9, dtype=torch.int32)
        list_candidates(torch.from_numpy(keys), torch.from_numpy(seq_lens), positions=expected)
        assert np.array_equal(got, expected.numpy())
    for row, length in enumerate(lens):  # the last case, from the definition
        scored = (length // PAGE - 1) * PAGE
        token = np.arange(length)
        if length > candidates:
            order = np.argsort(-keys[row, :scored].astype(np.int64), kind="stable")
            token = np.sort(np.concatenate([order[: candidates - (length - scored)], token[scored:]]))
        assert np.array_equal(expected[row, : len(token)].numpy(), token)


@pytest.mark.parametrize("router", ["mean", "peak", "signed", "weight"])
@pytest.mark.parametrize("residual", [False, True])
def test_columns_are_those_of_the_reference(device: str, router: str, residual: bool) -> None:
    lens = (0, 130, 2 * PAGE + 1, 66 * PAGE, 131 * PAGE + 3)
    batch = sketched(lens, 1, device, heads=64)
    heads = 7 if residual else 8
    columns = Columns.allocate(len(lens), batch.page_table.shape[1], 64, 8, torch.device(device))
    for _ in range(2):
        route_pages(
            batch.index_q, batch.head_gates, batch.stats.means, batch.page_table, batch.seq_lens,
            heads=heads, router=router, residual=residual, longer_than=130, out=columns,
        )  # fmt: skip
    assert not columns.done.any()
    for row, length in enumerate(lens):
        if length <= 130:
            continue
        pages = batch.page_table[row, : length // PAGE - 1].long()
        q, gates, means = (
            batch.index_q[None, row, None],
            batch.head_gates[None, row, None],
            batch.stats.means[pages][None],
        )
        complete = torch.tensor([[len(pages)]], device=device)
        stats = reference.block_statistics(q, gates, means.float(), complete, router)
        ids = reference.top_heads(stats.heads, heads)
        assert torch.equal(columns.queries[row, :heads].float(), q[0, 0, ids[0, 0]].float())
        assert torch.equal(columns.gates[row, :heads], gates[0, 0, ids[0, 0]])
        if residual:
            query, scale = reference.residual_query(q, gates, ids, stats.positive)
            own = columns.queries[row, heads].float() * columns.gates[row, heads]
            truth = (query * scale.unsqueeze(-1))[0, 0]
            torch.testing.assert_close(own, truth, rtol=2**-3, atol=2**-9 * truth.abs().max().item())
            torch.testing.assert_close(columns.gates[row, heads], scale[0, 0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("router", ["mean", "peak", "signed", "weight"])
def test_heads_that_are_not_finite_are_not_routed_and_leave_the_residual_finite(device: str, router: str) -> None:
    batch = sketched((5 * PAGE,), 1, device, heads=32)
    batch.head_gates[0, 3] = torch.nan
    batch.head_gates[0, 11] = torch.nan
    columns = Columns.allocate(1, batch.page_table.shape[1], 32, 8, torch.device(device))
    route_pages(
        batch.index_q, batch.head_gates, batch.stats.means, batch.page_table, batch.seq_lens,
        heads=7, router=router, residual=True, longer_than=128, out=columns,
    )  # fmt: skip
    assert torch.isfinite(columns.gates).all()
    assert torch.isfinite(columns.queries.float()).all()


@dataclass(frozen=True)
class Result:
    slots: Tensor
    positions: Tensor
    scratch: SketchScratch


def run(batch: Batch, policy: SketchPolicy, scratch: SketchScratch | None = None, k: int = TOPK) -> Result:
    rows, heads, _ = batch.index_q.shape
    device = batch.index_q.device
    scratch = scratch or SketchScratch.allocate(rows, batch.page_table.shape[1], heads, policy, device)
    out = torch.empty(rows, k, dtype=torch.int32, device=device)
    positions = torch.empty_like(out)
    sketch_topk(
        batch.index_q, batch.head_gates, batch.pool, batch.stats, batch.page_table, batch.seq_lens,
        scratch=scratch, out=out, positions=positions,
    )  # fmt: skip
    return Result(out, positions, scratch)


def check(batch: Batch, result: Result) -> None:
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
            queries, gates = (batch.index_q, batch.head_gates) if columns is None else (columns.queries, columns.gates)
            cheap = cheap_scores(batch, row, queries[row].float(), gates[row], policy.residual)
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
            ranked = batch.head_gates[row] @ torch.relu(batch.index_q[row].float() @ batch.keys[row].T)
            assert_best(there, candidates, ranked, k)
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
        ranked = batch.head_gates[row] @ torch.relu(batch.index_q[row].float() @ batch.keys[row].T)
        assert_best(taken, torch.arange(length, device=device), ranked, TOPK)


def test_physical_pages_and_stale_entries_do_not_matter(device: str) -> None:
    batch = sketched((1500, 900, 300), 2, device)
    policy = SketchPolicy(7, "peak", True, 256)
    expected = run(batch, policy)
    order = torch.randperm(len(batch.pool), generator=torch.Generator().manual_seed(5)).to(device)
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order), device=device)
    used = torch.arange(batch.page_table.shape[1], device=device) < -(-batch.seq_lens[:, None] // PAGE)
    table = torch.where(used, moved[batch.page_table.clamp(0, len(order) - 1).long()].int(), -12345)
    stats = PageSketch(batch.stats.means[order], batch.stats.sketches[order])
    result = run(replace(batch, pool=batch.pool[order], stats=stats, page_table=table), policy)
    assert torch.equal(result.positions, expected.positions)


def test_one_scratch_serves_every_step_and_its_pages_complete_in_it(device: str) -> None:
    """A row grows by tokens; each step's newest page gets its statistics at the step's end and not before."""
    grown = sketched((1100, 1100), 2, device)
    policy = SketchPolicy(7, "peak", True, 192)
    scratch = SketchScratch.allocate(2, grown.page_table.shape[1] + 3, 32, policy, torch.device(device))
    means = torch.full_like(grown.stats.means, torch.nan)
    sketches = torch.full_like(grown.stats.sketches, 0xFF)
    start = torch.full((2,), 4 * PAGE + 60, dtype=torch.int32, device=device)
    update_page_means(grown.pool, means, grown.page_table, start, PAGE, sketches)
    layers = Layers.of([grown.pool], [means], [sketches])
    for length in (4 * PAGE + 61, 4 * PAGE + 63, 5 * PAGE, 5 * PAGE + 1, 5 * PAGE + 64, 6 * PAGE + 1, 6 * PAGE + 2):
        lens = torch.tensor([length, length - 60], dtype=torch.int32, device=device)
        keys = [key[:n] for key, n in zip(grown.keys, lens.tolist(), strict=True)]
        batch = replace(grown, stats=PageSketch(means, sketches), seq_lens=lens, keys=keys)
        check(batch, run(batch, policy, scratch))
        update_last_page_means(layers, grown.page_table, lens)


def test_a_nan_key_costs_its_own_page_only(device: str) -> None:
    batch = sketched((20 * PAGE,), 2, device)
    page = int(batch.page_table[0, 4])
    batch.pool[page, PAGE * HEAD_DIM :].view(torch.float32)[3] = torch.nan  # one key's scale
    update_slots(
        batch.pool, batch.stats.means, torch.tensor([page * PAGE + PAGE - 1], device=device), batch.stats.sketches
    )
    result = run(batch, SketchPolicy(None, "peak", False, 512))
    candidates = result.scratch.positions[0].long()
    assert not torch.isin(candidates, torch.arange(4 * PAGE, 5 * PAGE, device=device)).any()
    cheap = cheap_scores(batch, 0, batch.index_q[0].float(), batch.head_gates[0], False)
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


TRAINED = pathlib.Path(__file__).parents[3] / "shared/trained"


@pytest.mark.skipif(not TRAINED.exists(), reason="needs ../shared/trained")
def test_sketches_of_trained_keys_keep_the_tokens() -> None:
    """Share of DSA's set among 8192 of 131,072 tokens, mean over layers and rows: 15 routed heads and the residual."""
    from safetensors.torch import load_file

    kept: dict[int, list[float]] = {bits: [] for bits in SKETCH_BITS}
    for layer in (0, 2, 4):
        tensors = load_file(TRAINED / f"layer{layer}.safetensors")
        n = len(tensors["index_k"]) // PAGE
        parts = tensors["index_k"].view(torch.uint8).view(n, -1), tensors["k_scale"].view(n, PAGE).view(torch.uint8)
        pages = torch.cat(parts, 1)
        means = reference.page_means(pages).bfloat16()
        truth = reference.dequantize_pages(pages).flatten(0, 1)
        sketches = {bits: reference.quantize_pages(pages, means, bits) for bits in SKETCH_BITS}
        for row in range(0, 64, 4):
            length = int(tensors["positions"][row]) + 1
            scored = length // PAGE - 1
            q, gates = tensors["index_q"][None, None, row], tensors["head_gates"][None, None, row]
            best = reference.index_scores(q, gates, truth[None, :length])[0, 0].topk(2048).indices
            complete = torch.tensor([[scored]])
            statistics = reference.block_statistics(q, gates, means[None, :scored].float(), complete, "peak")
            ids = reference.top_heads(statistics.heads, 15)
            query, scale = reference.residual_query(q, gates, ids, statistics.positive)
            routed = q[:, :, ids[0, 0]], gates[:, :, ids[0, 0]]
            for bits, (codes, scales) in sketches.items():
                keys = reference.sketched_keys(codes[:scored], scales[:scored], means[:scored], bits).flatten(0, 1)
                cheap = reference.index_scores(*routed, keys[None])[0, 0] + scale[0, 0] * (keys @ query[0, 0])
                chosen = cheap.topk(8192 - (length - len(cheap))).indices
                found = torch.isin(best, chosen) | (best >= len(cheap))
                kept[bits].append(float(found.float().mean()))
    mean = {bits: sum(values) / len(values) for bits, values in kept.items()}
    assert mean[1] >= 0.945, mean  # 0.954 over all 64 rows
    assert mean[2] >= 0.99, mean
