"""10,000 random decode steps, captured once and replayed: decode rows, and verify rows whose drafts may be rejected."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gpu.decoding import BLOCK_SIZE, BLOCKS, DEVICE, TABLE_WIDTH, TOPK, Call
from oracles import Paged
from torch import Tensor

from sglang_misa.bench.inputs import FP8, pack_pages
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES
from sglang_misa.kernels.page_means import Layers, update_last_page_means

TOLERANCE = 2e-3  # of the largest score: the tensor cores add fp8 products with fewer than fp32's bits


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
        self.walk, pages, device = walk, self.TOKENS // PAGE, DEVICE
        stored = torch.randn(walk.requests * pages + 1, PAGE, DIM, device=device).to(FP8)
        scales = torch.rand(len(stored), PAGE, device=device) + 0.5
        self.ids = (torch.randperm(len(stored) - 1, device=device) + 1).view(walk.requests, pages)
        dense = stored.float() * scales.unsqueeze(-1)
        self.keys = dense[self.ids].view(walk.requests, self.TOKENS, DIM)
        pool = pack_pages(stored.flatten(0, 1), scales.flatten())
        means = dense.mean(1).bfloat16()
        self.lens = walk.lens(seed).to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.flaws = torch.zeros(walk.steps, len(self.FLAWS), dtype=torch.bool, device=device)
        rows = walk.rows
        self.table = torch.full((rows, TABLE_WIDTH), 2**31 - 1, dtype=torch.int32, device=device)
        self.table[:, :pages] = self.ids.repeat_interleave(walk.drafts, 0).int()
        self.layers = Layers.of([pool], [means])
        self.inputs = Paged(
            torch.zeros(rows, heads, DIM, device=device).to(FP8),
            torch.zeros(rows, heads, device=device),
            pool,
            means,
            self.table.clone(),
            self.lens[0].clone(),
        )
        self.call = Call.of(self.inputs)

    def step(self) -> None:
        i = self.inputs
        i.seq_lens.copy_(self.lens.index_select(0, self.at).squeeze(0))
        i.index_q.copy_(torch.randn(i.index_q.shape, device=DEVICE))
        i.head_gates.copy_(torch.randn(i.head_gates.shape, device=DEVICE) * 0.1 + 0.05)
        stale = torch.arange(TABLE_WIDTH, device=DEVICE) * PAGE >= i.seq_lens.unsqueeze(1)
        i.page_table.copy_(self.table.masked_fill(stale, -(2**31)))
        self.write()
        self.call.run()
        update_last_page_means(self.layers, i.page_table, i.seq_lens)
        self.flaws.index_copy_(0, self.at, torch.stack(self.judge()).unsqueeze(0))
        self.at += 1

    def write(self) -> None:
        """A random key at the newest position of each row."""
        i, rows = self.inputs, self.walk.rows
        key = (torch.randn(rows, DIM, device=DEVICE) * 1.5).to(FP8)
        scale = torch.rand(rows, 1, device=DEVICE) + 0.5
        position = i.seq_lens.long() - 1
        page = self.table.gather(1, (position // PAGE).unsqueeze(1)).squeeze(1).long()
        for start, part in (
            (page * PAGE_BYTES + position % PAGE * DIM, key.view(torch.uint8)),
            (page * PAGE_BYTES + PAGE * DIM + position % PAGE * 4, scale.view(torch.uint8)),
        ):
            i.index_k_pages.view(-1)[start.unsqueeze(1) + torch.arange(part.shape[1], device=DEVICE)] = part
        request = torch.arange(rows, device=DEVICE) // self.walk.drafts
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
        whole = torch.arange(means.shape[1], device=DEVICE) < newest // PAGE
        stale = ((means - truth).abs() > 2**-7 * truth.abs() + 1e-5).any(-1) & whole

        block = torch.arange(self.TOKENS // BLOCK_SIZE, device=DEVICE)
        count = complete.clamp(max=BLOCKS) + (tail > 0)
        listed = torch.arange(kept.blocks.shape[1], device=DEVICE) < count
        mask = marked(kept.blocks, listed, len(block))
        middle = (block > 0) & (block < complete - 1)
        forced = (block == 0) & (length > 0) | (block == complete - 1) | (block == complete) & (tail > 0)
        k_tilde = means.view(len(self.ids), len(block), -1, DIM).mean(2).bfloat16().float()
        block_scores = self.scores(k_tilde)

        position = torch.arange(self.TOKENS, device=DEVICE)
        allowed = mask.repeat_interleave(BLOCK_SIZE, 1) & (position < length)
        taken, slots = self.call.positions.long(), self.call.out
        there = torch.arange(TOPK, device=DEVICE) < length
        chosen = marked(taken, there, self.TOKENS)
        token_scores = self.scores(self.keys)
        safe = taken.clamp(0, self.TOKENS - 1)
        expected = (self.table.gather(1, safe // PAGE) * PAGE + safe % PAGE).masked_fill(~there, -1)

        def beaten(scores: Tensor, among: Tensor, by: Tensor) -> Tensor:
            """Rows in which one of `among` that is not in `by` scores higher than one that is."""
            left = scores.masked_fill(~(among & ~by), -infinity).amax(1)
            worst = scores.masked_fill(~(among & by), infinity).amin(1)
            return left - worst > TOLERANCE * scores.masked_fill(~among, 0).abs().amax(1)

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


@pytest.mark.parametrize(
    ("heads", "walk"),
    [(64, Walk(requests=16, drafts=1, steps=6000)), (32, Walk(requests=8, drafts=3, steps=4000))],
    ids=["decode", "verify"],
)
def test_every_step_of_a_walk_selects_right(heads: int, walk: Walk) -> None:
    walker = Walker(walk, heads, seed=heads)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        walker.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walker.step()
    eager = Call.of(walker.inputs)
    for step in range(1, walk.steps):
        graph.replay()
        if step % 100 == 0:
            eager.run()
            assert torch.equal(eager.out, walker.call.out), f"step {step}: replay differs from eager"
    bad = walker.flaws.nonzero().tolist()
    assert not bad, f"{len(bad)} flaws, the first " + str([(step, walker.FLAWS[flaw]) for step, flaw in bad[:5]])
    assert int(walker.at) == walk.steps
