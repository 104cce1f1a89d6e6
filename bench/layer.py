"""One layer of an indexer for benches: pages in random physical order, calls of an engine, and stock's calls."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sglang_misa import reference_pages
from sglang_misa.bench import check, inputs, stock
from sglang_misa.call import DecodeCall, ExtendCall, Output, Run, spans
from sglang_misa.config import MisaConfig, Phase, SelectionPolicy
from sglang_misa.engines import Engine, engine_for
from sglang_misa.kernels.layout import PAGE
from sglang_misa.policy import STOCK
from sglang_misa.row_sample import one_of_each_part
from sglang_misa.runtime import Runtime

TOPK = 2048
CHECKED_ROWS = 24
LAYERS = 61  # of DeepSeek-V3.2: those that share a decode step's upkeep of page statistics
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """What a bench varies. In prefill, `rows` new rows of `requests` prompts of `length` keys each; in decode, `rows`
    requests of `length` keys."""

    phase: Phase
    index_heads: int
    rows: int
    length: int
    inputs: str
    requests: int = 1  # prefill: the rows are theirs in equal shares
    device: str = "cuda"


@dataclass(frozen=True)
class Layer:
    """Queries, and the index-K pages of every request."""

    shape: Shape
    index_q: Tensor  # [T, H, 128] fp8
    head_gates: Tensor  # [T, H] fp32
    index_k_pages: Tensor  # [num_pages, 8448] uint8
    page_table: Tensor  # [requests, W] int32
    row_batch: Tensor  # [T] int32, the request of each row
    seq_lens: Tensor  # [T] int32

    @classmethod
    def make(cls, shape: Shape, seed: int = 0) -> Layer:
        """Every request has keys of its own; page 0 belongs to nobody."""
        requests = shape.requests if shape.phase == "prefill" else shape.rows
        share = shape.rows // requests
        width = -(-shape.length // PAGE)
        pages = requests * width + 1
        device = shape.device
        generator = torch.Generator(device).manual_seed(seed)
        table = (torch.randperm(pages - 1, device=device, generator=generator) + 1).view(requests, width)
        index_k_pages = torch.zeros(pages, PAGE * (128 + 4), dtype=torch.uint8, device=device)
        queries, gates = [], []
        for request in range(requests):
            own = seed * requests + request
            x = inputs.make(shape.inputs, share, shape.length, shape.index_heads, seed=own, device=device)
            index_k = torch.nn.functional.pad(x.index_k.view(torch.uint8), (0, 0, 0, width * PAGE - shape.length))
            k_scale = torch.nn.functional.pad(x.k_scale, (0, width * PAGE - shape.length))
            index_k_pages[table[request]] = inputs.pack_pages(index_k, k_scale)
            queries.append(x.index_q.view(torch.uint8))
            gates.append(x.head_gates)
        ends = torch.arange(shape.length - share + 1, shape.length + 1, dtype=torch.int32, device=device)
        return cls(
            shape,
            torch.cat(queries).view(inputs.FP8),
            torch.cat(gates).contiguous(),
            index_k_pages,
            table.int(),
            torch.arange(requests, dtype=torch.int32, device=device).repeat_interleave(share),
            ends.repeat(requests),
        )

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """The keys [S, 128] fp8 and scales [S] of all requests, one behind another."""
        pages = self.index_k_pages[self.page_table.flatten().long()]
        index_k, k_scale = reference_pages.unpack_pages(pages)
        requests, width = self.page_table.shape
        keys = index_k.view(torch.uint8).view(requests, width * PAGE, 128)[:, : self.shape.length]
        scales = k_scale.view(requests, width * PAGE)[:, : self.shape.length]
        return keys.reshape(-1, 128).contiguous().view(inputs.FP8), scales.reshape(-1).contiguous()

    @cached_property
    def ks(self) -> Tensor:
        return self.row_batch * self.shape.length

    def extend_call(self, ids: Tensor) -> ExtendCall:
        requests = len(self.page_table)
        lens = [self.shape.length] * requests
        index_k, k_scale = self.gathered
        return ExtendCall(
            layer=0,
            spans=spans([self.shape.rows // requests] * requests, lens),
            index_q=self.index_q,
            head_gates=self.head_gates,
            index_k=index_k,
            k_scale=k_scale,
            seq_lens=self.seq_lens,
            ks=self.ks,
            row_batch=self.row_batch,
            page_table=self.page_table,
            request_lens=torch.tensor(lens, dtype=torch.int32, device=self.ks.device),
            output=Output(ids, self.page_table, self.row_batch),
        )

    def decode_call(self, layer: int, ids: Tensor) -> DecodeCall:
        return DecodeCall(
            layer=layer,
            index_q=self.index_q,
            head_gates=self.head_gates,
            index_k_pages=self.index_k_pages,
            page_table=self.page_table,
            seq_lens=self.seq_lens,
            ids=ids,
            positions=False,
        )

    def keep_statistics(self, engine: Engine, index: int = 0) -> None:
        """Have `engine` know the pages before the call, as from the steps before it, in its `index`-th layer."""
        share = self.shape.rows // len(self.page_table) if self.shape.phase == "prefill" else 0
        pages = self.page_table[:, : (self.shape.length - share) // PAGE].flatten()
        engine.pages_written(index, pages.long() * PAGE + PAGE - 1)

    def stock(self) -> Call:
        if self.shape.phase == "prefill":
            windows = self.ks, self.ks + self.seq_lens
            return stock.prefill(self.index_q, self.head_gates, *self.gathered, *windows, TOPK)
        tensors = self.index_q, self.head_gates, self.index_k_pages, self.page_table, self.seq_lens
        return stock.decode(*tensors, TOPK)

    def row(self, t: int, engine: Engine, layer: int, bits: int | None = None) -> check.Row:
        """What row t sees, with the page means that the engine has of it and, with `bits`, its keys as sketched."""
        length = int(self.seq_lens[t])
        pages = self.page_table[self.row_batch[t].long(), : -(-length // PAGE)].long()
        index_k, k_scale = reference_pages.unpack_pages(self.index_k_pages[pages])
        complete = pages[: length // PAGE]
        means = engine.stats.means[layer][complete]
        row = check.Row(self.index_q[t], self.head_gates[t], index_k[:length], k_scale[:length], means)
        return row if bits is None else replace(row, sketched=self._sketched(row, complete, bits))

    def _sketched(self, row: check.Row, complete: Tensor, bits: int) -> Tensor:
        """A row's keys as sketches of its `complete` pages say; the others as they are."""
        keys = row.index_k.float() * row.k_scale[:, None]
        codes, scales = reference_pages.quantize_pages(self.index_k_pages[complete], row.means, bits)
        keys[: len(complete) * PAGE] = reference_pages.sketched_keys(codes, scales, row.means, bits).flatten(0, 1)
        return keys

    def positions(self, t: int, slots: Tensor) -> Tensor:
        """Positions in row t of physical slots [k]: -1 stays, and -2 for a slot of no page of its request."""
        pages = self.page_table[self.row_batch[t].long()].long()
        logical = torch.full((len(self.index_k_pages),), -2, device=slots.device)
        logical[pages] = torch.arange(len(pages), device=slots.device)
        page = logical[slots.long().clamp_min(0) // PAGE]
        return torch.where(slots < 0, -1, torch.where(page < 0, -2, page * PAGE + slots % PAGE))


@functools.lru_cache(maxsize=64)
def layer_of(shape: Shape, seed: int = 0) -> Layer:
    """`Layer.make`, kept for the policies that are measured one after another on the same inputs."""
    if seed == 0:
        layer_of.cache_clear()  # those of another shape are done with
    return Layer.make(shape, seed)


@dataclass(frozen=True)
class Verdict:
    """What sampled rows of a selection say: the first flaw, and the mean share of DSA's fp32 set."""

    flaw: str | None
    recall: float


def checked_rows(count: int, seed: str) -> list[int]:
    """The first of `count` rows, the last, and one drawn of each of equal parts, others by another seed."""
    return sorted({0, count - 1, *one_of_each_part(range(count), min(CHECKED_ROWS - 2, count), random.Random(seed))})


def judge(policy: SelectionPolicy, layer: Layer, engine: Engine, index: int, slots: Tensor) -> Verdict:
    """Compare sampled rows of `slots` [T, k] with the policy's selection from `layer`, the engine's `index`-th."""
    decided, recalls = 0, []
    for t in checked_rows(len(slots), f"{layer.shape} {index}"):
        row, chosen = layer.row(t, engine, index, policy.sketch), layer.positions(t, slots[t])
        recalls.append(check.recall(row, chosen, TOPK))
        try:
            flaw = check.selection_flaw(policy, row, chosen, TOPK)
        except check.Undecided:
            continue
        if flaw is not None:
            return Verdict(f"row {t}: {flaw}", sum(recalls) / len(recalls))
        decided += 1
    return Verdict(None if decided else "heads tie in every sampled row", sum(recalls) / len(recalls))


def engine_of(policy: SelectionPolicy, shape: Shape, pages: list[Tensor], other: SelectionPolicy = STOCK) -> Engine:
    """The engine that a server would have for this policy, and `other` in the other phase, over layers of such pages.

    What decode reads of a page, prefill computes.
    """
    prefill, decode = (policy, other) if shape.phase == "prefill" else (other, policy)
    config = MisaConfig(prefill=prefill, decode=decode)
    context = -(-shape.length // PAGE) * PAGE
    runtime = Runtime(config, shape.index_heads, TOPK, context, shape.device, rank=0, ranks=1)
    return engine_for(runtime, pages, keeps=decode.active)


def extend(policy: SelectionPolicy, layer: Layer, engine: Engine) -> tuple[Call, Tensor]:
    """(call, slots): a call that selects for all rows of `layer`, and where it writes.

    What is known of the pages before them, an engine that keeps statistics has.
    """
    if engine.keeps:
        layer.keep_statistics(engine)
    slots = torch.full((layer.shape.rows, TOPK), -1, dtype=torch.int32, device=layer.shape.device)
    call = layer.extend_call(slots)
    runs = [(policy, Run.whole(call.spans))]
    return lambda: engine.extend(call, runs), slots
