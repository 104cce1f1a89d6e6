"""Exact, deterministic selection of the k largest of a row that one program holds in registers (Triton helpers).

No sort and no shared-memory histogram: a search for the k-th largest key that narrows its bracket from the middle and
from an interpolated guess at once, then one prefix sum that gives every winner its place, in the row's own order.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**31))  # below every key: an element that is not there
NAN = tl.constexpr(-(2**31) + 1)  # below every number: a NaN wins only places that no number wants
CERTAIN = tl.constexpr(2**31 - 1)  # above every key: an element that is always taken
MAX_ROW = 32768  # two counts of a row share one 32-bit word


@triton.jit
def order_key(x):
    """int32 keys that order like the fp32 numbers `x`: -0 equals +0, NaN lies below -inf."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def kth_largest(key, n, k):
    """The k-th largest of the `n` keys of `key` [N] that are not NOTHING; NOTHING when n <= k.

    The bracket [lo, hi] holds the answer and halves in every round at least; it ends early once exactly k keys are at or
    above lo. N <= MAX_ROW.
    """
    lo = tl.min(tl.where(key == NOTHING, CERTAIN, key), 0)
    hi = tl.max(key, 0)
    lo = tl.where(n > k, lo, NOTHING)
    hi = tl.where(n > k, hi, NOTHING)
    at = n  # keys at or above lo
    above = n * 0  # keys above hi
    while lo < hi:
        middle = (lo | hi) - ((lo ^ hi) >> 1)  # rounds up, cannot overflow
        span = (hi - lo).to(tl.uint32, bitcast=True)  # the difference is below 2^32: wrapping keeps it exact
        part = (at - k).to(tl.float32) / tl.maximum(at - above, 1).to(tl.float32)
        step = tl.minimum((span.to(tl.float32) * part).to(tl.uint32), span)
        guess = lo + tl.maximum(step, 1).to(tl.int32, bitcast=True)
        p = tl.minimum(middle, guess)
        q = tl.maximum(middle, guess)
        both = tl.sum((key >= p).to(tl.int32) + ((key >= q).to(tl.int32) << 16), 0)
        at_p = both & 0xFFFF
        at_q = (both >> 16) & 0xFFFF
        high = at_q >= k
        mid = at_p >= k
        above = tl.where(high, above, tl.where(mid, at_q, at_p))
        hi = tl.where(high, hi, tl.where(mid, q - 1, p - 1))
        at = tl.where(high, at_q, tl.where(mid, at_p, at))
        lo = tl.where(high, q, tl.where(mid, p, lo))
        hi = tl.where(at == k, lo, hi)
    return lo


@triton.jit
def places(key, threshold, k):
    """(taken [N] bool, place [N] int32): every key above `threshold`, then the first of those equal to it, up to k.

    Places count from 0 without holes and follow the order of the row. NOTHING is never taken.
    """
    more = (key > threshold).to(tl.int32)
    same = ((key == threshold) & (key != NOTHING)).to(tl.int32)
    pair = more + (same << 16)
    before = tl.cumsum(pair, 0) - pair
    room = k - tl.sum(more, 0)
    more_before = before & 0xFFFF
    same_before = (before >> 16) & 0xFFFF
    taken = (more > 0) | ((same > 0) & (same_before < room))
    return taken, more_before + tl.minimum(same_before, room)
