"""10,000 random decode steps, captured once and replayed: decode rows, and verify rows whose drafts may be rejected."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gpu.decoding import BLOCK_SIZE, BLOCKS, DEVICE, TABLE_WIDTH, TOPK, Call
from gpu.walks import CHOICES, Walk, Walker, beaten, marked
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.kernels.decode.operands import Chosen, PageSketch, SketchPolicy
from sglang_misa.kernels.decode.scan_sketches import scan_sketches, score_keys
from sglang_misa.kernels.decode.topk_sketched import SketchScratch, sketch_topk
from sglang_misa.kernels.layout import HEAD_DIM as DIM
from sglang_misa.kernels.layout import PAGE
from sglang_misa.kernels.page_means import Layers, update_last_page_means

WALKS = [(64, Walk(requests=16, drafts=1, steps=6000)), (32, Walk(requests=8, drafts=3, steps=4000))]


class BlockWalker(Walker):
    """A walk under HISA's block filter."""

    FLAWS = ("means", "kept count", "forced blocks", "kept blocks", *CHOICES)

    def __init__(self, walk: Walk, heads: int, seed: int):
        super().__init__(walk, heads, seed)
        self.layers = Layers.of([self.inputs.index_k_pages], [self.inputs.page_means])
        self.made = self.call()

    def call(self) -> Call:
        return Call.of(self.inputs)

    def select(self) -> None:
        self.made.run()
        update_last_page_means(self.layers, self.inputs.page_table, self.inputs.seq_lens)

    def judge(self) -> list[Tensor]:
        i, kept = self.inputs, self.made.scratch.kept
        length = i.seq_lens.unsqueeze(1)
        complete, tail = length // BLOCK_SIZE, length % BLOCK_SIZE
        block = torch.arange(self.TOKENS // BLOCK_SIZE, device=DEVICE)
        count = complete.clamp(max=BLOCKS) + (tail > 0)
        listed = torch.arange(kept.blocks.shape[1], device=DEVICE) < count
        mask = marked(kept.blocks, listed, len(block))
        middle = (block > 0) & (block < complete - 1)
        forced = (block == 0) & (length > 0) | (block == complete - 1) | (block == complete) & (tail > 0)
        means = i.page_means[self.ids].float()
        k_tilde = means.view(len(self.ids), len(block), -1, DIM).mean(2).bfloat16().float()
        position = torch.arange(self.TOKENS, device=DEVICE)
        allowed = mask.repeat_interleave(BLOCK_SIZE, 1) & (position < length)
        kept_tokens = complete.clamp(max=BLOCKS) * BLOCK_SIZE + tail
        flaws = (
            self.stale_means(),
            (mask.sum(1, keepdim=True) != count) | (kept.lens.unsqueeze(1) != kept_tokens),
            forced & ~mask | mask & ~(middle | forced),
            beaten(self.scores(k_tilde), middle, mask),
            *self.choices(allowed, self.made.positions, self.made.out),
        )
        return [flaw.any() for flaw in flaws]


@dataclass(frozen=True)
class SketchCall:
    """One decode call over sketches."""

    walker: SketchWalker
    scratch: SketchScratch
    out: Tensor
    positions: Tensor

    def run(self) -> None:
        stats = PageSketch(self.walker.inputs.page_means, self.walker.sketches)
        chosen = Chosen(self.out, self.positions)
        sketch_topk(self.walker.inputs.operands, stats, scratch=self.scratch, out=chosen)


class SketchWalker(Walker):
    """A walk over page sketches of 1 bit with 8 columns, or of 2 bits with 16."""

    CANDIDATES = 4096
    FLAWS = ("means", "sketches", "cheap scores", "newest", "candidates", *CHOICES)
    ROUNDED = 2**-9  # of the terms of a score: score keys have nine bits of fraction, gates ten
    SINGLE = 2**-21  # of what its products cancel: they are added up in single precision

    def __init__(self, walk: Walk, heads: int, seed: int):
        super().__init__(walk, heads, seed)
        self.bits = 1 if walk.drafts == 1 else 2
        i = self.inputs
        found = [self.sketched(pages) for pages in torch.arange(len(i.index_k_pages), device=DEVICE).split(1024)]
        self.codes, self.scales, self.sketches = (torch.cat(part) for part in zip(*found, strict=True))
        self.truth = self.sketches.clone()  # as the reference has it, brought up to date on its own
        self.layers = Layers.of([i.index_k_pages], [i.page_means], [self.sketches])
        self.made = self.call()
        self.scanned = torch.empty_like(self.made.scratch.keys)

    def sketched(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes fp32 [n, 64, 128], scales fp32 [n, 64] and sketches of pages [n], by the reference."""
        i = self.inputs
        codes, scales = reference_pages.quantize_pages(i.index_k_pages[pages], i.page_means[pages], self.bits)
        return codes.float(), scales.float(), reference_pages.pack_sketches(codes, scales, self.bits)

    def call(self) -> SketchCall:
        rows, heads = self.inputs.head_gates.shape
        policy = SketchPolicy(8 * self.bits - 1, "peak", True, self.CANDIDATES)
        scratch = SketchScratch.allocate(rows, TABLE_WIDTH, heads, policy, torch.device(DEVICE))
        out = torch.full((rows, TOPK), -7, dtype=torch.int32, device=DEVICE)
        return SketchCall(self, scratch, out, out.clone())

    def select(self) -> None:
        self.made.run()
        rows, stats = self.inputs.operands, PageSketch(self.inputs.page_means, self.sketches)
        made = self.made.scratch  # whose score keys are undefined by now
        scan_sketches(made.columns, rows, stats, made.policy, scores=self.scanned)
        self.cheap = self.cheap_scores()  # with the statistics that the step has read
        update_last_page_means(self.layers, self.inputs.page_table, self.inputs.seq_lens)
        pages = self.written
        for whole, part in zip((self.codes, self.scales, self.truth), self.sketched(pages), strict=True):
            whole[pages] = part

    def cheap_scores(self) -> tuple[Tensor, Tensor]:
        """Scores [rows, TOKENS] by the columns that were chosen, and how far off a right kernel's may be."""
        columns, requests = self.made.scratch.columns, self.walk.requests
        q, gates = columns.queries.float(), columns.gates
        count = q.shape[1]
        by_request = q.view(requests, -1, DIM).mT
        levels = self.codes[self.ids].view(requests, self.TOKENS, DIM) @ by_request
        levels -= ((2**self.bits - 1) / 2 * by_request.sum(1, keepdim=True)).floor()
        means = (self.inputs.page_means[self.ids].float() @ by_request).repeat_interleave(PAGE, 1)
        levels *= self.scales[self.ids].view(requests, self.TOKENS, 1)
        products, sizes = (
            each.mT.reshape(len(q), count, self.TOKENS) for each in (means + levels, means.abs() + levels.abs())
        )
        products[:, :-1].relu_()  # the last one is the residual
        terms = products * gates.unsqueeze(2)
        slack = self.ROUNDED * terms.abs() + self.SINGLE * sizes * gates.abs().unsqueeze(2)
        return terms.sum(1), slack.sum(1)

    def judge(self) -> list[Tensor]:
        scratch, length = self.made.scratch, self.inputs.seq_lens.unsqueeze(1)
        position = torch.arange(self.TOKENS, device=DEVICE)
        scored = (length // PAGE - 1).clamp(min=0) * PAGE
        by_sketch = (position < scored) & (length > self.CANDIDATES)
        keys = self.scanned[:, : self.TOKENS].int()
        score, slack = self.cheap
        low, high = score_keys(score - slack), score_keys(score + slack)
        listed = marked(scratch.positions, torch.arange(self.CANDIDATES, device=DEVICE) < length, self.TOKENS)
        newest = (position < length) & ~by_sketch
        rank = keys.long() * self.TOKENS - position  # no two are the same, and of equal keys the earlier is larger
        lost = rank.masked_fill(~(by_sketch & ~listed), -self.TOKENS).amax(1, keepdim=True)
        kept = rank.masked_fill(~(by_sketch & listed), 2**40).amin(1, keepdim=True)
        flaws = (
            self.stale_means(),
            (self.sketches[self.ids] != self.truth[self.ids]).any(-1) & self.complete(),
            ((keys < low - 1) | (keys > high + 1)) & by_sketch,
            newest & ~listed,
            (listed.sum(1, keepdim=True) != length.clamp(max=self.CANDIDATES)) | (lost > kept),
            *self.choices(listed, self.made.positions, self.made.out),
        )
        return [flaw.any() for flaw in flaws]


@pytest.mark.parametrize("walker", [BlockWalker, SketchWalker], ids=["blocks", "sketches"])
@pytest.mark.parametrize(("heads", "walk"), WALKS, ids=["decode", "verify"])
def test_every_step_of_a_walk_selects_right(walker: type[BlockWalker | SketchWalker], heads: int, walk: Walk) -> None:
    walks = walker(walk, heads, seed=heads)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        walks.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walks.step()
    eager = walks.call()
    for step in range(1, walk.steps):
        graph.replay()
        if step % 100 == 0:
            eager.run()
            assert torch.equal(eager.out, walks.made.out), f"step {step}: replay differs from eager"
    bad = walks.flaws.nonzero().tolist()
    assert not bad, f"{len(bad)} flaws, the first " + str([(step, walks.FLAWS[flaw]) for step, flaw in bad[:5]])
    assert int(walks.at) == walk.steps
