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
    min_tokens=st.integers(1, 4 * MOST),
)


@given(lengths, st.integers(1, 4), gates)
def test_rows_and_tokens_past_the_gate_open_it(lengths: list[int], width: int, policy: SelectionPolicy) -> None:
    past = [max(length - policy.min_len, 0) for length in lengths for _ in range(width)]
    reason = Step(lengths, width).short_for(policy)
    assert (reason is None) == (len(past) >= policy.min_rows and sum(past) >= policy.min_tokens)
    assert (reason == "few-rows") == (len(past) < policy.min_rows)
    if reason == "under-min-len":
        assert not any(past)


@given(lengths, st.integers(0, MOST))
def test_one_token_is_the_longest_requests(lengths: list[int], min_len: int) -> None:
    opens = Step(lengths).short_for(SelectionPolicy(heads=8, min_len=min_len, min_tokens=1)) is None
    assert opens == (max(lengths, default=0) > min_len)


@given(lengths, st.integers(1, 8), st.integers(1, MOST), st.integers(1, 4 * MOST))
def test_padding_adds_no_tokens(lengths: list[int], padding: int, min_len: int, min_tokens: int) -> None:
    policy = SelectionPolicy(heads=8, min_len=min_len, min_tokens=min_tokens)
    padded, own = Step([*lengths, *[1] * padding]), Step([*lengths, 0])  # which has a row too
    assert padded.short_for(policy) == own.short_for(policy)
