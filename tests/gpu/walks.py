"""Random decode walks on the device: keys are written step by step, a selection is made, and judged where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu.decoding import DEVICE, TABLE_WIDTH, TOPK
from oracles import Paged
from torch import Tensor

from sglang_misa.bench.inputs import FP8, pack_pages
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE, PAGE_BYTES

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
    """One walk on the device: `step` writes keys, selects, brings statistics up to date and judges. No host in between.

    Truth are the keys in fp32 in logical order, beside the pages that the kernels read.
    """

    TOKENS = 1 << 14
    FLAWS: tuple[str, ...]

    def __init__(self, walk: Walk, heads: int, seed: int):
        torch.manual_seed(seed)
        self.walk, pages, device = walk, self.TOKENS // PAGE, DEVICE
        stored = torch.randn(walk.requests * pages + 1, PAGE, DIM, device=device).to(FP8)
        scales = torch.rand(len(stored), PAGE, device=device) + 0.5
        self.ids = (torch.randperm(len(stored) - 1, device=device) + 1).view(walk.requests, pages)
        dense = stored.float() * scales.unsqueeze(-1)
        self.keys = dense[self.ids].view(walk.requests, self.TOKENS, DIM)
        self.lens = walk.lens(seed).to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.flaws = torch.zeros(walk.steps, len(self.FLAWS), dtype=torch.bool, device=device)
        rows = walk.rows
        self.table = torch.full((rows, TABLE_WIDTH), 2**31 - 1, dtype=torch.int32, device=device)
        self.table[:, :pages] = self.ids.repeat_interleave(walk.drafts, 0).int()
        self.inputs = Paged(
            torch.zeros(rows, heads, DIM, device=device).to(FP8),
            torch.zeros(rows, heads, device=device),
            pack_pages(stored.flatten(0, 1), scales.flatten()),
            dense.mean(1).bfloat16(),
            self.table.clone(),
            self.lens[0].clone(),
        )

    def call(self) -> Any:
        """A call of this walk's inputs, with scratch and outputs of its own."""
        raise NotImplementedError

    def select(self) -> None:
        """Select for the rows, then bring the statistics of the pages that they completed up to date."""
        raise NotImplementedError

    def judge(self) -> list[Tensor]:
        """One truth value for each of FLAWS, over all rows."""
        raise NotImplementedError

    def step(self) -> None:
        i = self.inputs
        i.seq_lens.copy_(self.lens.index_select(0, self.at).squeeze(0))
        i.index_q.copy_(torch.randn(i.index_q.shape, device=DEVICE))
        i.head_gates.copy_(torch.randn(i.head_gates.shape, device=DEVICE) * 0.1 + 0.05)
        stale = torch.arange(TABLE_WIDTH, device=DEVICE) * PAGE >= i.seq_lens.unsqueeze(1)
        i.page_table.copy_(self.table.masked_fill(stale, -(2**31)))
        self.write()
        self.select()
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

    @property
    def written(self) -> Tensor:
        """The page int64 [rows] that each row's newest token is in."""
        return self.table.gather(1, ((self.inputs.seq_lens.long() - 1) // PAGE).unsqueeze(1)).squeeze(1).long()

    def stale_means(self) -> Tensor:
        """Complete pages [requests, pages] whose means are not those of their keys."""
        truth = self.keys.view(len(self.ids), -1, PAGE, DIM).mean(2)
        wrong = (self.inputs.page_means[self.ids].float() - truth).abs() > 2**-7 * truth.abs() + 1e-5
        return wrong.any(-1) & self.complete()

    def complete(self) -> Tensor:
        """Pages [requests, pages] that the newest row of their request completes, or an older one."""
        newest = self.inputs.seq_lens.view(self.walk.requests, -1)[:, -1:]
        return torch.arange(self.ids.shape[1], device=DEVICE) < newest // PAGE

    def choices(self, allowed: Tensor, positions: Tensor, slots: Tensor) -> list[Tensor]:
        """Flaws of what was chosen among the tokens that are `allowed` [rows, TOKENS]: those of CHOICES."""
        length, taken = self.inputs.seq_lens.unsqueeze(1), positions.long()
        there = torch.arange(TOPK, device=DEVICE) < length
        chosen = marked(taken, there, self.TOKENS)
        safe = taken.clamp(0, self.TOKENS - 1)
        expected = (self.table.gather(1, safe // PAGE) * PAGE + safe % PAGE).masked_fill(~there, -1)
        return [
            (taken >= 0) != there,
            (taken.diff(dim=1) <= 0) & there[:, 1:],
            chosen & ~allowed,
            beaten(self.scores(self.keys), allowed, chosen),
            expected != slots,
        ]


CHOICES = ("count", "order", "tokens kept", "tokens", "slots")


def beaten(scores: Tensor, among: Tensor, by: Tensor) -> Tensor:
    """Rows in which one of `among` that is not in `by` scores higher than one that is."""
    infinity = float("inf")
    left = scores.masked_fill(~(among & ~by), -infinity).amax(1)
    worst = scores.masked_fill(~(among & by), infinity).amin(1)
    return left - worst > TOLERANCE * scores.masked_fill(~among, 0).abs().amax(1)


def marked(index: Tensor, listed: Tensor, size: int) -> Tensor:
    """Mask bool [rows, size] of the `listed` entries of index [rows, n]."""
    mask = torch.zeros(len(index), size + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, index.long().clamp(0, size).masked_fill(~listed, size), True)[:, :size]
