// Exact selection of the largest of n keys by THREADS threads (the first of a block): one histogram finds the bin that
// holds the cut, what is above it is chosen at once, and the few elements inside it are ranked against each other.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace misa {

// Order-preserving: larger score, larger key; -0 equals +0; NaN is below everything.
__device__ __forceinline__ uint32_t rank_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.f);
  return score != score ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The threshold above which are exactly the scores whose key is at least `key`.
__device__ __forceinline__ float rank_value(uint32_t key) {
  constexpr uint32_t LOWEST = 0x007FFFFFu;  // key of -inf
  if (key <= LOWEST + 1) return -INFINITY;
  constexpr uint32_t ZERO = 0x80000000u;
  const uint32_t under = key == ZERO ? ZERO - 2 : key - 1;  // no score has the key below zero's: -0 equals +0
  return __uint_as_float(under >> 31 ? under & 0x7FFFFFFFu : ~under);
}

template <int THREADS>
struct Select {
  static constexpr int BINS = 2048, EACH = (BINS + THREADS - 1) / THREADS, WARPS = THREADS / 32;
  static constexpr int LIST = 256;  // elements that are ranked against each other
  struct Smem {
    uint32_t bins[BINS];
    uint32_t warps[32];
    uint32_t least, most;
    uint32_t bin, above, inside;
    uint32_t placed, listed;
    uint32_t keys[LIST], index[LIST];
    int from[LIST];
  };
  // The cut lies in [lo, hi]: every key above hi is chosen, and `need` of the `inside` ones in the range.
  struct Range {
    uint32_t lo, hi, need, inside;
  };

  static __device__ void sync() { asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory"); }

  // Calls visit(key(i), i) for every i < n, several loads in flight.
  template <class Key, class Visit>
  static __device__ __forceinline__ void each(const Key& key, int n, const Visit& visit) {
    constexpr int BATCH = 8;
    for (int base = threadIdx.x; base < n; base += THREADS * BATCH) {
      uint32_t k[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) k[j] = base + j * THREADS < n ? key(base + j * THREADS) : 0;
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        if (base + j * THREADS < n) visit(k[j], base + j * THREADS);
    }
  }

  // Inclusive sum over the threads.
  static __device__ uint32_t scan(Smem& s, uint32_t value) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, value, d);
      if (lane >= d) value += other;
    }
    if (lane == 31) s.warps[warp] = value;
    sync();
    const uint32_t before = __reduce_add_sync(~0u, lane < warp && lane < WARPS ? s.warps[lane] : 0);
    sync();
    return before + value;
  }

  // Least and greatest over the threads' own extremes.
  static __device__ Range range(Smem& s, uint32_t least, uint32_t most, uint32_t rank, uint32_t n) {
    if (threadIdx.x == 0) s.least = ~0u, s.most = 0;
    sync();
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) atomicMin(&s.least, least), atomicMax(&s.most, most);
    sync();
    const Range all{s.least, s.most, rank, n};
    sync();  // who comes back for another range must not clear this one before it is read
    return all;
  }

  // Narrows a range until it holds at most `few` elements, at most `slack` more than needed, or a single key.
  template <class Key>
  static __device__ Range narrow(Smem& s, Range r, const Key& key, int n, uint32_t few, uint32_t slack) {
    while (r.inside > few && r.inside - r.need > slack && r.lo < r.hi) {
      const uint32_t span = r.hi - r.lo;
      const int shift = span < BINS ? 0 : 32 - __clz(span) - 11;
      for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
      sync();
      each(key, n, [&](uint32_t k, int) {
        if (k >= r.lo && k <= r.hi) atomicAdd(&s.bins[(k - r.lo) >> shift], 1u);
      });
      sync();
      // Threads take bins from the top down.
      const int top = BINS - 1 - int(threadIdx.x) * EACH;
      uint32_t own = 0;
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (top - j >= 0) own += s.bins[top - j];
      uint32_t above = scan(s, own) - own;
      if (above < r.need && above + own >= r.need) {
        for (int j = 0; j < EACH && top - j >= 0; ++j) {
          const uint32_t inside = s.bins[top - j];
          if (above + inside >= r.need) {
            s.bin = top - j, s.above = above, s.inside = inside;
            break;
          }
          above += inside;
        }
      }
      sync();
      r.need -= s.above, r.inside = s.inside;
      r.lo += s.bin << shift;
      r.hi = r.lo + min(r.hi - r.lo, (1u << shift) - 1);
      sync();
    }
    return r;
  }

  // Calls emit(place, i) once for each of the `first.need` largest of n elements, places 0 … in any order; among equal keys
  // the smallest index(i) wins, so the chosen set depends on nothing but keys and indices. `first` covers all elements.
  template <class Key, class Index, class Emit>
  static __device__ void top(Smem& s, Range first, const Key& key, const Index& index, int n, const Emit& emit) {
    const int lane = threadIdx.x % 32;
    const Range r = narrow(s, first, key, n, LIST, 0);
    const bool all = r.inside == r.need;  // nothing inside to choose from
    const bool rank = !all && r.inside <= LIST;
    uint32_t last = 0;  // more ties than the list holds: the smallest indices, by their complements
    if (!all && !rank) {
      const auto order = [&](int i) { return key(i) == r.lo ? ~uint32_t(index(i)) : 0u; };
      uint32_t least = ~0u, most = 0;
      each(order, n, [&](uint32_t o, int) { least = min(least, o), most = max(most, o); });
      last = narrow(s, range(s, least, most, r.need, n), order, n, 0, 0).lo;
    }
    if (threadIdx.x == 0) s.placed = 0, s.listed = 0;
    sync();
    constexpr int BATCH = 4;
    for (int base = threadIdx.x - lane; base < n; base += THREADS * BATCH) {
      uint32_t keys[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) keys[j] = base + lane + j * THREADS < n ? key(base + lane + j * THREADS) : 0;
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
        const int i = base + lane + j * THREADS;
        const bool within = i < n && keys[j] >= r.lo && keys[j] <= r.hi;
        bool chosen = i < n && keys[j] > r.hi;
        if (within && all) chosen = true;
        if (within && rank) {
          const uint32_t at = atomicAdd(&s.listed, 1u);
          s.keys[at] = keys[j], s.index[at] = index(i), s.from[at] = i;
        }
        if (within && !all && !rank) chosen = ~uint32_t(index(i)) >= last;
        const uint32_t votes = __ballot_sync(~0u, chosen);
        uint32_t place = 0;
        if (lane == 0 && votes) place = atomicAdd(&s.placed, uint32_t(__popc(votes)));
        place = __shfl_sync(~0u, place, 0) + __popc(votes & ((1u << lane) - 1));
        if (chosen) emit(int(place), i);
      }
    }
    sync();
    if (rank) {
      for (int a = threadIdx.x; a < r.inside; a += THREADS) {
        const uint32_t k = s.keys[a], i = s.index[a];
        uint32_t before = 0;
        for (int b = 0; b < r.inside; ++b) before += s.keys[b] > k || (s.keys[b] == k && s.index[b] < i);
        if (before < r.need) emit(int(s.placed + before), s.from[a]);
      }
      sync();
    }
  }
};

}  // namespace misa
