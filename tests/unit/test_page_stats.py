"""Page means over the life of pages, on SGLang's own KV pool and paged allocator."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pools import make_pool, reference_engine

from sglang_misa import reference
from sglang_misa.kernels.layout import PAGE
from sglang_misa.page_stats import PageStats

PAGES = 24


class Pages(RuleBasedStateMachine):
    """Requests that extend, decode, rewind rejected drafts, share complete pages, finish and leave pages to others."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.allocator = make_pool(PAGES)
        self.buffer = self.pool.get_index_k_with_scale_buffer(0)
        self.buffer.random_(0, 256)  # freed pages hold anything, NaN included
        self.engine = reference_engine([self.buffer])
        self.requests: list[tuple[list[int], int]] = []  # pages, tokens
        self.shared: set[int] = set()
        self.generator = torch.Generator().manual_seed(0)

    def write(self, pages: list[int], first: int, last: int) -> torch.Tensor:
        """Store tokens [first, last) of a request as SGLang lays them out; returns their slots."""
        position = torch.arange(first, last)
        slots = torch.tensor(pages)[position // PAGE] * PAGE + position % PAGE
        keys = torch.randn(len(slots), 128, generator=self.generator).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand(len(slots), 1, generator=self.generator).view(torch.uint8)
        for slot, key, scale in zip(slots.tolist(), keys, scales, strict=True):
            row, offset = self.buffer[slot // PAGE], slot % PAGE
            row[offset * 128 : (offset + 1) * 128] = key
            row[PAGE * 128 + offset * 4 : PAGE * 128 + (offset + 1) * 4] = scale
        return slots

    def grow(self, index: int, tokens: int) -> tuple[list[int], int, int]:
        pages, length = self.requests[index]
        missing = -(-(length + tokens) // PAGE) - len(pages)
        if missing > 0:
            slots = self.allocator.alloc(missing * PAGE)
            if slots is None:
                return pages, length, length
            pages = pages + (slots[::PAGE] // PAGE).tolist()
        self.requests[index] = (pages, length + tokens)
        return pages, length, length + tokens

    @rule(tokens=st.integers(1, 200))
    def prefill(self, tokens: int) -> None:
        self.requests.append(([], 0))
        pages, first, last = self.grow(len(self.requests) - 1, tokens)
        if last == first:
            self.requests.pop()
            return
        self.engine.pages_written(0, self.write(pages, first, last))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(1, 100))
    def next_chunk(self, data: st.DataObject, tokens: int) -> None:
        pages, first, last = self.grow(data.draw(st.integers(0, len(self.requests) - 1)), tokens)
        if last > first:
            self.engine.pages_written(0, self.write(pages, first, last))

    @precondition(lambda self: self.requests)
    @rule(steps=st.integers(1, 5))
    def decode(self, steps: int) -> None:
        """All requests append one token a step, in one batch beside a padded row (length 1 on page 0)."""
        for _ in range(steps):
            grown = [self.grow(i, 1) for i in range(len(self.requests))]
            tables = [pages for pages, first, last in grown if last > first]
            lens = [last for _, first, last in grown if last > first]
            for pages, first, last in grown:
                if last > first:
                    self.write(pages, first, last)
            width = max((len(t) for t in tables), default=1) + 3
            stale = [t + [PAGES + 7] * (width - len(t)) for t in [*tables, [0]]]  # past a row's end: no page at all
            self.engine.end_step(torch.tensor(stale), torch.tensor([*lens, 1], dtype=torch.int32))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), rejected=st.integers(1, 4))
    def reject_drafts(self, data: st.DataObject, rejected: int) -> None:
        """A verify step wrote tokens that were not accepted: the length goes back, the bytes stay until rewritten."""
        index = data.draw(st.integers(0, len(self.requests) - 1))
        pages, length = self.requests[index]
        kept = max(length - rejected, 1)
        if not any(page in self.shared for page in pages[kept // PAGE :]):
            self.requests[index] = (pages, kept)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=st.integers(1, 100))
    def radix_hit(self, data: st.DataObject, tokens: int) -> None:
        """A second request reuses the complete pages of a first and goes its own way."""
        pages, length = self.requests[data.draw(st.integers(0, len(self.requests) - 1))]
        prefix = pages[: length // PAGE]
        if not prefix:
            return
        self.shared.update(prefix)
        self.requests.append((list(prefix), len(prefix) * PAGE))
        grown, first, last = self.grow(len(self.requests) - 1, tokens)
        if last == first:
            self.requests.pop()
            return
        self.engine.pages_written(0, self.write(grown, first, last))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        pages, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        alone = [p for p in pages if p not in self.shared]
        if alone:
            self.allocator.free(torch.tensor([[p * PAGE + i for i in range(PAGE)] for p in alone]).flatten())

    @invariant()
    def complete_pages_have_their_mean(self) -> None:
        for pages, length in self.requests:
            complete = torch.tensor(pages[: length // PAGE], dtype=torch.long)
            expected = reference.page_means(self.buffer[complete]).bfloat16()
            assert torch.equal(self.engine.stats.means[0][complete], expected)


Pages.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestPages = Pages.TestCase


def test_a_layer_without_indexer_costs_nothing() -> None:
    stats = PageStats.allocate([torch.zeros(0, 8448, dtype=torch.uint8), torch.zeros(3, 8448, dtype=torch.uint8)])
    assert stats.nbytes == 3 * PageStats.bytes_per_page() == 3 * 256
    pools = [torch.zeros(5, 8448, dtype=torch.uint8)]
    for bits in (1, 2):
        assert PageStats.allocate(pools, bits).nbytes == 5 * PageStats.bytes_per_page(bits)
        assert PageStats.bytes_per_page(bits) <= 40 * PAGE


def test_verify_rows_of_one_request_share_its_newest_page() -> None:
    """Rows of 63, 64 and 65 tokens: the second completes the page, the third must not undo it."""
    buffer = torch.zeros(3, 8448, dtype=torch.uint8)
    buffer[1:, :8192] = torch.randn(2, 8192).to(torch.float8_e4m3fn).view(torch.uint8)
    buffer[1:, 8192:] = torch.ones(2, 64).view(torch.uint8)
    engine = reference_engine([buffer])
    engine.end_step(torch.tensor([[1, 2]] * 3), torch.tensor([63, 64, 65], dtype=torch.int32))
    assert torch.equal(engine.stats.means[0][1], reference.page_means(buffer[1:2])[0].bfloat16())
