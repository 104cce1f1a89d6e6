// Thresholds that pass a little more of each row than is wanted, from scores of a sample of its keys.
#pragma once
#include <cfloat>

#include "score.cuh"
#include "select.cuh"

namespace misa {

constexpr int CUT_THREADS = 256;

// A window of rank keys in 16 bits: 0 below it, the last value above it. It holds the row's cut with room on either side.
struct Span {
  uint32_t base;
  int shift;
  static constexpr uint32_t LAST = 0xFFFF;
  __device__ static Span of(uint32_t low, uint32_t high) { return {low, max(0, 16 - __clz(high - low))}; }
  __device__ uint32_t place(uint32_t key) const { return key <= base ? 0 : min((key - base) >> shift, LAST); }
};

// The score that has this rank key, as a finite number.
__device__ __forceinline__ float ranked_score(uint32_t key) {
  const float score = __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
  return fminf(fmaxf(score, -FLT_MAX), FLT_MAX);  // NaN, the lowest key, becomes the lowest number
}

// A search for a key that `rank` or hardly more of a block's n staged keys reach, by counting: a pass over them costs a
// fraction of a histogram's.
struct Search {
  uint32_t low, high;   // keys: at least `rank` are at or above low, fewer at or above high
  int at_low, at_high;  // how many

  struct Smem {
    uint32_t least, most;
    int counts[3];  // one is summed up, one is read, one is being cleared
  };

  // Every thread's own extremes go in.
  __device__ Search(Smem& s, uint32_t least, uint32_t most, int n) {
    if (threadIdx.x == 0) s.least = ~0u, s.most = 0, s.counts[0] = s.counts[1] = s.counts[2] = 0;
    __syncthreads();
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) atomicMin(&s.least, least), atomicMax(&s.most, most);
    __syncthreads();
    low = s.least, high = s.most + 1, at_low = n, at_high = 0;
  }

  // Until at most `slack` keys too many reach `low`, or it is a single value.
  __device__ void run(Smem& s, const uint32_t* keys, int n, int rank, int slack) {
    bool halve = false;
    for (int round = 0; at_low - rank > slack && high - low > 1; ++round) {
      // Where the count would fit if the scores between lay evenly; where that hardly helped, the middle of the keys, which are
      // logarithms more or less.
      const float share = float(at_low - rank - slack / 2) / float(at_low - at_high);
      const float a = ranked_score(low), b = ranked_score(high);
      const uint32_t guess = halve ? low + (high - low) / 2 : rank_key(a * (1 - share) + b * share);
      const uint32_t middle = min(max(guess, low + 1), high - 1);
      int count = 0;
#pragma unroll 8
      for (int j = threadIdx.x; j < n; j += CUT_THREADS) count += keys[j] >= middle;
      count = __reduce_add_sync(~0u, count);
      if (threadIdx.x % 32 == 0) atomicAdd(&s.counts[round % 3], count);
      __syncthreads();
      count = s.counts[round % 3];
      if (threadIdx.x == 0) s.counts[(round + 2) % 3] = 0;
      const int before = at_low - at_high;
      if (count >= rank) low = middle, at_low = count;
      else high = middle, at_high = count;
      halve = 2 * (at_low - at_high) > before;
    }
  }
};

// Threshold of each row at `rank` of its sampled scores; +inf where all keys are taken, -inf where the sample is too small.
// `spans`, if asked for, are the windows in which the k-th best score lies; the first block also empties the list of failed rows.
__global__ void __launch_bounds__(CUT_THREADS)
    threshold_kernel(const __grid_constant__ Task task, const __grid_constant__ Logits sample, int rank, int k, float* threshold,
                     Span* spans, int32_t* failed) {
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Search::Smem smem;
  const int i = blockIdx.x, t = task.row(i);
  if (failed && i == 0 && threadIdx.x == 0) *failed = 0;
  const int2 w = task.window(i);
  const int length = min(task.ends[t], task.keys) - max(task.starts[t], 0), n = w.y - w.x;
  float value = -INFINITY;
  Span span{};
  if (length <= k) {
    value = INFINITY;  // every visible token is taken: nothing to collect
  } else if (n > rank || (spans && n > 0)) {
    const float* logits = sample.out + i * sample.ld;
    uint32_t least = ~0u, most = 0;
#pragma unroll 4
    for (int j = threadIdx.x * 4; j < n; j += CUT_THREADS * 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(logits + j));
      const uint32_t keys[4] = {rank_key(four.x), rank_key(four.y), rank_key(four.z), rank_key(four.w)};
      *reinterpret_cast<uint4*>(staged + j) = {keys[0], keys[1], keys[2], keys[3]};
#pragma unroll
      for (int l = 0; l < 4; ++l)
        if (j + l < n) least = min(least, keys[l]), most = max(most, keys[l]);
    }
    Search search(smem, least, most, n);
    if (n > rank) {
      const uint32_t top = search.high - 1;
      search.run(smem, staged, n, rank, max(1, rank / 32));
      // Where many scores tie at the cut (zeros, mostly), they are left out: better short than overflowing.
      value = rank_value(search.at_low - rank <= max(1, rank / 8) ? search.low : search.low + 1);
      span = Span::of(min(rank_key(value), top), top);
    } else {  // the cut may lie well below what was sampled
      const uint32_t top = search.high - 1;
      span = Span::of(search.low - min(search.low, top - search.low), top);
    }
  }
  if (threadIdx.x == 0) {
    threshold[i] = value;
    if (spans) spans[i] = span;
  }
}

}  // namespace misa
