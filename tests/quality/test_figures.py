"""Figures of the quality bench, from answers whose right figures are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sglang_misa.bench.load.plan import Arm
from sglang_misa.bench.load.settings import LoadError, Protocol
from sglang_misa.bench.quality import asking, measures, sections
from sglang_misa.bench.quality.asking import Answer
from sglang_misa.bench.quality.collect import Asked
from sglang_misa.bench.quality.questions import Question

ARMS = Arm(name="stock", server="http://a"), Arm(name="other", server="http://b")


def said(text: str = "", ids: Sequence[int] = (), top: Sequence[dict[str, float]] = (), seconds: float = 1.0) -> Answer:
    return Answer(arm="", question="", text=text, ids=tuple(ids), top=tuple(top), seconds=seconds)


def test_tokens_before_a_difference_are_counted_over_all_answers() -> None:
    """A long answer of other tokens is not outweighed by three of one token."""
    same, long = said(ids=[7]), (said(ids=range(97)), said(ids=range(1, 98)))
    asked = [Asked(Question("q", (1,), 97), [same, same])] * 3 + [Asked(Question("q", (1,), 97), [*long])]
    found = sections.agreement(asked, ARMS)
    assert found.verdict.startswith("other: 3 of 4 answers are stock's, 3.0% of the tokens come before a difference")
    assert [row["equal"] for row in found.rows] == [1, 1, 1, 0]


def test_the_mean_divergence_is_that_of_the_tokens() -> None:
    p, q = {"1": math.log(0.9)}, {"1": math.log(0.6)}
    one = Asked(Question("q", (1,), 9), [said(ids=[1], top=[p]), said(ids=[1], top=[p])])
    nine = Asked(Question("q", (1,), 9), [said(ids=[1] * 9, top=[p] * 9), said(ids=[1] * 9, top=[q] * 9)])
    wanted = 0.9 * measures.divergence(p, q)
    assert f"mean KL {wanted:.4g} nats" in sections.agreement([one, nine], ARMS).verdict


def test_answers_without_ids_agree_by_characters() -> None:
    """Also where one server alone tells ids: ids and characters have no place in common."""
    for first, second in ((said("abcd"), said("abXd")), (said("abcd", [1, 2]), said("abXd"))):
        same = measures.agreement(first, second)
        assert (same.equal, same.differs, same.unit) == (0.5, 2, "characters")
        told = sections.agreement([Asked(Question("q", (1,), 4), [first, second])], ARMS).verdict
        assert "50.0% of the characters come before" in told
    assert measures.agreement(said(), said())[:2] == (1.0, None), "two answers of nothing are equal"


def test_a_token_without_log_probabilities_shifts_no_other() -> None:
    row = [[math.log(0.9), 1, None]]
    raw = {"text": "x", "output_ids": [1, 2, 3], "meta_info": {"output_top_logprobs": [row, None, row]}}
    top = asking.read(raw, Protocol(), "stock", Question("q", (1,), 3), 0.0).top
    assert [len(each) for each in top] == [1, 0, 1]
    of_text = {"choices": [{"text": "x", "logprobs": {"top_logprobs": [None, {"a": -0.1}]}}]}
    top = asking.read(of_text, Protocol(api="completions"), "stock", Question("q", (1,), 3), 0.0).top
    assert [len(each) for each in top] == [0, 1]
    raw["meta_info"]["output_top_logprobs"] = [[[math.nan, 1, None]]]
    with pytest.raises(LoadError, match="finite number"):
        asking.read(raw, Protocol(), "stock", Question("q", (1,), 3), 0.0)


def test_a_row_that_sees_no_more_than_is_selected_has_no_recall() -> None:
    """The row at position topk - 1 sees topk tokens, all of which every selection takes."""
    first = np.array([[[0, -1]], [[0, 1]], [[1, 2]], [[-1, -1]]], np.int32)  # the last from a cache
    share = measures.recall(first, np.array([[[0, -1]], [[0, 1]], [[0, 2]], [[-1, -1]]], np.int32))
    np.testing.assert_equal(share[:, 0], [np.nan, np.nan, 0.5, np.nan])
