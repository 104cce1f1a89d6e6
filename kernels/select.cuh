// Exact selection by THREADS threads (the first of a block) of the largest of n keys by narrowing ranges of their order-preserving integers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace misa {

// Order-preserving: larger score, larger key; -0 equals +0; NaN is below everything.
__device__ __forceinline__ uint32_t rank_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.f);
  return score != score ? 0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A threshold just under `key`: scores whose key is at least `key` are above it.
__device__ __forceinline__ float rank_value(uint32_t key) {
  constexpr uint32_t LOWEST = 0x007FFFFFu;  // key of -inf
  if (key <= LOWEST + 1) return -INFINITY;
  const uint32_t under = key - 1;
  return __uint_as_float(under >> 31 ? under & 0x7FFFFFFFu : ~under);
}

struct Cut {
  uint32_t key;   // every element above this key is chosen,
  uint32_t ties;  // and so many of those equal to it
};

template <int THREADS>
struct Select {
  static constexpr int BINS = 2048, EACH = (BINS + THREADS - 1) / THREADS, WARPS = THREADS / 32;
  struct Smem {
    uint32_t bins[BINS];
    uint32_t warps[32];
    uint32_t least, most;
    uint32_t bin, above, inside;
    uint32_t placed;
  };

  static __device__ void sync() { asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory"); }

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
    uint32_t before = lane < warp && lane < WARPS ? s.warps[lane] : 0;
    before = __reduce_add_sync(~0u, before);
    sync();
    return before + value;
  }

  // The cut that leaves `rank` (1 ≤ rank ≤ n) of key(0 … n-1) chosen. With slack, {key, 0} where the elements
  // at or above `key` are between rank and rank + slack, or tie at `key`.
  template <class Key>
  static __device__ Cut cut(Smem& s, const Key& key, int n, uint32_t rank, uint32_t slack = 0) {
    if (threadIdx.x == 0) s.least = ~0u, s.most = 0;
    sync();
    uint32_t least = ~0u, most = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
      const uint32_t k = key(i);
      least = min(least, k), most = max(most, k);
    }
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) atomicMin(&s.least, least), atomicMax(&s.most, most);
    sync();
    uint32_t lo = s.least, hi = s.most;
    while (true) {  // the rank-th largest element lies in [lo, hi]
      const uint32_t span = hi - lo;
      const int shift = span < BINS ? 0 : 32 - __clz(span) - 11;
      for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
      sync();
      for (int i = threadIdx.x; i < n; i += THREADS) {
        const uint32_t k = key(i);
        if (k >= lo && k <= hi) atomicAdd(&s.bins[(k - lo) >> shift], 1u);
      }
      sync();
      // Threads take bins from the top down.
      const int top = BINS - 1 - int(threadIdx.x) * EACH;
      uint32_t own = 0;
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (top - j >= 0) own += s.bins[top - j];
      uint32_t above = scan(s, own) - own;
      if (above < rank && above + own >= rank) {
        for (int j = 0; j < EACH && top - j >= 0; ++j) {
          const uint32_t inside = s.bins[top - j];
          if (above + inside >= rank) {
            s.bin = top - j, s.above = above, s.inside = inside;
            break;
          }
          above += inside;
        }
      }
      sync();
      rank -= s.above;
      lo += s.bin << shift;
      hi = min(hi, lo + ((1u << shift) - 1));
      const uint32_t inside = s.inside;
      sync();
      if (slack && inside <= rank + slack) return {lo, 0};
      if (shift == 0) return slack ? Cut{lo, 0} : Cut{lo, rank};
      if (!slack && inside == rank && lo > 0) return {lo - 1, 0};
    }
  }

  // Calls emit(place, i) once for each of the k largest of n ≥ k elements, places 0 … k-1 in any order; among equal keys the
  // smallest index(i) wins, so the chosen set depends on nothing but keys and indices.
  template <class Key, class Index, class Emit>
  static __device__ void top(Smem& s, const Key& key, const Index& index, int n, int k, const Emit& emit) {
    const Cut best = cut(s, key, n, k);
    Cut first{0, 0};
    if (best.ties) first = cut(s, [&](int i) { return key(i) == best.key ? ~uint32_t(index(i)) : 0u; }, n, best.ties);
    if (threadIdx.x == 0) s.placed = 0;
    sync();
    const int lane = threadIdx.x % 32;
    for (int base = threadIdx.x - lane; base < n; base += THREADS) {
      const int i = base + lane;
      bool chosen = false;
      if (i < n) {
        const uint32_t own = key(i);
        chosen = own > best.key;
        if (best.ties && own == best.key) {
          const uint32_t order = ~uint32_t(index(i));
          chosen = order > first.key || (order == first.key && first.ties);
        }
      }
      const uint32_t votes = __ballot_sync(~0u, chosen);
      uint32_t place = 0;
      if (lane == 0 && votes) place = atomicAdd(&s.placed, uint32_t(__popc(votes)));
      place = __shfl_sync(~0u, place, 0) + __popc(votes & ((1u << lane) - 1));
      if (chosen) emit(int(place), i);
    }
    sync();
  }
};

}  // namespace misa
