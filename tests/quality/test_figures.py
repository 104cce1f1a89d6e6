"""Figures of the quality bench, from answers whose right figures are known."""

from __future__ import annotations

import base64
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


def needles(*found: int, of: int) -> sections.Section:
    """The section of arms that find so many of as many needles, the first ones."""
    marks = [[place < one for place in range(of)] for one in found]
    asked = [
        Asked(Question("q", (n,), 4, ("yes",), length=4096), [said("yes" if mark[n] else "no") for mark in marks])
        for n in range(of)
    ]
    return sections.needles(asked, [Arm(name=name, server="http://a") for name in "abc"[: len(found)]], {}, "")


@pytest.mark.parametrize(
    ("found", "of", "tone", "told"),
    [
        ((9, 9), 9, "good", "b: no significant loss (sign test: p = 1)."),
        ((9, 4), 9, "", "b: no significant loss (sign test: p = 0.0625)."),  # half of them
        ((9, 3), 9, "bad", "b: a significant loss (sign test: p = 0.0312)."),
        ((5, 0), 5, "", "p = 0.0625); not even all 5 would be one: ask more."),
        ((2, 2), 2, "", "p = 1); not even all 2 would be one: ask more."),
        ((9, 9, 8), 9, "", "c: no significant loss (sign test: p = 1)."),
        ((9, 3, 9), 9, "bad", "c: no significant loss (sign test: p = 1)."),
        ((6, 9), 9, "good", "b: no significant loss (sign test: p = 0.25)."),
        ((9,), 9, "", "a found 9 of 9 needles"),
    ],
)
def test_few_needles_are_no_good_news(found: tuple[int, ...], of: int, tone: str, told: str) -> None:
    section = needles(*found, of=of)
    assert section.tone == tone
    assert told in section.verdict


@pytest.mark.parametrize(
    ("measure", "answers", "text", "score"),
    [
        ("found", ("北京",), "答案是北京。", 1),
        ("found", ("東京",), "答案是北京。", 0),
        ("f1", ("北京市",), "北京", 0.8),
        ("found", ("กรุงเทพ",), "คำตอบคือกรุงเทพ", 1),
        ("found", ("7b", "GLM 5"), "It is glm-5, 7B.", 1),
        ("found", ("fox",), "foxes", 0),
        ("found", ("%", "$"), "9 %", 0.5),
        ("found", ("%",), "", 0),
    ],
)
def test_words_are_those_of_the_answers_script(measure: str, answers: tuple[str, ...], text: str, score: float) -> None:
    assert Question("q", (1,), 9, answers, measure).score(text) == pytest.approx(score)


def test_a_mean_score_is_that_of_the_tasks() -> None:
    """However many questions a task has; the page has a line for each."""
    asked = [
        Asked(Question(f"{task} · {n}", (1,), 9, ("yes",), task=task), [said(first), said("no")])
        for task, first, count in (("easy", "yes", 9), ("hard", "no", 1))
        for n in range(count)
    ]
    found = sections.tasks(asked, ARMS)
    assert found.verdict == "Mean score over 2 tasks of 10 questions: stock 0.500 · other 0.000."
    assert found.table[1] == [["easy", "9", "1.000", "0.000"], ["hard", "1", "0.000", "0.000"]]
    assert len(found.rows) == 10


def test_several_audits_are_one_by_their_rows() -> None:
    one = {"prefill": {"0": {"recall": 0.9, "p10": 0.8, "rows": 30}}, "decode": {}}
    other = {"prefill": {"0": {"recall": 0.5, "p10": 0.4, "rows": 10}, "1": {"recall": 1.0, "p10": 1.0, "rows": 2}}}
    found = sections.audited({"fast": measures.pooled([one, {}, other])})
    told = [(row["phase"], row["layer"], row["recall"], row["p10"], row["rows"]) for row in found.rows]
    assert told == [("prefill", 0, pytest.approx(0.8), 0.4, 40), ("prefill", 1, 1.0, 1.0, 2)]


@pytest.mark.parametrize("topk", [2, 4, 8])
def test_positions_of_another_top_k_are_refused(topk: int) -> None:
    """Of two layers and a top-k of 4: half of it would be four layers, and twice of it one."""
    rows = np.arange(6)[:, None, None]
    chosen = np.broadcast_to(np.where(np.arange(4) <= rows, np.arange(4), -1), (6, 2, 4)).astype(np.int32)
    meta = {"prompt_tokens": 5, "completion_tokens": 2, "indexer_topk": base64.b64encode(chosen.tobytes()).decode()}
    if topk == 4:
        assert asking.selected({"meta_info": meta}, topk, "stock").shape == (6, 2, 4)
        return
    with pytest.raises(LoadError, match="set --index-topk to the model's"):
        asking.selected({"meta_info": meta}, topk, "stock")


def test_slots_of_a_pool_are_no_positions() -> None:
    """What SGLang tells of decode with its fused top-k: two servers' slots have nothing in common."""
    slots = np.array([[[0, -1]], [[0, 1]], [[65, 66]]], np.int32)
    coded = base64.b64encode(slots.tobytes()).decode()
    meta = {"prompt_tokens": 2, "completion_tokens": 2, "indexer_topk": coded}
    with pytest.raises(LoadError, match="got 66 in row 2; start SGLang with SGLANG_DSA_FUSE_TOPK=0"):
        asking.selected({"meta_info": meta}, 2, "stock")
