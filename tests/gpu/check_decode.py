"""Decode on a GPU: correctness at full size and over 10,000 steps, then graph-replay times beside stock.

    python tests/gpu/check_decode.py            # everything, under three minutes
    python tests/gpu/check_decode.py --no-sweep # the default cuts only

Nothing is timed after a wrong result. Stock (DeepGEMM's paged scoring and SGLang's top-k v2) is timed in the same run
where both import. Writes $OUT/decode.json when OUT is set. Times are µs a call: medians of replays of a graph that
holds one call for each of several input sets, together larger than L2 where the pool allows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_misa.bench.timing import graph_us
from sglang_misa.kernels.decode.keep_blocks import KeepTuning, keep_blocks
from sglang_misa.kernels.decode.topk_blocks import (
    DecodeScratch,
    ScoreTuning,
    decode_topk,
    keep_tuning,
    score_kept,
)
from sglang_misa.kernels.decode.topk_kept import topk_kept
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES
from sglang_misa.kernels.page_means import Layers, update_last_page_means

TABLE_WIDTH = 2188  # pages of a 140,000-token context: the table is that wide however short the rows are
TOPK = 2048
BLOCKS, BLOCK_SIZE = 64, 128
POOL_PAGES = (1 << 18) + 64  # 2.2 GB, 128 rows of 128K and a little
MAX_SETS = 64
REPLAYS = 15
LAYERS = 61  # of DeepSeek-V3.2
SCORE_TOLERANCE = 2e-3  # of the largest score: the tensor cores add fp8 products with fewer than fp32's bits
KIB = 1024

KEEP_CUTS = [
    KeepTuning(pages=32, warps=4),
    KeepTuning(pages=64, warps=4),
    KeepTuning(pages=64, warps=8),
    KeepTuning(pages=128, warps=4),
    KeepTuning(pages=128, warps=8),
    KeepTuning(pages=256, warps=8),
]
SCORE_CUTS = [
    ScoreTuning(pages=1, warps=4),
    ScoreTuning(pages=2, warps=4),
    ScoreTuning(pages=2, warps=8),
    ScoreTuning(pages=4, warps=4),
    ScoreTuning(pages=4, warps=8),
]


@dataclass(frozen=True)
class Inputs:
    index_q: Tensor
    head_gates: Tensor
    pool: Tensor
    page_means: Tensor
    page_table: Tensor
    seq_lens: Tensor

    @property
    def rows(self) -> int:
        return len(self.seq_lens)


@dataclass(frozen=True)
class Pool:
    pages: Tensor
    means: Tensor

    @classmethod
    def random(cls, count: int, device: str) -> Pool:
        """Keys with a drift over the pages, so that blocks differ; page 0 is NaN and belongs to nobody."""
        pages = torch.empty(count, PAGE_BYTES, dtype=torch.uint8, device=device)
        means = torch.empty(count, DIM, dtype=torch.bfloat16, device=device)
        step = 1 << 13
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            rows = part.stop - part.start
            keys = torch.randn(rows, PAGE, DIM, device=device) + 0.7 * torch.randn(rows, 1, DIM, device=device)
            stored = keys.to(torch.float8_e4m3fn)
            scales = torch.rand(rows, PAGE, device=device) + 0.5
            pages[part, : PAGE * DIM] = stored.view(rows, -1).view(torch.uint8)
            pages[part, PAGE * DIM :] = scales.view(torch.uint8)
            means[part] = (stored.float() * scales.unsqueeze(-1)).mean(1).bfloat16()
        pages[0] = 0x7F
        means[0] = float("nan")
        return cls(pages, means)

    def inputs(self, lens: list[int], heads: int, seed: int, width: int = TABLE_WIDTH) -> Inputs:
        """Rows of `lens` tokens on random pages; the table's stale tails name pages that do not exist."""
        device = self.pages.device
        torch.manual_seed(seed)
        used = [-(-length // PAGE) for length in lens]
        total = sum(used)
        ids = torch.randperm(len(self.pages) - 1, device=device)[:total] + 1
        table = torch.full((len(lens), width), 2**31 - 1, dtype=torch.int32, device=device)
        table[:, 1::2] = -(2**31)
        start = 0
        for row, count in enumerate(used):
            table[row, :count] = ids[start : start + count].int()
            start += count
        return Inputs(
            torch.randn(len(lens), heads, DIM, device=device).to(torch.float8_e4m3fn),
            torch.randn(len(lens), heads, device=device) * 0.1 + 0.05,
            self.pages,
            self.means,
            table,
            torch.tensor(lens, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Call:
    """One decode call with everything it writes."""

    inputs: Inputs
    scratch: DecodeScratch
    out: Tensor
    positions: Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs, *, positions: bool = False, poison: bool = False) -> Call:
        device = inputs.pool.device
        scratch = DecodeScratch.allocate(inputs.rows, inputs.page_table.shape[1], BLOCKS, BLOCK_SIZE, device)
        out = torch.full((inputs.rows, TOPK), -7, dtype=torch.int32, device=device)
        if poison:
            scratch.logits.fill_(float("nan"))
            scratch.kept.scores.fill_(float("nan"))
            for ints in (scratch.kept.pages, scratch.kept.blocks, scratch.kept.lens):
                ints.fill_(2**31 - 1)
        return cls(inputs, scratch, out, out.clone() if positions else None)

    def keep(self, tuning: KeepTuning | None = None) -> None:
        i = self.inputs
        keep_blocks(
            i.index_q, i.head_gates, i.page_means, i.page_table, i.seq_lens,
            block_size=BLOCK_SIZE, out=self.scratch.kept, tuning=tuning or keep_tuning(i.rows),
        )  # fmt: skip

    def score(self, tuning: ScoreTuning | None = None) -> None:
        i = self.inputs
        score_kept(
            i.index_q, i.head_gates, i.pool, i.seq_lens, block_size=BLOCK_SIZE, topk=TOPK, scratch=self.scratch,
            tuning=tuning or ScoreTuning(),
        )  # fmt: skip

    def topk(self) -> None:
        topk_kept(self.scratch.logits, self.scratch.kept, block_size=BLOCK_SIZE, out=self.out, positions=self.positions)

    def whole(self, keep: KeepTuning | None = None, score: ScoreTuning | None = None) -> None:
        i = self.inputs
        decode_topk(
            i.index_q, i.head_gates, i.pool, i.page_means, i.page_table, i.seq_lens,
            block_size=BLOCK_SIZE, scratch=self.scratch, out=self.out, positions=self.positions, keep=keep, score=score,
        )  # fmt: skip


class Wrong(Exception):
    pass


def expect(condition: Any, message: str) -> None:
    if not bool(condition):
        raise Wrong(message)


def row_scores(inputs: Inputs, row: int, keys: Tensor) -> Tensor:
    return inputs.head_gates[row] @ torch.relu(inputs.index_q[row].float() @ keys.T)


def keys_of(inputs: Inputs, row: int) -> Tensor:
    length = int(inputs.seq_lens[row])
    pages = inputs.pool[inputs.page_table[row, : -(-length // PAGE)].long()]
    keys = pages[:, : PAGE * DIM].contiguous().view(torch.float8_e4m3fn).float().view(-1, PAGE, DIM)
    return (keys * pages[:, PAGE * DIM :].contiguous().view(torch.float32).unsqueeze(-1)).flatten(0, 1)[:length]


def best(chosen: Tensor, among: Tensor, ranked: Tensor, k: int, what: str) -> None:
    expect(len(chosen) == min(k, len(among)) == len(chosen.unique()), f"{what}: expected {min(k, len(among))} of them")
    mask = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    mask[among] = True
    expect(mask[chosen].all(), f"{what}: chose what was not there")
    mask[chosen] = False
    if len(chosen) and mask.any():
        gap = ranked[mask].max() - ranked[chosen].min()
        scale = ranked[among].abs().max()
        expect(
            gap <= SCORE_TOLERANCE * scale, f"{what}: left out one better by {float(gap / scale):.2e} of the largest"
        )


def check(call: Call, what: str) -> None:
    """Run `call`, then compare every row with fp32: kept blocks, scores, selection, slots, padding."""
    call.whole()
    torch.cuda.synchronize()
    inputs, kept = call.inputs, call.scratch.kept
    assert call.positions is not None
    for row, length in enumerate(inputs.seq_lens.tolist()):
        name = f"{what} row {row} len {length}"
        count = min(length, TOPK)
        taken = call.positions[row, :count].long()
        expect((call.positions[row, count:] == -1).all() and (call.out[row, count:] == -1).all(), f"{name}: padding")
        if length == 0:
            continue
        expect((taken >= 0).all() and (taken.diff() > 0).all(), f"{name}: holes or disorder")
        slots = inputs.page_table[row, taken // PAGE] * PAGE + taken % PAGE
        expect(torch.equal(slots, call.out[row, :count]), f"{name}: slots name other pages")
        complete, tail = length // BLOCK_SIZE, length % BLOCK_SIZE
        kept_count = min(complete, BLOCKS) + (tail > 0)
        blocks = kept.blocks[row, :kept_count].long()
        expect(int(kept.lens[row]) == min(complete, BLOCKS) * BLOCK_SIZE + tail, f"{name}: kept length")
        full = blocks[blocks < complete]
        if complete > BLOCKS:
            expect(full[0] == 0 and full[-1] == complete - 1, f"{name}: first and newest block")
            pages = inputs.page_table[row, : complete * BLOCK_SIZE // PAGE].long()
            k_tilde = inputs.page_means[pages].float().view(complete, -1, DIM).mean(1).bfloat16().float()
            middle = torch.arange(1, complete - 1, device=blocks.device)
            best(full[1:-1], middle, row_scores(inputs, row, k_tilde), BLOCKS - 2, f"{name}: blocks")
        else:
            expect(torch.equal(blocks, torch.arange(kept_count, device=blocks.device)), f"{name}: all blocks")
        visible = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=blocks.device)).flatten()
        visible = visible[visible < length]
        ranked = row_scores(inputs, row, keys_of(inputs, row))
        if int(kept.lens[row]) > TOPK:
            error = (call.scratch.logits[row, : len(visible)] - ranked[visible]).abs().max() / ranked.abs().max()
            expect(error < SCORE_TOLERANCE, f"{name}: scores off by {float(error):.2e}")
        best(taken, visible, ranked, TOPK, f"{name}: tokens")


def check_all(pool: Pool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    edges = [0, 1, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 8191, 8192, 8193, 8319, 8320]
    for heads in (64, 32):
        check(Call.of(pool.inputs(edges, heads, 1), positions=True, poison=True), f"H={heads} edges")
        for rows, top in (
            (1, 2 * KIB),
            (1, 128 * KIB),
            (4, 32 * KIB),
            (16, 128 * KIB),
            (64, 32 * KIB),
            (64, 128 * KIB),
        ):
            torch.manual_seed(rows + top)
            lens = [top, *torch.randint(max(1, top // 8), top + 1, (rows - 1,)).tolist()]
            call = Call.of(pool.inputs(lens, heads, 2), positions=True, poison=True)
            check(call, f"H={heads} R={rows} L={top}")
            first = call.out.clone()
            for _ in range(20):
                call.out.fill_(-7)
                call.whole()
                expect(torch.equal(call.out, first), f"H={heads} R={rows} L={top}: differs between repeats")


def check_topk() -> None:
    """The selection alone, against a stable sort: hostile scores, exactly the same positions."""
    rows, room = 12, (BLOCKS + 1) * BLOCK_SIZE
    torch.manual_seed(0)
    cases = {
        "normal": torch.randn(rows, room),
        "equal": torch.full((rows, room), -0.25),
        "few values": torch.randint(-2, 2, (rows, room)).float(),
        "mostly zero": torch.randn(rows, room).relu() * (torch.rand(rows, room) < 0.1),
        "cluster": 1000 + torch.randint(0, 3000, (rows, room)).float() * 2**-14,
        "outlier": torch.randn(rows, room).index_fill_(1, torch.tensor([5]), 1e30),
        "whole range": torch.randint(-(2**31), 2**31 - 1, (rows, room)).int().view(torch.float32),
        "tiny": torch.randint(0, 5000, (rows, room)).int().view(torch.float32),
        "infinite": torch.randn(rows, room).index_fill_(1, torch.arange(7), torch.inf),
        "broken": torch.where(torch.rand(rows, room) < 0.9, torch.nan, torch.randn(rows, room)),
        "nan": torch.full((rows, room), torch.nan),
    }
    lens = [0, 1, 63, 2047, 2048, 2049, 4095, 4097, 8191, 8192, room - 1, room][:rows]
    kept = Call.of(Pool.random(64, "cuda").inputs([1] * rows, 64, 0)).scratch.kept
    kept.pages.copy_(torch.randperm(1 << 20)[: kept.pages.numel()].view_as(kept.pages))
    kept.blocks.copy_(torch.arange(BLOCKS + 1).expand_as(kept.blocks) * 3)
    kept.lens.copy_(torch.tensor(lens))
    for name, scores in cases.items():
        clean = scores.nan_to_num(
            nan=torch.finfo(torch.float32).min, posinf=torch.inf, neginf=torch.finfo(torch.float32).min
        )
        logits = scores.cuda()
        for row, length in enumerate(lens):
            logits[row, length:] = torch.nan
        out = torch.full((rows, TOPK), -7, dtype=torch.int32, device="cuda")
        positions = out.clone()
        topk_kept(logits, kept, block_size=BLOCK_SIZE, out=out, positions=positions)
        for row, length in enumerate(lens):
            token = clean[row, :length].sort(descending=True, stable=True).indices[:TOPK].sort().values
            wanted = torch.full((TOPK,), -1)
            wanted[: len(token)] = token // BLOCK_SIZE * 3 * BLOCK_SIZE + token % BLOCK_SIZE
            expect(torch.equal(positions[row].long().cpu(), wanted), f"top k of {name}, {length} tokens: positions")
            wanted[: len(token)] = kept.pages[row].cpu()[token // PAGE].long() * PAGE + token % PAGE
            expect(torch.equal(out[row].long().cpu(), wanted), f"top k of {name}, {length} tokens: slots")


def check_graph(pool: Pool) -> None:
    """One capture; lengths and page tables change in place; each replay equals an eager call."""
    inputs = pool.inputs([128 * KIB] * 16, 64, 3)
    call = Call.of(inputs, positions=True)
    call.whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.whole()
    for seed in range(4):
        torch.manual_seed(seed)
        lens = torch.randint(0, 128 * KIB, (16,)).tolist()
        lens[:6] = [1, 64, 2048 + seed, 8319 + seed, 8191 + seed, 100]
        fresh = pool.inputs(lens, 64, 10 + seed)
        for name in ("index_q", "head_gates", "page_table", "seq_lens"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        call.out.fill_(-7)
        graph.replay()
        eager = Call.of(fresh, positions=True, poison=True)
        check(eager, f"graph lengths {seed}")
        expect(torch.equal(call.out, eager.out), f"replay {seed}: differs from eager")
        expect(torch.equal(call.positions, eager.positions), f"replay {seed}: positions differ from eager")


@dataclass(frozen=True)
class Walk:
    """What a random walk of `requests` is: each step writes `drafts` tokens a request, of which 1 to all stay.

    A request past its `limit` starts over at a random length of `restart`: the limits and restarts go round.
    """

    requests: int
    drafts: int
    steps: int
    limits: tuple[int, ...] = (16_300, 16_300, 2_300, 8_700)
    restarts: tuple[tuple[int, int], ...] = ((0, 9_000), (12_000, 16_000), (0, 70), (8_000, 8_320))

    @property
    def rows(self) -> int:
        return self.requests * self.drafts

    def lens(self, seed: int) -> Tensor:
        """Row lengths int32 [steps, rows] of every step."""
        random = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=random))

        kind = [request % len(self.limits) for request in range(self.requests)]
        length = [draw(*self.restarts[k]) for k in kind]
        accepted = torch.randint(1, self.drafts + 1, (self.steps, self.requests), generator=random).tolist()
        result = []
        for step in range(self.steps):
            result.append([length[r] + d + 1 for r in range(self.requests) for d in range(self.drafts)])
            for r, k in enumerate(kind):
                length[r] += accepted[step][r]
                if length[r] + self.drafts > self.limits[k]:
                    length[r] = draw(self.restarts[k][0], min(self.restarts[k][1], length[r] - self.drafts))
        return torch.tensor(result, dtype=torch.int32)


class Walker:
    """One walk on the device: `step` writes keys, selects, brings the means up to date and judges. No host in between.

    Truth are the keys in fp32 in logical order, beside the pages that the kernels read.
    """

    TOKENS = 1 << 14
    FLAWS = ("means", "kept count", "forced blocks", "kept blocks", "count", "order", "tokens kept", "tokens", "slots")

    def __init__(self, walk: Walk, heads: int, seed: int):
        torch.manual_seed(seed)
        self.walk, pages, device = walk, self.TOKENS // PAGE, "cuda"
        stored = torch.randn(walk.requests * pages + 1, PAGE, DIM, device=device).to(torch.float8_e4m3fn)
        scales = torch.rand(len(stored), PAGE, device=device) + 0.5
        self.ids = (torch.randperm(len(stored) - 1, device=device) + 1).view(walk.requests, pages)
        dense = stored.float() * scales.unsqueeze(-1)
        self.keys = dense[self.ids].view(walk.requests, self.TOKENS, DIM)
        pool = torch.cat([stored.flatten(1).view(torch.uint8), scales.view(torch.uint8)], 1)
        means = dense.mean(1).bfloat16()
        self.lens = walk.lens(seed).to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.flaws = torch.zeros(walk.steps, len(self.FLAWS), dtype=torch.bool, device=device)
        rows = walk.rows
        self.table = torch.full((rows, TABLE_WIDTH), 2**31 - 1, dtype=torch.int32, device=device)
        self.table[:, :pages] = self.ids.repeat_interleave(walk.drafts, 0).int()
        self.layers = Layers.of([pool], [means])
        self.inputs = Inputs(
            torch.zeros(rows, heads, DIM, device=device).to(torch.float8_e4m3fn),
            torch.zeros(rows, heads, device=device),
            pool,
            means,
            self.table.clone(),
            self.lens[0].clone(),
        )
        self.call = Call.of(self.inputs, positions=True)

    def step(self) -> None:
        i = self.inputs
        i.seq_lens.copy_(self.lens.index_select(0, self.at).squeeze(0))
        i.index_q.copy_(torch.randn(i.index_q.shape, device="cuda"))
        i.head_gates.copy_(torch.randn(i.head_gates.shape, device="cuda") * 0.1 + 0.05)
        stale = torch.arange(TABLE_WIDTH, device="cuda") * PAGE >= i.seq_lens.unsqueeze(1)
        i.page_table.copy_(self.table.masked_fill(stale, -(2**31)))
        self.write()
        self.call.whole()
        update_last_page_means(self.layers, i.page_table, i.seq_lens)
        self.flaws.index_copy_(0, self.at, torch.stack(self.judge()).unsqueeze(0))
        self.at += 1

    def write(self) -> None:
        """A random key at the newest position of each row."""
        i, rows = self.inputs, self.walk.rows
        key = (torch.randn(rows, DIM, device="cuda") * 1.5).to(torch.float8_e4m3fn)
        scale = torch.rand(rows, 1, device="cuda") + 0.5
        position = i.seq_lens.long() - 1
        page = self.table.gather(1, (position // PAGE).unsqueeze(1)).squeeze(1).long()
        for start, part in (
            (page * PAGE_BYTES + position % PAGE * DIM, key.view(torch.uint8)),
            (page * PAGE_BYTES + PAGE * DIM + position % PAGE * 4, scale.view(torch.uint8)),
        ):
            i.pool.view(-1)[start.unsqueeze(1) + torch.arange(part.shape[1], device="cuda")] = part
        request = torch.arange(rows, device="cuda") // self.walk.drafts
        self.keys[request, position] = key.float() * scale

    def scores(self, keys: Tensor) -> Tensor:
        """Index scores fp32 [rows, n] of keys [requests, n, DIM]."""
        q = self.inputs.index_q.float().view(self.walk.requests, -1, DIM)
        dots = torch.relu(q @ keys.mT).view(self.walk.rows, -1, keys.shape[1])
        return (self.inputs.head_gates.unsqueeze(1) @ dots).squeeze(1)

    def judge(self) -> list[Tensor]:
        """One truth value for each of FLAWS, over all rows."""
        i, kept, infinity = self.inputs, self.call.scratch.kept, float("inf")
        length = i.seq_lens.unsqueeze(1)
        complete, tail = length // BLOCK_SIZE, length % BLOCK_SIZE

        truth = self.keys.view(len(self.ids), -1, PAGE, DIM).mean(2)
        means = i.page_means[self.ids].float()
        newest = i.seq_lens.view(self.walk.requests, -1)[:, -1:]
        whole = torch.arange(means.shape[1], device="cuda") < newest // PAGE
        stale = ((means - truth).abs() > 2**-7 * truth.abs() + 1e-5).any(-1) & whole

        block = torch.arange(self.TOKENS // BLOCK_SIZE, device="cuda")
        count = complete.clamp(max=BLOCKS) + (tail > 0)
        listed = torch.arange(kept.blocks.shape[1], device="cuda") < count
        mask = marked(kept.blocks, listed, len(block))
        middle = (block > 0) & (block < complete - 1)
        forced = (block == 0) & (length > 0) | (block == complete - 1) | (block == complete) & (tail > 0)
        k_tilde = means.view(len(self.ids), len(block), -1, DIM).mean(2).bfloat16().float()
        block_scores = self.scores(k_tilde)

        position = torch.arange(self.TOKENS, device="cuda")
        allowed = mask.repeat_interleave(BLOCK_SIZE, 1) & (position < length)
        assert self.call.positions is not None
        taken, slots = self.call.positions.long(), self.call.out
        there = torch.arange(TOPK, device="cuda") < length
        chosen = marked(taken, there, self.TOKENS)
        token_scores = self.scores(self.keys)
        safe = taken.clamp(0, self.TOKENS - 1)
        expected = (self.table.gather(1, safe // PAGE) * PAGE + safe % PAGE).masked_fill(~there, -1)

        def beaten(scores: Tensor, among: Tensor, by: Tensor) -> Tensor:
            """Rows in which one of `among` that is not in `by` scores higher than one that is."""
            left = scores.masked_fill(~(among & ~by), -infinity).amax(1)
            worst = scores.masked_fill(~(among & by), infinity).amin(1)
            return left - worst > SCORE_TOLERANCE * scores.masked_fill(~among, 0).abs().amax(1)

        flaws = (
            stale,
            (mask.sum(1, keepdim=True) != count) | (kept.lens != kept_tokens(i.seq_lens)).unsqueeze(1),
            forced & ~mask | mask & ~(middle | forced),
            beaten(block_scores, middle, mask),
            (taken >= 0) != there,
            (taken.diff(dim=1) <= 0) & there[:, 1:],
            chosen & ~allowed,
            beaten(token_scores, allowed, chosen),
            expected != slots,
        )
        return [flaw.any() for flaw in flaws]


def marked(index: Tensor, listed: Tensor, size: int) -> Tensor:
    """Mask bool [rows, size] of the `listed` entries of index [rows, n]."""
    mask = torch.zeros(len(index), size + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, index.long().clamp(0, size).masked_fill(~listed, size), True)[:, :size]


def kept_tokens(lens: Tensor) -> Tensor:
    return (lens // BLOCK_SIZE).clamp(max=BLOCKS) * BLOCK_SIZE + lens % BLOCK_SIZE


def check_walks() -> None:
    """10,000 random steps, captured once and replayed: decode rows, and verify rows whose drafts may be rejected."""
    for heads, walk in ((64, Walk(requests=16, drafts=1, steps=6000)), (32, Walk(requests=8, drafts=3, steps=4000))):
        began = time.time()
        walker = Walker(walk, heads, seed=heads)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            walker.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            walker.step()
        eager = Call.of(walker.inputs, positions=True, poison=True)
        for step in range(1, walk.steps):
            graph.replay()
            if step % 100 == 0:
                eager.whole()
                expect(torch.equal(eager.out, walker.call.out), f"{walk}, step {step}: replay differs from eager")
        bad = walker.flaws.nonzero().tolist()
        expect(not bad, f"{walk}: {len(bad)} flaws, the first " + str([(s, walker.FLAWS[f]) for s, f in bad[:5]]))
        expect(int(walker.at) == walk.steps, f"{walk}: expected {walk.steps} steps, got {int(walker.at)}")
        print(f"{walk.steps} steps of {walk.requests} requests, {walk.drafts} rows each: {time.time() - began:.0f} s")


class Stock:
    """DeepGEMM's scoring and SGLang's top-k v2 as SGLang 0.5.17 calls them in decode, schedule and plan made before."""

    def __init__(self) -> None:
        import deep_gemm
        from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2, topk_transform_512_v2

        self.deep_gemm, self.plan, self.transform = deep_gemm, plan_topk_v2, topk_transform_512_v2
        self.sm_count = torch.cuda.get_device_properties(0).multi_processor_count

    def calls(self, inputs: Inputs) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None], Tensor]:
        """(score, topk, both, slots) of one decode call."""
        lens_2d = inputs.seq_lens.unsqueeze(-1)
        schedule = self.deep_gemm.get_paged_mqa_logits_metadata(lens_2d, PAGE, self.sm_count)
        plan = self.plan(inputs.seq_lens)
        out = torch.empty(inputs.rows, TOPK, dtype=torch.int32, device=inputs.pool.device)
        keys = inputs.pool.view(-1, PAGE, 1, DIM + 4)
        # pages past a row's end are never read, but their ids must not be poison for a library that prefetches
        table = torch.where((inputs.page_table >= 0) & (inputs.page_table < len(inputs.pool)), inputs.page_table, 0)
        state: dict[str, Tensor] = {}

        def score() -> None:
            logits = self.deep_gemm.fp8_paged_mqa_logits(
                inputs.index_q.unsqueeze(1), keys, inputs.head_gates, lens_2d, table, schedule,
                table.shape[1] * PAGE, clean_logits=False,
            )  # fmt: skip
            if inputs.rows == 1:
                logits = logits.as_strided(logits.shape, ((logits.shape[1] + 3) // 4 * 4, 1))
            state["logits"] = logits

        def topk() -> None:
            self.transform(state["logits"], inputs.seq_lens, table, out, PAGE, plan)

        def both() -> None:
            score()
            topk()

        score()
        return score, topk, both, out


def floor_bytes(inputs: Inputs) -> float:
    """Bytes that one call must read: page means of rows that choose, and the keys and scales of kept tokens."""
    total = 0
    for length in inputs.seq_lens.tolist():
        complete = length // BLOCK_SIZE
        total += (complete > BLOCKS) * complete * (BLOCK_SIZE // PAGE) * DIM * 2
        kept = min(complete, BLOCKS) * BLOCK_SIZE + length % BLOCK_SIZE
        total += (kept > TOPK) * kept * (DIM + 4)
    return float(total)


def sets_for(rows: int, length: int) -> int:
    return max(2, min(MAX_SETS, POOL_PAGES // (rows * (length // PAGE))))


def label(tuning: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(tuning).items())


def sweep(pool: Pool) -> list[dict[str, Any]]:
    """Every cut on four shapes: where the defaults come from."""
    rows: list[dict[str, Any]] = []
    for batch, length in ((1, 128 * KIB), (4, 128 * KIB), (16, 128 * KIB), (64, 128 * KIB), (1, 32 * KIB)):
        calls = [Call.of(pool.inputs([length - 3 * i] * batch, 64, i)) for i in range(sets_for(batch, length))]
        for call in calls:
            call.whole()
        expected = calls[0].out.clone()
        for stage, cuts in (("keep", KEEP_CUTS), ("score", SCORE_CUTS)):
            for cut in cuts:
                try:
                    us = graph_us(
                        [lambda call=call, cut=cut, stage=stage: getattr(call, stage)(cut) for call in calls], REPLAYS
                    )
                    calls[0].whole(**{stage: cut})
                    same = float(torch.isin(calls[0].out, expected).float().mean())
                except Exception as error:  # a cut may not fit the chip: the others still count
                    print(f"  {stage} {label(cut)}: {type(error).__name__}: {str(error)[:120]}", flush=True)
                    continue
                rows.append(
                    {"batch": batch, "length": length, "stage": stage, "cut": asdict(cut), "us": us, "same": same}
                )
                print(
                    f"  {batch:3d} × {length // KIB:3d}K {stage} {us:7.2f} µs same {same:.4f}  {label(cut)}", flush=True
                )
    return rows


def table(pool: Pool, stock: Stock | None) -> list[dict[str, Any]]:
    """The default cuts over batch × length × H, beside stock; the largest batches and lengths for H = 64 alone."""
    rows: list[dict[str, Any]] = []
    print("  H batch    L | keep score  topk  whole | stock score  topk   both | ratio  GB/s")
    near = [(h, b, n * KIB) for h in (64, 32) for b in (1, 4, 16, 64) for n in (8, 16, 32, 64, 128)]
    far = [(64, 128, n * KIB) for n in (32, 64, 128)] + [(64, b, 256 * KIB) for b in (1, 16, 64)]
    for heads, batch, length in near + far:
        width = max(TABLE_WIDTH, length // PAGE)
        inputs = [pool.inputs([length - 3 * i] * batch, heads, i, width) for i in range(sets_for(batch, length))]
        calls = [Call.of(one) for one in inputs]
        row: dict[str, Any] = {"heads": heads, "batch": batch, "length": length}
        for stage in ("keep", "score", "topk", "whole"):
            row[stage] = graph_us([getattr(call, stage) for call in calls], REPLAYS)
        row["gb_s"] = floor_bytes(inputs[0]) / row["whole"] / 1e3
        line = f"{heads:3d} {batch:5d} {length // KIB:3d}K |"
        line += f" {row['keep']:5.1f} {row['score']:5.1f} {row['topk']:5.1f} {row['whole']:6.1f} |"
        if stock is not None:
            # logits of all sets live at once: as many as fit in 8 GB
            fit = max(2, min(len(inputs), int(8e9 // (batch * width * PAGE * 4))))
            kinds = list(zip(*(stock.calls(one)[:3] for one in inputs[:fit]), strict=True))
            for name, kind in zip(("stock_score", "stock_topk", "stock"), kinds, strict=True):
                row[name] = graph_us(kind, REPLAYS)
            row["ratio"] = row["stock"] / row["whole"]
            line += f" {row['stock_score']:11.1f} {row['stock_topk']:5.1f} {row['stock']:6.1f} |"
            line += f" {row['ratio']:5.2f}"
        print(f"{line} {row['gb_s']:6.0f}", flush=True)
        rows.append(row)
    return rows


def upkeep(pool: Pool) -> list[dict[str, Any]]:
    """What the page means of all layers add to a step: one launch behind the selections of its layers."""
    rows: list[dict[str, Any]] = []
    means = torch.empty_like(pool.means)
    layers = Layers.of([pool.pages] * LAYERS, [means] * LAYERS)
    for batch in (1, 4, 16, 64):
        for name, length in (("idle", 32 * KIB - 3), ("every row completes a page", 32 * KIB)):
            sets = [pool.inputs([length] * batch, 64, i) for i in range(min(LAYERS, sets_for(batch, length)))]
            calls = [Call.of(one) for one in sets]
            step = [calls[i % len(calls)].whole for i in range(LAYERS)]
            update = functools.partial(update_last_page_means, layers, sets[-1].page_table, sets[-1].seq_lens)
            without, alone = graph_us(step, REPLAYS) * LAYERS, graph_us([update] * 8, REPLAYS)
            added = graph_us([*step, update], REPLAYS) * (LAYERS + 1) - without
            rows.append({"batch": batch, "case": name, "step_us": without, "added_us": added, "alone_us": alone})
            print(
                f"  {batch:3d} rows, {LAYERS} layers, {name}: {without:7.1f} µs, means add {added:5.1f} "
                f"({added / without:.2%}), alone {alone:.1f}",
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sweep", action="store_true", help="time the default cuts only")
    arguments = parser.parse_args()
    began = time.time()
    pool = Pool.random(POOL_PAGES, "cuda")
    try:
        check_topk()
        check_all(pool)
        check_graph(pool)
        check_walks()
    except Wrong as error:
        print(f"WRONG, nothing timed: {error}")
        return 1
    print(f"correct ({time.time() - began:.0f} s)", flush=True)
    try:
        stock: Stock | None = Stock()
    except ImportError as error:
        print(f"stock does not import here, no ratios: {error}")
        stock = None
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "blocks": BLOCKS, "block_size": BLOCK_SIZE}
    result["table"] = table(pool, stock)
    result["upkeep"] = upkeep(pool)
    if not arguments.no_sweep:
        result["sweep"] = sweep(pool)
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "decode.json").write_text(json.dumps(result, indent=1))
    print(f"done ({time.time() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
