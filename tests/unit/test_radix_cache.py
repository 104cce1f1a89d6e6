"""A radix hit selects what a cold run selects: SGLang's own radix cache, allocator and pool, page means beside them."""

import pytest
import torch
from pools import reference_engine

from sglang_misa import reference, reference_pages
from sglang_misa.bench.host_cache import make_pool
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE

POLICY = SelectionPolicy(heads=4, blocks=4, block_size=64, min_len=0)
HEADS, PAGES = 32, 24


class Cache:
    """One pool with its radix cache; serves prompts (lists of token ids) as the scheduler would."""

    def __init__(self) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        self.pool, self.allocator = make_pool(PAGES)
        self.buffer = self.pool.get_index_k_with_scale_buffer(0)
        self.buffer.random_(0, 256)
        self.engine = reference_engine([self.buffer])
        self.radix = RadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self.allocator, page_size=PAGE
            )
        )

    def serve(self, tokens: list[int]) -> tuple[int, torch.Tensor]:
        """Tokens taken from the cache, and the policy's scores of the prompt's last row."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        match = self.radix.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
        cached = self.radix.path_device_indices(match.last_device_node)
        room = -(-(len(tokens) - len(cached)) // PAGE) * PAGE
        if self.allocator.available_size() < room:
            self.radix.evict(EvictParams(num_tokens=room))
        fresh = self.allocator.alloc(room)
        slots = torch.cat([cached.long(), fresh])
        self.write(tokens, slots, first=len(cached))
        self.engine.pages_written(0, slots[len(cached) : len(tokens)])
        scores = self.scores(tokens, slots)
        aligned = len(tokens) // PAGE * PAGE
        self.radix.insert(InsertParams(key=RadixKey(tokens[:aligned]), value=slots[:aligned].clone()))
        if aligned < len(slots):
            self.allocator.free(slots[aligned:])
        return len(cached), scores

    def write(self, tokens: list[int], slots: torch.Tensor, first: int) -> None:
        """Keys that depend on token and position alone, so that equal prefixes have equal keys."""
        for position in range(first, len(tokens)):
            g = torch.Generator().manual_seed(tokens[position] * 10007 + position)
            page, offset = divmod(int(slots[position]), PAGE)
            row = self.buffer[page]
            key = torch.randn(128, generator=g).to(torch.float8_e4m3fn).view(torch.uint8)
            row[offset * 128 : (offset + 1) * 128] = key
            row[PAGE * 128 + offset * 4 :][:4] = torch.rand(1, generator=g).view(torch.uint8)

    def scores(self, tokens: list[int], slots: torch.Tensor) -> torch.Tensor:
        pages = slots[: len(tokens) : PAGE] // PAGE
        keys = (part[None, : len(tokens)] for part in reference_pages.unpack_pages(self.buffer[pages]))
        g = torch.Generator().manual_seed(0)
        q = torch.randn(1, 1, HEADS, 128, generator=g).to(torch.float8_e4m3fn)
        means = self.engine.stats.means[0][pages[: len(tokens) // PAGE]].unsqueeze(0)
        lens = torch.tensor([[len(tokens)]])
        return reference.policy_scores(POLICY, q, torch.randn(1, 1, HEADS, generator=g), *keys, means, lens)


def prompt(seed: int, length: int, prefix: list[int] | None = None) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    own = torch.randint(0, 1000, (length - len(prefix or []),), generator=g).tolist()
    return [*(prefix or []), *own]


@pytest.mark.parametrize("shared", [0, 63, 64, 65, 500])
def test_a_hit_scores_what_a_cold_run_scores(shared: int) -> None:
    first = prompt(1, 700)
    second = prompt(2, 650, prefix=first[:shared])
    warm, cold = Cache(), Cache()
    assert warm.serve(first)[0] == 0
    cached, scores = warm.serve(second)
    assert cached == shared // PAGE * PAGE
    assert torch.equal(scores, cold.serve(second)[1])


def test_pages_evicted_and_reused_score_as_new() -> None:
    cache = Cache()
    for seed in range(8):  # more than the pool holds: pages change hands
        tokens = prompt(seed, PAGES * PAGE // 2 - 5)
        assert torch.equal(cache.serve(tokens)[1], Cache().serve(tokens)[1])
