"""The life of a page on SGLang's own pool, radix cache and host pools: docs/architecture.md has a row an event."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pools import reference_runtime

from sglang_misa import runtime, versions
from sglang_misa.bench.host_cache import HostCache
from sglang_misa.config import PRESETS
from sglang_misa.cpu.kernels import set_index_keys
from sglang_misa.kernels.layout import PAGE
from sglang_misa.patches import register
from sglang_misa.patches.disaggregation import pop_transferred

LAYERS, PAGES, WORDS = 2, 24, 6
# SGLang's copies of a host cache for each layout of it; the first are its default on a GPU.
COPIES = (
    ("page_first", "kernel"),
    ("layer_first", "kernel"),
    ("layer_first", "direct"),
    ("page_first_direct", "direct"),
)
ARMED = reference_runtime(PRESETS["misa-hisa"])


class Model:
    """What a pool should hold, in plain terms: a key follows from the weights, the token and its position."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        shape = (2, LAYERS, WORDS)
        self._keys = torch.randn(*shape, 128, generator=g).to(torch.float8_e4m3fn)
        self._scales = torch.rand(*shape, generator=g)
        self.weights = 0

    def keys(self, layer: int, tokens: list[int], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys fp8 [n, 128] and scales fp32 [n] of `tokens[first:]`."""
        position = torch.arange(first, len(tokens))
        at = self.weights % 2, layer, torch.tensor(tokens, dtype=torch.long)[position]
        column = (torch.arange(128) + position[:, None]) % 128
        keys = self._keys[at].view(torch.uint8).gather(1, column).view(torch.float8_e4m3fn)
        return keys, self._scales[at] * (1 + position % 7)

    def means(self, layer: int, tokens: list[int]) -> torch.Tensor:
        """Means bf16 [n, 128] of the complete pages of a request."""
        keys, scales = self.keys(layer, tokens[: len(tokens) // PAGE * PAGE])
        return (keys.float() * scales[:, None]).reshape(-1, PAGE, 128).mean(1).bfloat16()


class Pool:
    """SGLang's pool under the hooks, and its requests: tokens, and the slots of their pages."""

    def __init__(self, layout: str = "page_first", backend: str = "kernel") -> None:
        runtime._runtime = ARMED
        register.apply(versions.installed())
        self.model = Model()
        self.host = HostCache(PAGES, LAYERS, hicache_ratio=2.0, hicache_mem_layout=layout, hicache_io_backend=backend)
        self.pool, self.allocator = self.host.pool, self.host.allocator
        self.engine = self.pool.misa_selector.engine
        self.scramble()

    def scramble(self) -> None:
        """Memory that holds anything, NaN included: keys and statistics."""
        for buffer, means in zip(self.pool.index_k_with_scale_buffer, self.engine.stats.means, strict=True):
            buffer.random_(0, 256)
            means.view(torch.uint8).random_(0, 256)

    def close(self) -> None:
        register.undo()
        runtime._runtime = None

    def store(self, tokens: list[int], slots: torch.Tensor, first: int) -> None:
        """Write the keys of `tokens[first:]` where SGLang would."""
        for layer in range(LAYERS):
            set_index_keys(self.pool, layer, slots[first : len(tokens)].long(), *self.model.keys(layer, tokens, first))

    def prefill(self, tokens: list[int], slots: torch.Tensor, first: int) -> None:
        self.store(tokens, slots, first)
        for layer in range(LAYERS):
            self.engine.pages_written(layer, slots[first : len(tokens)].long())

    def check(self, tokens: list[int], slots: torch.Tensor) -> None:
        pages = slots[: len(tokens) // PAGE * PAGE : PAGE].long() // PAGE
        for layer in range(LAYERS):
            assert torch.equal(self.engine.stats.means[layer][pages], self.model.means(layer, tokens))


class Lifecycle(RuleBasedStateMachine):
    """Requests as the scheduler leads them: over the radix cache, in chunks, swapped out and back, flushed away."""

    @initialize(copies=st.sampled_from(COPIES))
    def begin(self, copies: tuple[str, str]) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.on = Pool(*copies)
        self.radix = RadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.on.allocator, page_size=PAGE
            )
        )
        self.live: list[dict[str, Any]] = []
        self.swapped: list[tuple[list[int], torch.Tensor]] = []

    def teardown(self) -> None:
        self.on.close()

    def make_room(self, tokens: int) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        if self.on.allocator.available_size() < tokens:
            self.radix.evict(EvictParams(num_tokens=tokens))

    def room(self, tokens: int) -> torch.Tensor | None:
        need = -(-tokens // PAGE) * PAGE
        self.make_room(need)
        return self.on.allocator.alloc(need) if need else torch.empty(0, dtype=torch.int64)

    def grow(self, request: dict[str, Any], tokens: list[int]) -> bool:
        slots = self.room(max(len(request["tokens"]) + len(tokens) - len(request["slots"]), 0))
        if slots is None:
            return False
        request["slots"] = torch.cat([request["slots"], slots.long()])
        request["tokens"] = request["tokens"] + tokens
        return True

    @rule(family=st.integers(0, 2), shared=st.integers(0, 300), own=st.lists(st.integers(0, WORDS - 1), max_size=150))
    def arrive(self, family: int, shared: int, own: list[int]) -> None:
        """A request comes: the cache gives what it has of it, the rest is prefilled."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        tokens = [(family * 7 + i * i) % WORDS for i in range(shared)] + [*own, family]
        node = self.radix.match_prefix(MatchPrefixParams(key=RadixKey(tokens[:-1]))).last_device_node
        cached = self.radix.path_device_indices(node).long()
        self.radix.inc_lock_ref(node)
        request = {"tokens": tokens[: len(cached)], "slots": cached, "cached": len(cached), "node": node}
        if self.grow(request, tokens[len(cached) :]):
            self.on.prefill(tokens, request["slots"], len(cached))
            self.live.append(request)
        else:
            self.radix.dec_lock_ref(node)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=100))
    def next_chunk(self, data: st.DataObject, more: list[int]) -> None:
        request = data.draw(st.sampled_from(self.live))
        first = len(request["tokens"])
        if self.grow(request, more):
            self.on.prefill(request["tokens"], request["slots"], first)

    @precondition(lambda self: self.live)
    @rule(steps=st.integers(1, 70), word=st.integers(0, WORDS - 1))
    def decode(self, steps: int, word: int) -> None:
        """All requests grow by a token a step, beside a padded row; tables are stale past their ends."""
        for _ in range(steps):
            rows = [r for r in self.live if self.grow(r, [word])]
            for request in rows:
                self.on.store(request["tokens"], request["slots"], len(request["tokens"]) - 1)
            table = torch.full((len(rows) + 1, PAGES + 3), PAGES + 99, dtype=torch.int32)
            table[-1, 0] = 0
            for row, request in zip(table, rows, strict=False):
                row[: len(request["slots"]) // PAGE] = request["slots"][::PAGE] // PAGE
            lens = torch.tensor([*(len(request["tokens"]) for request in rows), 1], dtype=torch.int32)
            self.on.engine.end_step(table, lens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), drafts=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=4))
    def reject_drafts(self, data: st.DataObject, drafts: list[int]) -> None:
        """A verify step writes drafts that are not accepted, statistics of a page that they complete among it."""
        request = data.draw(st.sampled_from(self.live))
        first = len(request["tokens"])
        if self.grow(request, drafts):
            self.on.prefill(request["tokens"], request["slots"], first)
            request["tokens"] = request["tokens"][:first]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), insert=st.booleans())
    def leave(self, data: st.DataObject, insert: bool) -> None:
        """A request finishes into the cache, or is retracted or aborted: its own pages are free."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        request = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        kept, slots = request["cached"], request["slots"]
        if insert:
            aligned = len(request["tokens"]) // PAGE * PAGE
            params = InsertParams(key=RadixKey(request["tokens"][:aligned]), value=slots[:aligned].clone())
            known = self.radix.insert(params).prefix_len
            self.on.allocator.free(slots[kept : max(known, kept)])
            kept = aligned
        self.on.allocator.free(slots[kept:])
        self.radix.dec_lock_ref(request["node"])

    @precondition(lambda self: any(len(r["tokens"]) >= PAGE for r in self.live))
    @rule(data=st.data())
    def offload(self, data: st.DataObject) -> None:
        """The complete pages of a request go to the host; the device's are free for others."""
        request = data.draw(st.sampled_from([r for r in self.live if len(r["tokens"]) >= PAGE]))
        aligned = len(request["tokens"]) // PAGE * PAGE
        host_slots = self.on.host.offload(request["slots"][:aligned])
        if host_slots is None:
            return
        self.swapped.append((request["tokens"][:aligned], host_slots))
        self.live = [r for r in self.live if r is not request]
        self.on.allocator.free(request["slots"][request["cached"] :])
        self.radix.dec_lock_ref(request["node"])

    @precondition(lambda self: self.swapped)
    @rule()
    def load_back(self) -> None:
        """They come back to other pages, which hold the bytes and statistics of whoever was there."""
        tokens, host_slots = self.swapped[-1]
        self.make_room(len(tokens))
        slots = self.on.host.load_back(host_slots)
        if slots is None:
            return
        self.swapped.pop()
        self.on.host.pools.free(host_slots)
        self.start(tokens, slots)

    @rule(family=st.integers(0, 2), length=st.integers(1, 300))
    def transfer(self, family: int, length: int) -> None:
        """A prefill server writes a request's pages; the token that it sampled is not among them."""
        tokens = [(family * 5 + i * i) % WORDS for i in range(length)]
        slots = self.room(length)
        if slots is None:
            return
        self.on.store(tokens, slots, 0)
        table = torch.zeros(3, PAGES * PAGE, dtype=torch.int32)
        table[2, : len(slots)] = slots
        request = SimpleNamespace(req_pool_idx=2, seqlen=length + 1)
        scheduler = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool_allocator=self.on.allocator
        )
        queue = SimpleNamespace(scheduler=scheduler)
        assert pop_transferred(lambda queue, rids: [request], queue) == [request]
        self.start(tokens, slots)

    @precondition(lambda self: any(r["tokens"] and not r["cached"] for r in self.live))
    @rule(data=st.data())
    def retract_to_host(self, data: st.DataObject) -> None:
        """The decode side of a transfer: a request waits on the host and comes back to other pages."""
        request = data.draw(st.sampled_from([r for r in self.live if r["tokens"] and not r["cached"]]))
        stored = len(request["tokens"])
        with mock.patch("torch.cuda.synchronize"):
            copy = self.on.pool.get_cpu_copy(request["slots"][:stored])
            self.live = [r for r in self.live if r is not request]
            self.on.allocator.free(request["slots"])
            self.radix.dec_lock_ref(request["node"])
            slots = self.room(stored)
            assert slots is not None, "as many as were freed"
            slots = slots.reshape(-1, PAGE).flip(0).flatten()
            self.on.pool.load_cpu_copy(copy, slots[:stored])
        self.start(request["tokens"], slots)

    def start(self, tokens: list[int], slots: torch.Tensor) -> None:
        """A request whose pages are none of the radix cache's."""
        root = self.radix.root_node
        self.radix.inc_lock_ref(root)
        self.live.append({"tokens": tokens, "slots": slots.long(), "cached": 0, "node": root})

    @precondition(lambda self: len(self.live) > 1)
    @rule(update=st.booleans(), release=st.booleans())
    def flush(self, update: bool, release: bool) -> None:
        """/flush_cache, and with it new weights, by which the same tokens have other keys, or memory release."""
        self.live, self.swapped = [], []
        self.radix.reset()
        self.on.allocator.clear()
        self.on.host.pools.clear()
        self.on.model.weights += update
        if release:
            self.on.scramble()

    @invariant()
    def statistics_are_those_of_the_model(self) -> None:
        for request in self.live:
            self.on.check(request["tokens"], request["slots"])


