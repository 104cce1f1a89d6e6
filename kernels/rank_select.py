"""Exact, deterministic selection of the k largest of a row that one program holds in registers (Triton helpers).

No sort and no shared-memory histogram: a search for the k-th largest key that narrows its bracket from the middle and
from an interpolated guess at once, then one prefix sum that gives every winner its place, in the row's own order.

A row is `key` [N] and, behind it, `more` [M] with M dividing N, or None: 8192 + 128 elements are not padded to 16384.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**31))  # below every key: an element that is not there
CERTAIN = tl.constexpr(2**31 - 1)  # above every key: an element that is always taken
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32
MAX_ROW = 32768  # two counts of a row share one 32-bit word


@triton.jit
def order_key(x):
    """int32 keys that order like the fp32 numbers `x`; -0 equals +0, NaN and -inf equal the lowest finite number."""
    bits = (tl.where(x > LOWEST, x, LOWEST) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _fold(key, more):
    """`key` as [N / M, M]: reduced over the first axis it has the shape of `more`, inside each thread if M is large."""
    return tl.reshape(key, [key.shape[0] // more.shape[0], more.shape[0]])


@triton.jit
def _count_pair(key, more, p, q):
    """Keys at or above p, plus 65536 times those at or above q."""
    both = (key >= p).to(tl.int32) + ((key >= q).to(tl.int32) << 16)
    if more is not None:
        both = tl.sum(_fold(both, more), 0) + (more >= p).to(tl.int32) + ((more >= q).to(tl.int32) << 16)
    return tl.sum(both, 0)


@triton.jit
def kth_largest(key, more, n, k):
    """(threshold, room): the k largest are the keys above `threshold` and the first `room` of those equal to it.

    The row holds `n` keys that are not NOTHING; all of them are above the threshold when n <= k. The bracket [lo, hi]
    holds the k-th largest and at least halves in every round; it ends early once exactly k keys are at or above lo.
    N + M <= MAX_ROW.
    """
    low = tl.where(key == NOTHING, CERTAIN, key)
    high = key
    if more is not None:
        low = tl.minimum(tl.min(_fold(low, more), 0), tl.where(more == NOTHING, CERTAIN, more))
        high = tl.maximum(tl.max(_fold(high, more), 0), more)
    lo = tl.where(n > k, tl.min(low, 0), NOTHING)
    hi = tl.where(n > k, tl.max(high, 0), NOTHING)
    at = n  # keys at or above lo
    above = n * 0  # keys above hi
    while lo < hi:
        middle = (lo | hi) - ((lo ^ hi) >> 1)  # rounds up, cannot overflow
        span = (hi - lo).to(tl.uint32, bitcast=True)  # the difference is below 2^32: wrapping keeps it exact
        part = (at - k).to(tl.float32) / tl.maximum(at - above, 1).to(tl.float32)
        # clamped below 2^31: no float may overflow the integer, and the middle covers what is cut off
        step = tl.minimum(span.to(tl.float32) * part, 2147483520.0).to(tl.int32).to(tl.uint32, bitcast=True)
        guess = lo + tl.minimum(tl.maximum(step, 1), span).to(tl.int32, bitcast=True)
        p = tl.minimum(middle, guess)
        q = tl.maximum(middle, guess)
        both = _count_pair(key, more, p, q)
        at_p = both & 0xFFFF
        at_q = (both >> 16) & 0xFFFF
        is_q = at_q >= k
        is_p = at_p >= k
        above = tl.where(is_q, above, tl.where(is_p, at_q, at_p))
        hi = tl.where(is_q, hi, tl.where(is_p, q - 1, p - 1))
        at = tl.where(is_q, at_q, tl.where(is_p, at_p, at))
        lo = tl.where(is_q, q, tl.where(is_p, p, lo))
        hi = tl.where(at == k, lo, hi)
    exact = (at == k) & (n > k)
    return tl.where(exact, lo - 1, lo), tl.where(exact, 0, k - above)


@triton.jit
def wins_and_ties(key, threshold):
    """1 for a key above `threshold`, 65536 for one equal to it, 0 for others and for NOTHING."""
    ties = (key == threshold) & (key != NOTHING)
    return (key > threshold).to(tl.int32) + (ties.to(tl.int32) << 16)


@triton.jit
def places(pair, before, room):
    """(taken [N] bool, place [N] int32): every win and the first `room` ties; places follow the row's order.

    pair:   `wins_and_ties` of N keys
    before: the sum of `pair` over the row in front of the first of them
    """
    before += tl.cumsum(pair, 0) - pair
    ties_before = (before >> 16) & 0xFFFF
    taken = ((pair & 0xFFFF) > 0) | ((pair > 0xFFFF) & (ties_before < room))
    return taken, (before & 0xFFFF) + tl.minimum(ties_before, room)
