"""Requests at random through the hooks: statistics and selections are those of the bytes, whatever came before."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from pool_walks import Request, Walk
from torch import Tensor

from sglang_misa import versions
from sglang_misa.config import SelectionPolicy
from sglang_misa.kernels.layout import PAGE
from sglang_misa.patches import forward_batch, register

SEEDS, EVENTS = range(8), 60


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    register.apply(versions.installed())
    monkeypatch.setattr(forward_batch, "_prompt_lens", ())
    yield monkeypatch
    monkeypatch.undo()
    register.undo()


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_and_selections_are_those_of_the_bytes(seed: int, hooks) -> None:
    Walk(seed, hooks, on_kernels=False).run(EVENTS)


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_statistics_by_kernels_are_those_of_the_bytes(seed: int, hooks) -> None:
    Walk(seed, hooks, on_kernels=True).run(EVENTS // 2)


@pytest.mark.parametrize("on_kernels", [False, True])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_calls_behind_a_token_that_no_step_has_seen(seed: int, on_kernels: bool, hooks) -> None:
    """A session that drafts goes on so: a page that this token completed is the next call's, whoever selects in it."""
    walk = Walk(seed, hooks, on_kernels=on_kernels)
    walk.topk = (walk.topk, 2 * PAGE)[seed % 2]  # of which all tokens are visible to the call
    root = walk.radix.root_node
    walk.radix.inc_lock_ref(root)
    request = Request([1] * (PAGE - 1), root, torch.empty(0, dtype=torch.int64), 0)
    walk.live.append(request)
    for _ in range(2):
        while not request.decodes:
            walk.prefill()
        assert walk.grow(request, 1)
        walk.store(request, 1)
        request.prompt = [*request.tokens, 1, 2, 3]
        while not request.decodes:
            walk.prefill()
        walk.check()
        request.prompt = [*request.tokens, *[1] * (2 * PAGE - 1 - len(request.tokens))]


class Told(Walk):
    """The same walk without selections, and how often it came by what these tests are for."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch):
        super().__init__(seed, monkeypatch, on_kernels=False)
        self.reached: Counter[str] = Counter()
        for name in ("extend", "decode"):
            monkeypatch.setattr(self.engine, name, lambda *_: None)

    def check(self) -> None:
        pass

    def arrive(self) -> None:
        before = len(self.live)
        super().arrive()
        self.reached["cached prefixes"] += len(self.live) > before and self.live[-1].kept > 0

    def grow(self, request: Request, count: int) -> bool:
        free, known = self.allocator.available_size(), len(request.slots)
        grown = super().grow(request, count)
        self.reached["evictions"] += free - self.allocator.available_size() < len(request.slots) - known
        self.reached["refusals for want of room"] += not grown
        return grown

    def extend(self, requests: list[Request], counts: list[int], slots: Tensor) -> None:
        self.reached["prefill calls of requests that share pages"] += _share(requests)
        super().extend(requests, counts, slots)

    def step(self, requests: list[Request], drafts: int) -> None:
        self.reached["steps of requests that share pages"] += _share(requests)
        self.reached["steps that verify drafts"] += drafts > 1
        self.reached["steps that complete a page"] += any(len(each.tokens) % PAGE < drafts for each in requests)
        super().step(requests, drafts)

    def check_rows(self, layer: int, policies: list[SelectionPolicy], requests: object, lens: list[int], *_: Tensor):
        for policy, length in zip(policies, lens, strict=True):
            self.reached["rows that choose among blocks"] += length // policy.block_size > (policy.blocks or length)
            self.reached["rows that choose candidates"] += length > (policy.candidates or length)
            self.reached["rows that choose heads"] += policy.heads is not None and length > self.topk
            self.reached["rows of stock that choose"] += not policy.active and length > self.topk


def _share(requests: list[Request]) -> bool:
    pages = [page for request in requests for page in (request.slots[::PAGE] // PAGE).tolist()]
    return len(pages) > len(set(pages))


def test_walks_come_by_what_can_go_wrong(hooks) -> None:
    reached: Counter[str] = Counter()
    for seed in SEEDS:
        with hooks.context() as own:
            walk = Told(seed, own)
            walk.run(EVENTS)
        reached.update(walk.reached)
    assert len(reached) == 11
    assert min(reached.values()) >= 8, reached