LONG = settings.get_current_profile_name() == "long"  # pytest --hypothesis-profile long --hypothesis-seed N
Lifecycle.TestCase.settings = settings() if LONG else settings(max_examples=12, stateful_step_count=20)
TestLifecycle = Lifecycle.TestCase


def test_the_table_of_events_names_rules_and_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    table = (root / "docs/architecture.md").read_text().partition("## Life of a page")[2]
    named = set(re.findall(r"`(?:Lifecycle\.)?(\w+(?:\.py)?)`", table))
    rules = {rule.function.__name__ for rule in Lifecycle.setup_state().rules}
    assert rules <= named
    assert set(re.findall(r"`Lifecycle\.(\w+)`", table)) <= rules
    files = {name for name in named if name.endswith(".py")}
    assert files
    assert files <= {path.name for path in (root / "tests").rglob("test_*.py")}


@pytest.fixture(params=COPIES, ids="-".join)
def pool(request: pytest.FixtureRequest) -> Any:
    built = Pool(*request.param)
    yield built
    built.close()


@pytest.fixture
def tokens() -> list[int]:
    return [i * i % WORDS for i in range(5 * PAGE)]


def test_load_back_computes_statistics_before_the_layers_event(
    pool: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.cache_controller import LayerLoadingEvent

    slots = pool.allocator.alloc(len(tokens)).long()
    pool.prefill(tokens, slots, 0)
    host_slots = pool.host.offload(slots)
    pool.engine.stats.means[0].fill_(float("nan"))
    pool.engine.stats.means[1].fill_(float("nan"))
    seen = []

    def done(event: LayerLoadingEvent, layer: int) -> None:
        means = pool.engine.stats.means[layer]
        (pages,) = means.isfinite().all(1).nonzero(as_tuple=True)
        assert torch.equal(means[pages], pool.model.means(layer, tokens))
        seen.append(layer)

    monkeypatch.setattr(LayerLoadingEvent, "complete", done)
    other = pool.host.load_back(host_slots)
    assert seen == list(range(LAYERS))
    pool.check(tokens, other)


def test_load_back_without_the_hook_leaves_stale_statistics(pool: Any, tokens: list[int]) -> None:
    slots = pool.allocator.alloc(len(tokens)).long()
    pool.prefill(tokens, slots, 0)
    host_slots = pool.host.offload(slots)
    register.undo()
    other = pool.host.load_back(host_slots)
    pages = other[::PAGE] // PAGE
    assert torch.equal(*(pool.pool.index_k_with_scale_buffer[0][each[::PAGE] // PAGE] for each in (slots, other)))
    assert not torch.equal(pool.engine.stats.means[0][pages], pool.model.means(0, tokens))
    register.apply(versions.installed())


@pytest.mark.parametrize("pool", COPIES[:1], indirect=True, ids="-".join)  # the slots are alike in all layouts
def test_kernels_take_the_slots_of_pages_that_come_back(pool: Any, tokens: list[int]) -> None:
    """From the host cache and from a retracted request's copy; kernels want other tensors than the reference."""
    from sglang_misa.engines.kernels import KernelEngine

    engine = KernelEngine(reference_runtime(PRESETS["faithful"]), pool.pool.index_k_with_scale_buffer)
    pool.pool.misa_selector.engine = engine
    slots = pool.allocator.alloc(len(tokens)).long()
    pool.store(tokens, slots, 0)
    host_slots = pool.host.offload(slots)
    loaded = pool.host.load_back(host_slots)
    swapped = pool.allocator.alloc(len(tokens)).long()
    with mock.patch("torch.cuda.synchronize"):
        pool.pool.load_cpu_copy(pool.pool.get_cpu_copy(slots), swapped)
    for back in (loaded, swapped):
        pages = back[::PAGE] // PAGE
        for layer in range(LAYERS):
            assert not engine.compared(layer, pages)[1].any()
            means = engine.stats.means[layer][pages]  # rounded down by Triton's interpreter
            torch.testing.assert_close(means, pool.model.means(layer, tokens), rtol=2**-7, atol=1e-6)
