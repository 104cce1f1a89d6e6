"""Exact, deterministic selection of the k largest of a row that one program holds in registers (Triton helpers).

No sort and no shared-memory histogram: a search for the k-th largest that narrows its bracket from the middle and from
an interpolated guess at once, then one prefix sum that gives every winner its place, in the row's own order.

A row is `x` [N] and, behind it, `more` [M] with M dividing N, or None: 8192 + 128 elements are not padded to 16384.
It stays fp32: a comparison that yields 1.0 or 0.0 costs half of one that yields an integer.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))  # an element that is not there
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite fp32
MAX_ROW = 32768  # two counts of a row share one 32-bit word


@triton.jit
def ranked(score, there):
    """`score` where `there`, NOTHING elsewhere; NaN and -inf rank as the lowest finite number."""
    return tl.where(there, tl.where(score > LOWEST, score, LOWEST), NOTHING)


@triton.jit
def _order(x):
    """int32 that order like the fp32 numbers x."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The fp32 number of an `_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _fold(x, WIDTH: tl.constexpr):
    """`x` as [N / WIDTH, WIDTH]: a reduction over the first axis stays inside each thread if WIDTH is large."""
    return tl.reshape(x, [x.shape[0] // WIDTH, WIDTH])


@triton.jit
def _at_least(x, more, limit, WIDTH: tl.constexpr):
    """Elements of the row at or above `limit`, as fp32 partial counts [WIDTH]."""
    count = tl.sum(_fold(tl.where(x >= limit, 1.0, 0.0), WIDTH), 0)
    return count if more is None else count + tl.where(more >= limit, 1.0, 0.0)


@triton.jit
def _count_pair(x, more, p, q, WIDTH: tl.constexpr):
    """Elements of the row at or above p, plus 65536 times those at or above q."""
    both = _at_least(x, more, p, WIDTH) + _at_least(x, more, q, WIDTH) * 4096.0
    whole = (both + 8388608.0).to(
        tl.int32, bitcast=True
    ) & 0x7FFFFF  # 2^23 puts an integer into the mantissa's low bits
    return tl.sum(whole + (whole >> 12) * (65536 - 4096), 0)


@triton.jit
def kth_largest(x, more, n, k, WIDTH: tl.constexpr):
    """(threshold, room): the k largest are the elements above `threshold` and the first `room` of those equal to it.

    The row holds `n` elements that are not NOTHING; all of them are above the threshold when n <= k. The bracket
    [lo, hi] holds the k-th largest and at least halves in every round; it ends early once exactly k elements are at or
    above lo. N + M <= MAX_ROW, N < 2047 · WIDTH; WIDTH is M where there is `more`.
    """
    low = tl.min(_fold(tl.where(x == NOTHING, float("inf"), x), WIDTH), 0)
    high = tl.max(_fold(x, WIDTH), 0)
    if more is not None:
        low = tl.minimum(low, tl.where(more == NOTHING, float("inf"), more))
        high = tl.maximum(high, more)
    lo = _order(tl.where(n > k, tl.min(low, 0), NOTHING))
    hi = _order(tl.where(n > k, tl.max(high, 0), NOTHING))
    at = n  # elements at or above lo
    above = n * 0  # elements above hi
    while lo < hi:
        middle = (lo | hi) - ((lo ^ hi) >> 1)  # rounds up, cannot overflow
        span = (hi - lo).to(tl.uint32, bitcast=True)  # the difference is below 2^32: wrapping keeps it exact
        part = (at - k).to(tl.float32) / tl.maximum(at - above, 1).to(tl.float32)
        # clamped below 2^31: no float may overflow the integer, and the middle covers what is cut off
        step = tl.minimum(span.to(tl.float32) * part, 2147483520.0).to(tl.int32).to(tl.uint32, bitcast=True)
        guess = lo + tl.minimum(tl.maximum(step, 1), span).to(tl.int32, bitcast=True)
        p = tl.minimum(middle, guess)
        q = tl.maximum(middle, guess)
        both = _count_pair(x, more, _number(p), _number(q), WIDTH)
        at_p = both & 0xFFFF
        at_q = (both >> 16) & 0xFFFF
        is_q = at_q >= k
        is_p = at_p >= k
        above = tl.where(is_q, above, tl.where(is_p, at_q, at_p))
        hi = tl.where(is_q, hi, tl.where(is_p, q - 1, p - 1))
        at = tl.where(is_q, at_q, tl.where(is_p, at_p, at))
        lo = tl.where(is_q, q, tl.where(is_p, p, lo))
        hi = tl.where(at == k, lo, hi)
    return _number(lo), tl.where(at == k, k, k - above)  # with k at or above, all that equal it are in


@triton.jit
def wins_and_ties(x, threshold):
    """1 for an element above `threshold`, 65536 for one equal to it, 0 for others and for NOTHING."""
    ties = (x == threshold) & (x != NOTHING)
    return (x > threshold).to(tl.int32) + (ties.to(tl.int32) << 16)


@triton.jit
def places(pair, before, room):
    """(taken [N] bool, place [N] int32): every win and the first `room` ties; places follow the row's order.

    pair:   `wins_and_ties` of N elements
    before: the sum of `pair` over the row in front of the first of them
    """
    before += tl.cumsum(pair, 0) - pair
    ties_before = (before >> 16) & 0xFFFF
    taken = ((pair & 0xFFFF) > 0) | ((pair > 0xFFFF) & (ties_before < room))
    return taken, (before & 0xFFFF) + tl.minimum(ties_before, room)
