// Thresholds that pass a little more of each row than is wanted, from scores of a sample of its keys.
#pragma once
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

// Threshold of each row at `rank` of its sampled scores; +inf where all keys are taken, -inf where the sample is too small.
// `spans`, if asked for, are the windows in which the k-th best score lies; the first block also empties the list of failed rows.
__global__ void __launch_bounds__(CUT_THREADS)
    threshold_kernel(const __grid_constant__ Task task, const __grid_constant__ Logits sample, int rank, int k, float* threshold,
                     Span* spans, int32_t* failed) {
  using Block = Select<CUT_THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Smem smem;
  const int i = blockIdx.x, t = task.row(i);
  if (failed && i == 0 && threadIdx.x == 0) *failed = 0;
  const int2 w = task.window(i);
  const int length = min(task.ends[t], task.keys) - max(task.starts[t], 0), n = w.y - w.x;
  float value = -INFINITY;
  Span span{};
  if (length <= k) {
    value = INFINITY;  // every visible token is taken: nothing to collect
  } else if (n > rank || spans) {
    const float* logits = sample.out + i * sample.ld;
    uint32_t least = ~0u, most = 0;
    Block::each([&](int j) { return rank_key(__ldcg(logits + j)); }, n, [&](uint32_t key, int j) {
      staged[j] = key;
      least = min(least, key), most = max(most, key);
    });
    const auto all = Block::range(smem, least, most, rank, n);
    if (n > rank) {
      const auto cut = Block::narrow(smem, all, [&](int j) { return staged[j]; }, n, 0, max(1, rank / 32));
      // Where many scores tie at the cut (zeros, mostly), they are left out: better short than overflowing.
      value = rank_value(cut.inside - cut.need <= max(1, rank / 8) ? cut.lo : cut.lo + 1);
      const uint32_t low = rank_key(value);
      span = Span::of(low, max(low, all.hi));
    } else if (n > 0) {  // the cut may lie well below what was sampled
      const uint32_t low = all.lo - min(all.lo, all.hi - all.lo);
      span = Span::of(low, all.hi);
    }
  }
  if (threadIdx.x == 0) {
    threshold[i] = value;
    if (spans) spans[i] = span;
  }
}

}  // namespace misa
