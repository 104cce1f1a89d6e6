"""Exact, deterministic selection of the k largest of a row that one program holds in registers (Triton helpers).

No sort and no shared-memory histogram: a search for the k-th largest that narrows its bracket from the middle and from
an interpolated guess at once, then one prefix sum that gives every winner its place, in the row's own order.

The row stays fp32: a comparison that yields 1.0 or 0.0 costs half of one that yields an integer.
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
def _at_least(x, limit, WIDTH: tl.constexpr):
    """Elements at or above `limit`, as fp32 partial counts [WIDTH]: inside each thread if it loads WIDTH / threads."""
    return tl.sum(tl.reshape(tl.where(x >= limit, 1.0, 0.0), [x.shape[0] // WIDTH, WIDTH]), 0)


@triton.jit
def _count_pair(x, p, q, WIDTH: tl.constexpr):
    """Elements at or above p, plus 65536 times those at or above q."""
    both = _at_least(x, p, WIDTH) + _at_least(x, q, WIDTH) * 4096.0
    # added to 2^23, an integer stands in the mantissa's low bits: cheaper than a conversion
    whole = (both + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    return tl.sum(whole + (whole >> 12) * (65536 - 4096), 0)


@triton.jit
def kth_largest(x, n, k, WIDTH: tl.constexpr):
    """(threshold, room): the k largest are the elements above `threshold` and the first `room` of those equal to it.

    The row holds `n` elements that are not NOTHING; all of them are above the threshold when n <= k. The bracket
    [lo, hi] holds the k-th largest and at least halves in every round; it ends early once exactly k elements are at or
    above lo. N <= MAX_ROW, N < 2047 · WIDTH, WIDTH divides N.
    """
    lo = _order(tl.where(n > k, tl.min(tl.where(x == NOTHING, float("inf"), x), 0), NOTHING))
    hi = _order(tl.where(n > k, tl.max(x, 0), NOTHING))
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
        both = _count_pair(x, _number(p), _number(q), WIDTH)
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
def places(pair, room):
    """(taken [N] bool, place [N] int32) of `wins_and_ties`: every win and the first `room` ties, in the row's order."""
    before = tl.cumsum(pair, 0) - pair
    ties_before = (before >> 16) & 0xFFFF
    taken = ((pair & 0xFFFF) > 0) | ((pair > 0xFFFF) & (ties_before < room))
    return taken, (before & 0xFFFF) + tl.minimum(ties_before, room)
