// Exact selection of the largest of n keys by THREADS threads (the first of a block): a histogram finds the bin that holds
// the cut, what is above it is chosen at once, and the few elements inside it are ranked against each other.
#pragma once
#include "ptx.cuh"
#include "warp.cuh"

namespace misa {
namespace {

// Order-preserving: larger score, larger key; -0 equals +0; NaN is below everything, and ~0 above.
__device__ __forceinline__ uint32_t number_key(float score) {  // of what is not NaN
  const int bits = __float_as_int(score + 0.f);
  return bits ^ (bits >> 31 | 0x80000000);
}
__device__ __forceinline__ uint32_t rank_key(float score) { return score != score ? 0 : number_key(score); }

// The score, not NaN, whose key it is.
__device__ __forceinline__ float rank_score(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

// The threshold above which are exactly the scores whose key is at least `key`.
__device__ __forceinline__ float rank_value(uint32_t key) {
  constexpr uint32_t LOWEST = 0x007FFFFFu;  // key of -inf
  if (key <= LOWEST + 1) return -INFINITY;
  constexpr uint32_t ZERO = 0x80000000u;
  const uint32_t under = key == ZERO ? ZERO - 2 : key - 1;  // no score has the key below zero's: -0 equals +0
  return rank_score(under);
}

template <int THREADS>
struct Select {
  static constexpr int LOG_BINS = 11, BINS = 1 << LOG_BINS, WARPS = THREADS / 32;
  static constexpr int EACH = THREADS < 512 ? 8 : 4;  // bins that a thread sums up
  static constexpr int LIST = 256;                    // elements that are ranked against each other
  static_assert(EACH * THREADS >= BINS);
  struct Histogram {
    alignas(16) uint32_t bins[BINS];
    uint32_t warps[32];
    uint32_t least, most;
    uint32_t bin, above, inside;
  };
  struct Smem : Histogram {
    uint32_t placed, listed;
    uint32_t keys[LIST], index[LIST];
    int from[LIST];
  };
  // The cut lies in [lo, hi]: every key above hi is chosen, and `need` of the `inside` ones in the range.
  struct Range {
    uint32_t lo, hi, need, inside;
  };

  // Read anew by every step: nothing that follows from it shall wait in registers while a caller works.
  static __device__ __forceinline__ int thread() { return sm90::thread(); }
  static __device__ void sync() { sm90::barrier_of<THREADS>(); }

  // Calls visit(load(i), i) for every i < n, several loads in flight.
  template <int BATCH = 8, class Load, class Visit>
  static __device__ __forceinline__ void each(const Load& load, int n, const Visit& visit) {
    int base = thread();
    for (; base + (BATCH - 1) * THREADS < n; base += BATCH * THREADS) batch<BATCH, true>(load, base, n, visit);
    if (base < n) batch<BATCH, false>(load, base, n, visit);
  }
  template <int BATCH, bool WHOLE, class Load, class Visit>
  static __device__ __forceinline__ void batch(const Load& load, int base, int n, const Visit& visit) {
    decltype(load(0)) loaded[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      if (WHOLE || base + j * THREADS < n) loaded[j] = load(base + j * THREADS);
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      if (WHOLE || base + j * THREADS < n) visit(loaded[j], base + j * THREADS);
  }

  // Inclusive sum over the threads; `all`, if asked for, is the sum of all.
  static __device__ __forceinline__ uint32_t scan(Histogram& s, uint32_t value, uint32_t* all = nullptr) {
    const int lane = thread() % 32, warp = thread() / 32;
    value = warp_sum_up(value, lane);
    if (lane == 31) s.warps[warp] = value;
    sync();
    const uint32_t own = lane < WARPS ? s.warps[lane] : 0;
    const uint32_t before = __reduce_add_sync(~0u, lane < warp ? own : 0);
    if (all) *all = __reduce_add_sync(~0u, own);
    sync();
    return before + value;
  }

  // Least and greatest over the threads' own extremes.
  static __device__ Range range(Histogram& s, uint32_t least, uint32_t most, uint32_t rank, uint32_t n) {
    if (thread() == 0) s.least = ~0u, s.most = 0;
    sync();
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (thread() % 32 == 0) atomicMin(&s.least, least), atomicMax(&s.most, most);
    sync();
    const Range all{s.least, s.most, rank, n};
    sync();  // who comes back for another range must not clear this one before it is read
    return all;
  }

  // A histogram has bins of 2^shift keys from `lo` up, the last one open: clear, sync, count each key, sync, cut.
  static __device__ __forceinline__ int shift_over(uint32_t span) { return span < BINS ? 0 : 32 - __clz(span) - LOG_BINS; }
  static __device__ __forceinline__ void clear(Histogram& s) {
    constexpr int QUADS = BINS / 4;
#pragma unroll
    for (int first = 0; first < QUADS; first += THREADS) {
      const int i = first + thread();
      if (first + THREADS <= QUADS || i < QUADS) reinterpret_cast<uint4*>(s.bins)[i] = uint4{0, 0, 0, 0};
    }
  }
  static __device__ __forceinline__ void count(Histogram& s, uint32_t key, uint32_t lo, int shift) {
    atomicAdd(&s.bins[min((key - lo) >> shift, uint32_t(BINS - 1))], 1u);
  }
  // The bin of r's keys that holds the cut. Threads take bins from the top down.
  static __device__ __forceinline__ Range cut(Histogram& s, Range r, int shift) {
    const int first = BINS - EACH * (thread() + 1);
    uint32_t counted[EACH] = {}, own = 0;
    if (first >= 0) {
#pragma unroll
      for (int j = 0; j < EACH; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(s.bins + first + j);
        counted[j] = four.x, counted[j + 1] = four.y, counted[j + 2] = four.z, counted[j + 3] = four.w;
      }
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) own += counted[j];
    uint32_t above = scan(s, own) - own;
    if (above < r.need && above + own >= r.need) {
#pragma unroll
      for (int j = EACH - 1; j >= 0; --j) {
        if (above < r.need && above + counted[j] >= r.need) s.bin = first + j, s.above = above, s.inside = counted[j];
        above += counted[j];
      }
    }
    sync();
    const uint32_t bin = s.bin;
    r.need -= s.above, r.inside = s.inside;
    r.lo += bin << shift;
    if (bin < BINS - 1) r.hi = r.lo + min(r.hi - r.lo, (1u << shift) - 1);
    return r;
  }

  // Narrows a range until it holds at most `few` elements, at most `slack` more than needed, or a single key.
  template <int BATCH = 8, class Key>
  static __device__ Range narrow(Histogram& s, Range r, const Key& key, int n, uint32_t few, uint32_t slack) {
    while (r.inside > few && r.inside - r.need > slack && r.lo < r.hi) {
      const uint32_t span = r.hi - r.lo;
      const int shift = shift_over(span);
      clear(s);
      sync();
      each<BATCH>(key, n, [&](uint32_t k, int) {
        if (k - r.lo <= span) count(s, k, r.lo, shift);
      });
      sync();
      r = cut(s, r, shift);
    }
    return r;
  }

  // Calls emit(place, load(i)) once for each of the `first.need` largest of n elements, places 0 … in any order; among equal
  // keys the smallest index(i) wins, so the chosen set depends on nothing but keys and indices. `first` covers all elements
  // that can be chosen, but for surely chosen ones above it; keys are below ~0. All threads have emitted when it returns.
  template <int BATCH = 4, class Key, class Index, class Load, class Emit>
  static __device__ __forceinline__ void top(Smem& s, Range first, const Key& key, const Index& index, int n, const Load& load,
                                             const Emit& emit) {
    const int lane = thread() % 32;
    constexpr int NARROW = BATCH > 8 ? BATCH : 8;
    const Range r = narrow<NARROW>(s, first, key, n, LIST, 0);
    const bool all = r.inside == r.need;  // nothing inside to choose from
    const bool rank = r.inside <= LIST;
    uint32_t last = 0;  // more ties than the list holds: the smallest indices, by their complements
    if (!all && !rank) {
      const auto order = [&](int i) { return key(i) == r.lo ? ~uint32_t(index(i)) : 0u; };
      uint32_t least = ~0u, most = 0;
      each<NARROW>(order, n, [&](uint32_t o, int) { least = min(least, o), most = max(most, o); });
      last = narrow<NARROW>(s, range(s, least, most, r.need, n), order, n, 0, 0).lo;
    }
    if (thread() == 0) s.placed = 0, s.listed = 0;
    sync();
    const uint32_t own = 1u << lane, sure = all ? r.lo : r.hi + 1;
    for (int base = thread() - lane; base < n; base += THREADS * BATCH) {
      uint32_t votes[BATCH], undecided = 0, count = 0;
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        const int i = base + lane + j * THREADS;
        const uint32_t k = i < n ? key(i) : 0;
        const bool chosen = i < n && k >= sure;
        votes[j] = __ballot_sync(~0u, chosen);
        count += __popc(votes[j]);
        if (!chosen && k >= r.lo) undecided |= 1u << j;
      }
      uint32_t place = 0;
      if (lane == 0) place = atomicAdd(&s.placed, count);
      place = __shfl_sync(~0u, place, 0);
      decltype(load(0)) loaded[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        if (votes[j] & own) loaded[j] = load(base + lane + j * THREADS);
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        if (votes[j] & own) emit(int(place + __popc(votes[j] & (own - 1))), loaded[j]);
        place += __popc(votes[j]);
      }
      for (; undecided; undecided &= undecided - 1) {
        const int i = base + lane + (__ffs(undecided) - 1) * THREADS;
        if (i >= n) break;
        if (rank) {
          const uint32_t at = atomicAdd(&s.listed, 1u);
          s.keys[at] = key(i), s.index[at] = index(i), s.from[at] = i;
        } else if (~uint32_t(index(i)) >= last) {
          emit(int(atomicAdd(&s.placed, 1u)), load(i));
        }
      }
    }
    sync();
    if (!all && rank) {
      for (int a = thread(); a < r.inside; a += THREADS) {
        const uint32_t k = s.keys[a], i = s.index[a];
        uint32_t before = 0;
        for (int b = 0; b < r.inside; ++b) before += s.keys[b] > k || (s.keys[b] == k && s.index[b] < i);
        if (before < r.need) emit(int(s.placed + before), load(s.from[a]));
      }
      sync();
    }
  }
  template <class Key, class Index, class Emit>
  static __device__ __forceinline__ void top(Smem& s, Range first, const Key& key, const Index& index, int n, const Emit& emit) {
    top(s, first, key, index, n, [](int i) { return i; }, emit);
  }
};

}  // namespace
}  // namespace misa
