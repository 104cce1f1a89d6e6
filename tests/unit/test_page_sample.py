"""A sample has complete pages of the step's own requests alone: all if it can, else each as often as another."""

import random

import torch

from sglang_misa.kernels.layout import PAGE
from sglang_misa.page_sample import PageSampler

LENS = torch.tensor([3 * PAGE + 5, PAGE - 1, 7 * PAGE, 0, 2 * PAGE], dtype=torch.int32)
REQ_IDS = torch.tensor([4, 0, 2, 5, 1])
COMPLETE = (LENS // PAGE).tolist()
TABLE = torch.randperm(8 * 9, generator=torch.Generator().manual_seed(0)).reshape(8, 9).int() + 1  # pages
REQ_TO_TOKEN = (TABLE[..., None] * PAGE + torch.arange(PAGE)).reshape(8, -1).int()
PAGES = {(row, int(TABLE[REQ_IDS[row], i])) for row, complete in enumerate(COMPLETE) for i in range(complete)}


def drawn(sampler: PageSampler) -> list[tuple[int, int]]:
    sample = sampler.draw(REQ_TO_TOKEN, REQ_IDS, LENS)
    return list(zip(sample.rows[sample.pages >= 0].tolist(), sample.where_drawn().tolist(), strict=True))


def test_all_pages_once_where_there_are_no_more() -> None:
    for size in range(len(PAGES), 3 * len(PAGES)):
        sampler = PageSampler(size, random.Random(size))
        for _ in range(20):
            found = drawn(sampler)
            assert len(found) == len(PAGES)
            assert set(found) == PAGES


def test_each_page_as_often_as_another() -> None:
    draws, size = 4000, 5
    sampler, seen = PageSampler(size, random.Random(0)), dict.fromkeys(PAGES, 0)
    for _ in range(draws):
        found = drawn(sampler)
        assert len(set(found)) == len(found) == size
        for page in found:
            seen[page] += 1
    expected = draws * size / len(PAGES)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in seen.values()), seen


def test_one_seed_draws_alike() -> None:
    one, other, another = (PageSampler(4, random.Random(seed)) for seed in (7, 7, 8))
    assert [drawn(one) for _ in range(9)] == [drawn(other) for _ in range(9)] != [drawn(another) for _ in range(9)]


def test_a_step_of_one_request_has_its_pages() -> None:
    pages = PageSampler(20, random.Random(0)).draw(REQ_TO_TOKEN, REQ_IDS[2:3], LENS[2:3]).where_drawn()
    assert pages.tolist() == TABLE[REQ_IDS[2], : COMPLETE[2]].tolist()


def test_nothing_is_drawn_from_steps_without_complete_pages() -> None:
    sampler = PageSampler(4, random.Random(0))
    assert len(sampler.draw(REQ_TO_TOKEN, REQ_IDS[:0], LENS[:0]).where_drawn()) == 0
    assert len(sampler.draw(REQ_TO_TOKEN, REQ_IDS, LENS.clamp(max=PAGE - 1)).where_drawn()) == 0
