"""The gate of a decode step: which steps stock DSA keeps, and why."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_misa.decode_gate import Step
from sglang_misa.policy import SelectionPolicy

MOST = 1 << 12
lengths = st.lists(st.integers(0, MOST), max_size=12)
gates = st.builds(
    SelectionPolicy,
    heads=st.just(8),
    min_len=st.integers(0, MOST),
    min_rows=st.integers(1, 16),
    min_tokens=st.integers(0, 4 * MOST),
)


@given(lengths, st.integers(1, 4), gates)
def test_rows_and_tokens_beyond_the_gate_open_it(lengths: list[int], width: int, policy: SelectionPolicy) -> None:
    rows = [length for length in lengths for _ in range(width)]
    beyond = sum(length - policy.min_len for length in rows if length > 1)
    wanted = None
    if len(rows) < policy.min_rows:
        wanted = "few-rows"
    elif max(rows, default=0) <= policy.min_len:
        wanted = "under-min-len"
    elif policy.min_tokens and beyond < policy.min_tokens:
        wanted = "few-tokens"
    assert Step(lengths, width).why_under_gate(policy) == wanted


@given(lengths, st.integers(1, 8), gates)
def test_padding_adds_and_takes_no_tokens(lengths: list[int], padding: int, policy: SelectionPolicy) -> None:
    if policy.min_len and len(lengths) >= policy.min_rows:
        assert Step([*lengths, *[1] * padding]).why_under_gate(policy) == Step(lengths).why_under_gate(policy)
