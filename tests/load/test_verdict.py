"""The sentence of an A/B over made-up blocks: what it must not say of two servers that did not do the same."""

from __future__ import annotations

import pytest
from load.helpers import record, unit

from sglang_misa.bench.load.plan import Arm, Cell, Plan
from sglang_misa.bench.load.records import Record, Unit
from sglang_misa.bench.load.settings import Load, Workload
from sglang_misa.bench.load.verdict import Outcome, judge

CELL = Cell.of(Workload(), Load())


def judged(primary: str, a: list[Record], b: list[Record]) -> Outcome:
    """The outcome of six blocks, of which both arms have these requests in each."""
    arms = (Arm(name="A", server="http://127.0.0.1:1"), Arm(name="B", server="http://127.0.0.1:2"))
    plan = Plan(arms=arms, cells=(CELL,), blocks=6, primary=primary)
    blocks = [(name, i, records) for i in range(6) for name, records in (("A", a), ("B", b))]
    units = [unit(name, i, records, float(at)) for at, (name, i, records) in enumerate(blocks)]
    return judge(plan, [each.model_copy(update={"cell": CELL.digest()}) for each in units])


def read(records: list[Record], prompt: int) -> list[Record]:
    return [each.model_copy(update={"prompt_tokens": prompt}) for each in records]


@pytest.mark.parametrize("primary", ["e2e_p50", "output_throughput", "request_throughput"])
def test_a_server_that_gives_half_an_answer_is_not_faster(primary):
    whole, half = [record(i, 0.1) for i in range(4)], [record(i, 0.1, tokens=6) for i in range(4)]
    outcome = judged(primary, whole, half)
    assert outcome.verdict == "No verdict: at 1k A gave answers of 11.0 tokens in the mean, B of 6.0."
    assert "faster" not in judged("ttft_p50", whole, half).verdict


def test_a_server_that_reads_half_a_prompt_is_not_faster():
    whole, half = [record(i, 0.2) for i in range(4)], [record(i, 0.1) for i in range(4)]
    outcome = judged("ttft_p50", read(whole, 100), read(half, 50))
    assert outcome.verdict == "No verdict: at 1k A read prompts of 100.0 tokens in the mean, B of 50.0."
    assert judged("ttft_p50", read(whole, 100), read(half, 100)).verdict.startswith("B is 2.00× as fast as A")


def test_a_server_that_had_the_prompts_in_its_cache_is_not_faster():
    """As one that both arms name, where the cache could not be emptied between them."""
    cold, warm = [record(i, 0.2) for i in range(4)], [record(i, 0.01) for i in range(4)]
    found = [each.model_copy(update={"prompt_tokens": 100, "cached_tokens": 90}) for each in warm]
    missed = [each.model_copy(update={"prompt_tokens": 100, "cached_tokens": 0}) for each in cold]
    verdict = judged("ttft_p50", missed, found).verdict
    assert verdict == "No verdict: at 1k B found 90.0% more of its prompt tokens in the cache than was planned."
    planned = [each.model_copy(update={"cached_wanted": 90}) for each in found]
    wanting = [each.model_copy(update={"cached_wanted": 90}) for each in missed]
    assert judged("ttft_p50", wanting, planned).verdict.startswith("B is 20.00× as fast as A")


def test_answers_beyond_what_was_asked_are_counted():
    asked = record(0, 0.1)
    lying: Unit = unit("A", 0, [asked.model_copy(update={"output_tokens": 900}), record(1, 0.1)], 0.0)
    assert (lying.figures["long_outputs"], lying.figures["short_outputs"]) == (1, 0)
