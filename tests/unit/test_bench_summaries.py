"""The summaries of blocks that the bench compares: what each is by definition."""

import pytest
import torch

from sglang_misa import reference
from sglang_misa.bench import summaries


@pytest.fixture
def case():
    return summaries.make("needles", 8 * summaries.BLOCK, 3, torch.Generator().manual_seed(0))


def test_mean_is_what_hisa_scores(case):
    q, gates, keys = case
    means = keys.unflatten(0, (-1, summaries.BLOCK)).mean(1)
    expected = reference.block_statistics(q[None], gates[None], means[None], torch.full((1, 3), 8), "mean").blocks
    torch.testing.assert_close(summaries.mean(q, gates, keys), expected[0], rtol=1e-4, atol=1e-3)


def test_box_bounds_every_token_where_gates_are_positive(case):
    q, gates, keys = case
    tokens = reference.index_scores(q[None], gates.abs()[None], keys[None])[0]
    best = tokens.unflatten(1, (-1, summaries.BLOCK)).amax(2)
    assert (summaries.box(q, gates.abs(), keys) >= best * (1 - 1e-5)).all()


def test_constant_blocks_look_the_same_to_every_summary(case):
    q, gates, keys = case
    flat = keys[:: summaries.BLOCK].repeat_interleave(summaries.BLOCK, 0)
    expected = summaries.mean(q, gates, flat)
    for size, _, score in summaries.SUMMARIES.values():
        found = score(q, gates, flat)
        torch.testing.assert_close(found[:, :: summaries.BLOCK // size], expected, rtol=1e-3, atol=1e-2)


def test_recall_is_complete_where_everything_is_kept(case):
    q, gates, keys = case
    few = keys.repeat(3, 1)[: summaries.TOPK + summaries.BLOCK]
    assert summaries.recall(q, gates, few, summaries.BLOCK, summaries.mean(q, gates, few)) == 1.0
