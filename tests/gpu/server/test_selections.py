"""A real server with the plugin against stock, selection by selection, through HTTP.

One server an arm, on a seeded random model of DeepSeek-V3.2 shapes (4 layers), each asked the same prompts with
`return_indexer_topk`. Random weights say nothing about recall on a real model.
"""

from __future__ import annotations

import pytest
from gpu.server.servers import EQUAL, SKETCHED, common_prefix, overlaps
from gpu.server.setups import ARMS, NEW_TOKENS, SETUPS, Served

from sglang_misa.kernels.layout import PAGE

EVERY = [(setup, arm) for setup in SETUPS for arm in SETUPS[setup].arms]
OURS = [(setup, arm) for setup, arm in EVERY if arm != "stock"]
# Arm, the arm whose sets on layer 0 it must select beneath an exact top-k, and in which phases. Kernels and reference
# add in different orders, so they may part where scores nearly tie. A block that goes either way is some 1/64 of one
# row's set, and EQUAL bears it in one row of 16. A head that goes either way changes many tokens of its row, so prefill
# by routed heads is left to test_topk_routed.
MUST_EQUAL = {
    ("all-heads", "stock"): ("prefill", "decode"),
    ("misa-hisa", "misa-hisa-torch"): ("decode",),
    ("hisa", "hisa-torch"): ("prefill", "decode"),
    ("exact", "stock"): ("prefill",),
    ("fast", "fast-torch"): ("decode",),
    ("faithful", "faithful-torch"): ("decode",),
}
PAIRS = [(setup, pair) for setup in SETUPS for pair in MUST_EQUAL if {*pair} <= {*SETUPS[setup].arms}]


def cases(names: str, values: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("served", names), values, indirect=["served"], scope="session", ids=str)


@cases("arm", OURS)
def test_the_policy_ran_in_prefill(served: Served, arm: str) -> None:
    status = served.status[arm]
    assert status.get("enabled"), f"MISA is not live: {status}"
    assert status["calls"]["prefill"].get(status["policy"]["prefill"]), f"got calls {status['calls']['prefill']}"


def gate(arm: str) -> int:
    """Keys under which a decode step of the arm is stock's; 0 without one."""
    return (ARMS[arm] or {}).get("decode", {}).get("min_len", 0)


@cases("arm", [(setup, arm) for setup, arm in OURS if gate(arm)])
def test_lone_decode_steps_ran_on_their_side_of_the_gate(served: Served, arm: str) -> None:
    for length, steps in zip(served.setup.lengths, served.steps[arm], strict=True):
        wanted = "dsa" if length + NEW_TOKENS < gate(arm) else served.status[arm]["policy"]["decode"]
        assert steps.get(wanted, 0) >= NEW_TOKENS - 1, f"{length} tokens: {steps}"
        assert not any(n for path, n in steps.items() if path != wanted), f"{length} tokens: {steps}"


@cases("arm", EVERY)
def test_a_radix_hit_selects_the_same_sets(served: Served, arm: str) -> None:
    rows = slice(1 - NEW_TOKENS - PAGE, 1 - NEW_TOKENS)  # prompt rows: the last page's are new again
    again = served.again[arm]
    assert again.cached > 0
    found = overlaps(served.answers[arm][-1].selected[rows], again.selected[rows])
    assert found[0] >= EQUAL, f"overlap by layer: {found}"


@cases("arm", EVERY)
def test_requests_that_share_an_extend_call_select_what_they_select_alone(served: Served, arm: str) -> None:
    assert not served.shared[arm]


@cases("pair", PAIRS)
def test_an_arm_selects_what_its_twin_selects(served: Served, pair: tuple[str, str]) -> None:
    ours, theirs = (served.answers[arm] for arm in pair)
    for length, a, b in zip(served.setup.lengths, ours, theirs, strict=True):
        decode_rows = NEW_TOKENS - 1  # row i reads output i: comparable while the outputs agree
        same, first = min(common_prefix(a.output_ids, b.output_ids), decode_rows), len(b.selected) - decode_rows
        rows_of = {"prefill": slice(0, first), "decode": slice(first, first + same)}
        for phase in MUST_EQUAL[pair]:
            if phase == "prefill" or same:  # none where the outputs part at once
                rows = rows_of[phase]
                found = overlaps(b.selected[rows], a.selected[rows])
                enough = SKETCHED if (ARMS[pair[0]] or {}).get(phase, {}).get("sketch") else EQUAL
                assert found[0] >= enough, f"{length} tokens, {phase}: overlap by layer {found}"
