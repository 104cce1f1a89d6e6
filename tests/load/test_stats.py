"""Percentiles, intervals, ratios and their corrections: each against an independent truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load.helpers import record, unit
from scipy.special import ndtri

from sglang_misa.bench.load.plan import Arm, Plan
from sglang_misa.bench.load.simulate import Scene, shares
from sglang_misa.bench.load.stats import block_ratio, geometric_mean, holm, percentile, percentile_interval, wilson
from sglang_misa.bench.load.verdict import pool


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 5)), min_size=1, max_size=40).filter(
        lambda rows: sum(w for _, w in rows) > 0
    ),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(rows, q):
    values, weights = zip(*rows, strict=True)
    truth = np.percentile(np.repeat(values, weights), q)
    assert percentile(values, q, weights) == pytest.approx(truth, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=12), st.floats(0.1, 10.0))
def test_a_ratio_turns_over_with_its_arms_and_its_scale(logs, factor):
    b_first = [i % 2 == 1 for i in range(len(logs))]
    there = block_ratio([1.0] * len(logs), logs, b_first, 0.95)
    back = block_ratio(logs, [1.0] * len(logs), b_first, 0.95)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high)
    assert there.p == pytest.approx(back.p, abs=1e-9)
    scaled = block_ratio([factor] * len(logs), [factor * x for x in logs], b_first, 0.95)
    assert scaled.value == pytest.approx(there.value)


def test_a_steady_drift_is_no_difference():
    """Every measurement is 3 % slower than the one before: A B B A and the order's own term take it out exactly."""
    clock = [1.03**i for i in range(10)]
    pairs = [(clock[2 * i], clock[2 * i + 1])[:: 1 if i % 2 == 0 else -1] for i in range(5)]
    estimate = block_ratio([p[0] for p in pairs], [p[1] for p in pairs], [i % 2 == 1 for i in range(5)], 0.95)
    assert estimate.value == pytest.approx(1.0)
    always_first = block_ratio(clock[::2], clock[1::2], [False] * 5, 0.95)
    assert always_first.value == pytest.approx(1.03)


def test_intervals_are_students():
    from scipy import stats

    rng = np.random.default_rng(3)
    a, b = rng.lognormal(size=(2, 7))
    truth = stats.ttest_1samp(np.log(b / a), 0.0)
    estimate = block_ratio(a, b, [False] * 7, 0.9)
    assert estimate.p == pytest.approx(truth.pvalue)
    assert np.log([estimate.low, estimate.high]) == pytest.approx(tuple(truth.confidence_interval(0.9)))
    one = geometric_mean([2.0, 2.0, 2.0], 0.95)
    assert one == (pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 0.0)


def test_the_interval_of_a_tail_is_that_of_the_tail_shown():
    """A block of 16 has no p99 of its own: its largest value is lower than that of 160."""
    plan = Plan(arms=(Arm(name="a", server="http://127.0.0.1:1"),), cells=())
    rng = np.random.default_rng(0)
    blocks = [[record(i, t) for i, t in enumerate(rng.lognormal(0, 0.1, 16).tolist())] for _ in range(10)]
    arm = pool([unit("a", i, each, float(i)) for i, each in enumerate(blocks)], plan)
    assert {"ttft_p50", "ttft_p90", "ttft_p99"} <= arm.figures.keys()
    assert "ttft_p99" not in arm.intervals
    for name in ("ttft_p50", "ttft_p90"):
        low, high = arm.intervals[name]
        assert low < arm.figures[name] < high


@pytest.mark.parametrize(("blocks", "size", "q"), [(10, 16, 90), (20, 16, 90), (20, 100, 99)])
@pytest.mark.parametrize("unlike", [0.0, 0.05])
def test_intervals_of_percentiles_hold_the_truth(blocks, size, q, unlike):
    """Nominal 95 %, of requests that vary by 10 % in blocks that vary by `unlike`."""
    rng = np.random.default_rng(1)
    truth = np.exp(np.hypot(0.1, unlike) * ndtri(q / 100))
    held = []
    for _ in range(100):
        values = np.exp(rng.normal(0, unlike, (blocks, 1)) + rng.normal(0, 0.1, (blocks, size)))
        if (found := percentile_interval([(row, np.ones(size)) for row in values], q, 0.95)) is not None:
            held.append(found[0] <= truth <= found[1])
    assert len(held) > 75
    assert np.mean(held) > 0.86


def test_what_percentile_has_an_interval():
    block = (np.arange(1.0, 101.0), np.ones(100))
    assert percentile_interval([block], 50, 0.95) is None
    assert percentile_interval([([], []), ([], [])], 50, 0.95) is None
    assert percentile_interval([block, block, block], 100, 0.95) is None
    assert percentile_interval([block, block, block, block], 99, 0.95) is None  # of 400 values, 1 lies beyond
    assert percentile_interval([block] * 9, 50, 0.95) == (47, 54)  # binomial: 50 ± 2.3 · 1.67


@pytest.mark.parametrize(
    "scene",
    [
        Scene("noise of requests and blocks"),
        Scene("drift", request=0.02, block=0.005, drift=0.02, blocks=5),
        Scene("outliers", outliers=0.03),
        Scene("a grid", cells=4),
        Scene("sequential", blocks=8, until_ci=0.03),
    ],
    ids=lambda scene: scene.name,
)
def test_equal_servers_are_seldom_called_different(scene):
    """Nominal 5 %; of 200 runs, 23 or more are called so with a chance of 1 in 10,000."""
    called, held = shares(scene, 200)
    assert max(called) < 0.115
    assert scene.cells > 1 or min(held) > 0.885


def test_a_real_difference_is_found():
    """10 % under 5 % of request and 2 % of block noise, in six blocks."""
    called, held = shares(Scene("slower", slower=1.1), 100)
    assert called[0] > 0.9
    assert held[0] > 0.85


def test_holm_and_wilson_are_the_published_ones():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.001]) == pytest.approx([0.9, 0.002])
    assert wilson(8, 10, 0.95) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0, 0.95) == (0.0, 1.0)
    assert wilson(10, 10, 0.95)[1] == 1.0
