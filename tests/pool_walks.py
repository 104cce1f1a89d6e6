"""Requests at random through the hooks, over SGLang's own pool and radix cache, under any policies of any layers.

After each event the bytes of the pool alone say what every page's statistics and every row's selection must be.
`Lifecycle` (test_lifecycle.py) has the events of a page that lie outside of these calls, such as its way to the host.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_misa import decode_gate, reference, reference_pages, runtime
from sglang_misa.bench.host_cache import make_pool
from sglang_misa.canary import Canary
from sglang_misa.config import ConfigError, MisaConfig, SelectionPolicy
from sglang_misa.cpu import kernels
from sglang_misa.engines.kernels import KernelEngine
from sglang_misa.kernels.layout import PAGE
from sglang_misa.patches import forward_batch, indexer
from sglang_misa.policy import STOCK
from sglang_misa.policy_file import LayerPolicy, ModelIdentity, PolicyFile
from sglang_misa.runtime import Runtime

LAYERS, PAGES, LIVE, WORDS = 3, 16, 5, 5
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 192)
STALE = (1 << 30, -5, 0)  # page-table entries past a request's end


@dataclass
class Request:
    """Its tokens so far, the slots of its pages, and how much of them is the radix cache's."""

    prompt: list[int]
    node: Any
    slots: Tensor
    kept: int
    tokens: list[int] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return len(self.tokens) >= len(self.prompt)


def policy(rng: random.Random, phase: str, gate: dict[str, int], bits: int) -> SelectionPolicy:
    """Any policy of a phase; decode's have one gate and one width of sketches."""
    if rng.random() < 0.3:
        return STOCK
    axes: dict[str, Any] = {"block_size": rng.choice([64, 128, 192])}
    if rng.random() < 0.6:
        axes |= {"heads": rng.choice([1, 3, 8]), "router": rng.choice(["mean", "peak", "signed", "weight"])}
    if "heads" in axes and rng.random() < 0.5:
        axes |= {"residual": True, "router": rng.choice(["error", "peak"])}
    if "heads" not in axes or rng.random() < 0.3:
        axes |= {"blocks": rng.choice([2, 3])}
    if phase == "prefill":
        return SelectionPolicy(**axes, min_len=rng.choice([0, 63, 64, 130]), tail=rng.choice([0, 5, 40]))
    if rng.random() < 0.5:
        axes |= {"sketch": bits, "candidates": rng.choice([64, 100])}
    return SelectionPolicy(**axes, **gate)


def settings(rng: random.Random, heads: int, topk: int, *, decodes: bool) -> MisaConfig:
    """Policies of each layer, or of each phase; `decodes`: a decode policy among them."""
    gate = {"min_len": rng.choice([0, 100, 128]), "min_rows": rng.choice([1, 2]), "min_tokens": rng.choice([0, 300])}
    bits = rng.choice([1, 2])
    model = ModelIdentity(architecture="X", layers=LAYERS, index_heads=heads, index_topk=topk, config_sha256="0" * 64)
    while True:
        each = [{phase: policy(rng, phase, gate, bits) for phase in ("prefill", "decode")} for _ in range(LAYERS)]
        layers = {str(layer): LayerPolicy(**both) for layer, both in enumerate(each)}
        file = PolicyFile(model=model, created_by="a test", target_recall=0.9, length=100, layers=layers)
        config = MisaConfig(layers=file) if rng.random() < 0.5 else MisaConfig(**each[0])
        try:
            config.check(index_heads=heads, topk=topk)
        except ConfigError:
            continue
        if config.decoding.active or (config.active and not decodes):
            return config


class Walk:
    """One server's life; `on_kernels`: statistics by the GPU's programs, interpreted, and nothing is selected.

    Without a decode policy nothing is left to check there, so that it has one.
    """

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, *, on_kernels: bool):
        from sglang.srt.layers.attention.dsa import dsa_indexer
        from sglang.srt.mem_cache import memory_pool
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.rng, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.heads, self.topk = self.rng.choice([32, 64]), self.rng.choice([16, 64])
        self.config = settings(self.rng, self.heads, self.topk, decodes=on_kernels)
        armed = Runtime(self.config, self.heads, self.topk, row_len=1 << 14, device="cpu", rank=0, ranks=1)
        monkeypatch.setattr(runtime, "_runtime", armed)
        without = self.rng.choice([None, *range(LAYERS)])  # a layer without an indexer
        skipped = [layer == without for layer in range(LAYERS)]
        pool_of = functools.partial(memory_pool.DSATokenToKVPool, skip_topk_layers=skipped)
        monkeypatch.setattr(memory_pool, "DSATokenToKVPool", pool_of)
        self.pool, self.allocator = make_pool(PAGES, LAYERS)
        monkeypatch.setattr(type(self.pool), "get_index_k_scale_buffer", kernels.get_index_keys)
        monkeypatch.setattr(dsa_indexer, "get_token_to_kv_pool", lambda: self.pool)
        self.layers = [layer for layer, skip in enumerate(skipped) if not skip]
        if on_kernels:
            self.pool.misa_selector.engine = engine = KernelEngine(
                armed, self.pool.index_k_with_scale_buffer, keeps=True
            )
            monkeypatch.setattr(engine, "_select", lambda *_: None)
            monkeypatch.setattr(engine, "decode", lambda *_: None)
        self.selects, self.engine = not on_kernels, self.pool.misa_selector.engine
        self.canary = Canary(self.engine, self.layers, "raise", self.rng.randrange(1 << 30))
        self.checked = random.Random(self.rng.randrange(1 << 30))  # rows: what is checked does not change the walk
        self.radix = RadixCache(CacheInitParams(False, None, self.allocator, PAGE))
        self.live: list[Request] = []
        self.scramble()

    def scramble(self) -> None:
        for layer, buffer in enumerate(self.pool.index_k_with_scale_buffer):
            for memory in (buffer, *self.engine.stats.kinds(layer)):
                memory.view(torch.uint8).random_(0, 256, generator=self.g)

    def run(self, events: int) -> None:
        weights = {self.arrive: 6, self.prefill: 6, self.decode: 5, self.leave: 2, self.flush: 0.3}
        for event in self.rng.choices([*weights], [*weights.values()], k=events):
            event()
            self.check()

    # Memory

    def grow(self, request: Request, count: int) -> bool:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        need = -(-(len(request.tokens) + count - len(request.slots)) // PAGE) * PAGE
        if need <= 0:
            return True
        if self.allocator.available_size() < need:
            self.radix.evict(EvictParams(num_tokens=need))
        slots = self.allocator.alloc(need)
        if slots is not None:
            request.slots = torch.cat([request.slots, slots])
        return slots is not None

    def insert(self, request: Request) -> None:
        """What is complete becomes the cache's, and the request reads the cache's pages from now on."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        whole = len(request.tokens) // PAGE * PAGE
        key = RadixKey(request.tokens[:whole])
        known = self.radix.insert(InsertParams(key=key, value=request.slots[:whole].clone())).prefix_len
        self.allocator.free(request.slots[request.kept : max(known, request.kept)])
        node = self.radix.match_prefix(MatchPrefixParams(key=key)).last_device_node
        request.slots = torch.cat([self.radix.path_device_indices(node).long(), request.slots[whole:]])
        self.radix.dec_lock_ref(request.node)
        self.radix.inc_lock_ref(node)
        request.node, request.kept = node, whole

    def store(self, request: Request, count: int) -> Tensor:
        """Write the keys of `count` more tokens: their slots."""
        first = len(request.tokens)
        more = request.prompt[first : first + count]
        request.tokens += more or [self.rng.randrange(WORDS) for _ in range(count)]
        slots = request.slots[first : first + count]
        for layer in self.layers:
            keys = torch.randn(count, 128, generator=self.g).to(torch.float8_e4m3fn)
            kernels.set_index_keys(self.pool, layer, slots, keys, torch.rand(count, generator=self.g))
        return slots

    # Events

    def arrive(self) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        if len(self.live) >= LIVE:
            return
        length, family = self.rng.choice([self.rng.choice(EDGES), self.rng.randrange(1, 600)]), self.rng.randrange(2)
        shared = self.rng.choice([length, self.rng.randrange(length + 1)])  # a hit is of whole pages
        prompt = [(family + i * i) % WORDS if i < shared else self.rng.randrange(WORDS) for i in range(length)]
        node = self.radix.match_prefix(MatchPrefixParams(key=RadixKey(prompt[:-1]))).last_device_node
        self.radix.inc_lock_ref(node)
        slots = self.radix.path_device_indices(node).long()
        self.live.append(Request(prompt, node, slots, len(slots), prompt[: len(slots)]))

    def prefill(self) -> None:
        """A chunk of some prompts in one call, padded or not."""
        some = []
        for request in self.live:
            count = min(len(request.prompt) - len(request.tokens), self.rng.choice([1, 7, 64, 100, 300]))
            if count > 0 and self.grow(request, count):
                some.append((request, count))
        if some:
            counts = [count for _, count in some]
            slots = torch.cat([self.store(request, count) for request, count in some])
            self.extend([request for request, _ in some], counts, slots)
            for request, _ in some:
                if self.rng.random() < 0.7:
                    self.insert(request)

    def decode(self) -> None:
        """Steps of a token and of drafts, some of which are taken back: their keys stay until others are written."""
        drafts = self.rng.choice([1, 1, 1, 2, 5, 64])
        for _ in range(self.rng.choice([1, 4, 20]) if drafts == 1 else 2):
            some = [request for request in self.live if request.decodes and self.grow(request, drafts)]
            for request in some:
                self.store(request, drafts)
            if some:
                self.step(some, drafts)
            for request in some:
                del request.tokens[len(request.tokens) - self.rng.randrange(drafts) :]
                self.free_behind(request)

    def free_behind(self, request: Request) -> None:
        used = -(-len(request.tokens) // PAGE) * PAGE
        self.allocator.free(request.slots[used:])
        request.slots = request.slots[:used]

    def leave(self) -> None:
        """A request ends, is aborted in a chunk or retracted."""
        if self.live:
            request = self.live.pop(self.rng.randrange(len(self.live)))
            if self.rng.random() < 0.5:
                self.insert(request)
            self.allocator.free(request.slots[request.kept :])
            self.radix.dec_lock_ref(request.node)

    def flush(self) -> None:
        self.live = []
        self.radix.reset()
        self.allocator.clear()
        self.scramble()

    # Calls, as SGLang makes them

    def queries(self, rows: int) -> tuple[Tensor, Tensor]:
        q = torch.randn(rows, self.heads, 128, generator=self.g).to(torch.float8_e4m3fn)
        return q, torch.randn(rows, self.heads, 1, generator=self.g)

    def table(self, requests: list[Request | None]) -> Tensor:
        wide = max(len(request.slots) // PAGE if request else 1 for request in requests) + self.rng.randrange(3)
        table = torch.full((len(requests), wide), self.rng.choice(STALE), dtype=torch.int32)
        for row, request in zip(table, requests, strict=True):
            pages = request.slots[::PAGE] // PAGE if request else torch.zeros(1)
            row[: len(pages)] = pages
        return table

    def extend(self, requests: list[Request], counts: list[int], slots: Tensor) -> None:
        lens = [len(request.tokens) for request in requests]
        rows = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(counts))
        seen = torch.cat([torch.arange(n - count + 1, n + 1) for n, count in zip(lens, counts, strict=True)]).int()
        first = torch.tensor([0, *lens]).cumsum(0)[rows].int()
        page_table, padding = self.table(requests), self.rng.choice([0, 3])
        metadata = SimpleNamespace(
            get_page_table_64=lambda: page_table,
            get_indexer_seq_len_cpu=lambda: torch.tensor(lens),
            get_dsa_extend_len_cpu=lambda: counts,
            get_indexer_kvcache_range=lambda: (first, first + seen),
            get_token_to_batch_idx=lambda: rows.int(),
            get_indexer_seq_len=lambda: torch.tensor(lens),
            get_seqlens_expanded=lambda: seen,
            force_unfused_topk=True,  # positions
        )
        forward_batch._prompt_lens = [len(request.prompt) for request in requests]
        batch = SimpleNamespace(out_cache_loc=slots)
        short = max(lens) <= self.topk and self.rng.random() < 0.5
        for layer in self.layers:
            hooked = self.hooked(layer)
            if short:
                indexer.forward_k_only(lambda *_, **__: None, hooked, None, None, batch, layer, None, metadata)
                continue
            q, gates = self.queries(len(rows) + padding)
            stock = functools.partial(torch.full, q.shape[:1], -9)
            ids = indexer.get_topk_ragged(lambda *_, s=stock: s(), hooked, False, batch, layer, q, gates, metadata)
            own = self.config.policy("prefill", layer)
            chosen = [
                own if n > own.min_len and n <= len(requests[row].prompt) - own.tail else STOCK
                for row, n in zip(rows.tolist(), seen.tolist(), strict=True)
            ]
            long = sum(n > own.min_len for n in lens)
            few = sum(one is own for one in chosen) < self.engine.least_rows * long
            assert (ids.ndim == 1) == (not own.active or long == 0 or few), "stock's, or not"
            if self.selects and ids.ndim == 2:
                whose = [requests[row] for row in rows.tolist()]
                self.check_rows(layer, chosen, whose, seen.tolist(), q, gates, ids)
                assert (ids[len(rows) :] == -1).all(), "rows of padding got tokens"

    def step(self, requests: list[Request], drafts: int) -> None:
        padded: list[Request | None] = [*requests, *[None] * self.rng.choice([0, 2])]
        lens = [
            len(request.tokens) - drafts + 1 + draft if request else 1 for request in padded for draft in range(drafts)
        ]
        page_table, seq_lens = self.table(padded).repeat_interleave(drafts, 0), torch.tensor(lens, dtype=torch.int32)
        metadata = SimpleNamespace(
            get_page_table_64=lambda: page_table,
            get_dsa_extend_len_cpu=lambda: [len(lens)],
            get_seqlens_expanded=lambda: seq_lens,
            get_seqlens_int32=lambda: seq_lens,
            force_unfused_topk=True,
        )
        known = decode_gate.Step([len(request.tokens) if request else 1 for request in padded], drafts)
        mode = SimpleNamespace(is_target_verify=lambda: drafts > 1, is_draft_extend_v2=lambda: False)
        batch = SimpleNamespace(forward_mode=mode, misa_step=known)
        for layer in self.layers:
            q, gates = self.queries(len(lens))
            stock = functools.partial(torch.full, q.shape[:1], -9)
            ids = indexer.get_topk_paged(lambda *_, s=stock: s(), self.hooked(layer), batch, layer, q, gates, metadata)
            own = self.config.policy("decode", layer)
            beyond = drafts * sum(len(request.tokens) - own.min_len for request in requests if len(request.tokens) > 1)
            short = len(lens) < own.min_rows or max(known.lengths) <= own.min_len or 0 < own.min_tokens > beyond
            assert (ids.ndim == 1) == (not own.active or short), "stock's, or not"
            if self.selects and ids.ndim == 2:
                real = len(requests) * drafts
                whose = [request for request in requests for _ in range(drafts)]
                self.check_rows(layer, [own] * real, whose, lens[:real], q, gates, ids)
        assert not self.engine.behind

    def hooked(self, layer: int) -> SimpleNamespace:
        return SimpleNamespace(index_topk=self.topk, misa_last=layer == self.layers[-1])

    # What the bytes say

    def pages(self, request: Request, length: int) -> Tensor:
        return request.slots[: -(-length // PAGE) * PAGE : PAGE] // PAGE

    def check_rows(
        self,
        layer: int,
        policies: list[SelectionPolicy],
        requests: list[Request],
        lens: list[int],
        q: Tensor,
        gates: Tensor,
        ids: Tensor,
    ) -> None:
        """A few rows' selections are the reference's of the request's own bytes."""
        for row in {0, len(lens) - 1, *self.checked.sample(range(len(lens)), min(4, len(lens)))}:
            length, chosen = lens[row], policies[row]
            stored = self.pool.index_k_with_scale_buffer[layer][self.pages(requests[row], length)]
            means = reference_pages.page_means(stored).bfloat16()
            sketched = None
            if chosen.sketch is not None:
                sketch = reference_pages.quantize_pages(stored, means, chosen.sketch)
                sketched = reference_pages.sketched_keys(*sketch, means, chosen.sketch).reshape(1, -1, 128)[:, :length]
            keys = (part[None, :length] for part in reference_pages.unpack_pages(stored))
            scores = reference.policy_scores(
                chosen,
                q[row][None, None],
                gates[row].view(1, 1, -1),
                *keys,
                means[None, : length // PAGE],
                torch.tensor([[length]]),
                sketched,
            )
            wanted = reference.top_tokens(scores[0], self.topk)[0]
            assert sorted(ids[row].tolist()) == sorted(wanted.tolist()), (layer, chosen.label, length)

    def check(self) -> None:
        """Every complete page that a request, or one to come, can read has the statistics of its bytes."""
        if not self.pool.misa_selector.ladders.decodes:
            return  # each call of prefill computes those that it reads
        complete = [self.pages(request, len(request.tokens) // PAGE * PAGE) for request in self.live]
        ids = torch.cat([*complete, *self.cached(self.radix.root_node), torch.empty(0)]).long().unique()
        for layer in self.layers:
            stored, (seen, wrong) = self.pool.index_k_with_scale_buffer[layer][ids], self.engine.compared(layer, ids)
            assert not wrong.any(), (layer, ids[wrong.bool()], seen)
            means, *sketches = self.engine.stats.of(layer, ids)
            close = {"rtol": 2**-7, "atol": 1e-6}  # Triton's interpreter rounds down
            torch.testing.assert_close(means.float(), reference_pages.page_means(stored), **close)
            for sketch in sketches:
                bits = self.config.sketch
                assert torch.equal(
                    sketch, reference_pages.pack_sketches(*reference_pages.quantize_pages(stored, means, bits), bits)
                )
        if some := [request for request in self.live if request.tokens]:
            table = torch.zeros(len(some), PAGES * PAGE, dtype=torch.int32)
            for row, request in zip(table, some, strict=True):
                row[: len(request.slots)] = request.slots
            lens = torch.tensor([len(request.tokens) for request in some])
            self.canary.step(table, torch.arange(len(some)), lens, [str(n) for n in range(len(some))])

    def cached(self, node: Any) -> Iterator[Tensor]:
        for child in node.children.values():
            yield child.value[::PAGE] // PAGE
            yield from self.cached(child)
