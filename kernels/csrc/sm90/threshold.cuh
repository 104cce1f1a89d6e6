// Thresholds that pass a little more of each row than is wanted, from scores of a sample of its keys.
#pragma once
#include "fallback.cuh"
#include "logits.cuh"
#include "sample.cuh"
#include "scheduler.cuh"
#include "select.cuh"

namespace misa {
namespace {

constexpr int CUT_THREADS = 256;

// What a row's keys have to pass. Of those whose scores tie at the threshold, the ones before a key can be enough.
struct Threshold {
  float above;  // scores pass above it …
  float tied;   // … but of those equal to this one, which is the next above it, only keys …
  int end;      // … before here. NaN, which equals nothing, where all or none of the tied pass.

  __device__ bool splits() const { return tied == tied; }
  __device__ bool refuses(float score, int key) const { return score == tied && key >= end; }
};

// Scores of keys outside their query's window become NaN: it is above nothing.
__device__ __forceinline__ void drop_outside(float (&score)[LANE_QUERIES][2], const Seat& seat, int key0, const int2* windows) {
  const Seat at = seat.anew();
#pragma unroll
  for (int q = 0; q < LANE_QUERIES; ++q) {
    const int2 w = windows[q * 4 + at.lane_query];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key0 + at.key(half);
      if (key < w.x || key >= w.y) score[q][half] = NAN;
    }
  }
}

// The same, and of keys behind what their query's threshold takes of the tied.
__device__ __forceinline__ void drop_refused(float (&score)[LANE_QUERIES][2], const Seat& seat, int key0, const int2* windows,
                                             const Threshold* thresholds) {
  const Seat at = seat.anew();
#pragma unroll
  for (int q = 0; q < LANE_QUERIES; ++q) {
    const int2 w = windows[q * 4 + at.lane_query];
    const Threshold threshold = thresholds[at.query(q)];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key0 + at.key(half);
      if (key < w.x || key >= w.y || threshold.refuses(score[q][half], key)) score[q][half] = NAN;
    }
  }
}

// A window of rank keys in 16 bits: 0 below it, the last value above it. It holds the row's cut with room on either side.
struct Span {
  uint32_t base;
  int shift;
  static constexpr uint32_t LAST = 0xFFFF;
  __device__ static Span of(uint32_t low, uint32_t high) { return {low, max(0, 16 - __clz(high - low))}; }
  __device__ uint32_t place(uint32_t key) const { return min((max(key, base) - base) >> shift, LAST); }
};

// Threshold of each row at `rank` of its sampled keys, by score and then position; +inf where all keys are taken, -inf where the
// sample is too small.
// `spans`, if asked for, are the windows in which the k-th best score lies. The first thread block has no row: it divides the scan
// that comes next, of the same rows and all keys, and empties the list of failed rows, if it is given one.
// Sampled rows are 16-byte aligned, and `staged` has room for whole quads of them.
__global__ void __launch_bounds__(CUT_THREADS)
    threshold_kernel(const __grid_constant__ Task task, const __grid_constant__ Logits sample, int rank, int k, Threshold* thresholds,
                     Span* spans, const __grid_constant__ Divide next, const __grid_constant__ Failed emptied) {
  using Block = Select<CUT_THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Histogram smem;
  sm90::launch_wait();
  sm90::launch_next();
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) emptied.clear();
    Task all = task;
    all.stride = 1;
    divide(all, k, next);
    return;
  }
  const int i = blockIdx.x - 1, t = task.row(i);
  const int2 w = task.window(i);
  const int length = min(task.ends[t], task.keys) - max(task.starts[t], 0), n = w.y - w.x;
  Threshold threshold{-INFINITY, NAN, 0};
  Span span{};
  if (length <= k) {
    threshold.above = INFINITY;  // every visible token is taken: nothing to collect
  } else if (n > rank || (spans && n > 0)) {
    // What fills up the last quad is lowest.
    const float4* logits = reinterpret_cast<const float4*>(sample.out + i * sample.ld);
    uint4* quads = reinterpret_cast<uint4*>(staged);
    uint32_t most = 0;
    Block::clear(smem);
    Block::template each<4>([&](int quad) { return __ldcg(logits + quad); }, (n + 3) / 4, [&](float4 four, int quad) {
      const int left = n - 4 * quad;
      if (left < 4) four = {four.x, left > 1 ? four.y : NAN, left > 2 ? four.z : NAN, NAN};
      const uint4 keys{rank_key(four.x), rank_key(four.y), rank_key(four.z), rank_key(four.w)};
      quads[quad] = keys;
      most = max(max(most, max(keys.x, keys.y)), max(keys.z, keys.w));
    });
    most = Block::range(smem, 0, most, rank, n).hi;
    const auto key = [&](int j) { return staged[j]; };
    if (n > rank) {
      // Eight octaves down from the best, in bins that few scores share, whatever the scores are: atomics on one bin wait for each other.
      constexpr int WINDOW = 23 + 3, SHIFT = WINDOW - Block::LOG_BINS;  // in bits of a key
      const uint32_t base = most - min(most, (1u << WINDOW) - 1);
      Block::template each<4>([&](int quad) { return quads[quad]; }, (n + 3) / 4, [&](uint4 four, int) {
        for (const uint32_t key : {four.x, four.y, four.z, four.w}) Block::count(smem, max(key, base), base, SHIFT);
      });
      Block::sync();
      auto at = Block::cut(smem, {base, most, uint32_t(rank), uint32_t(n)}, SHIFT);
      if (at.lo == base) at.lo = 0;  // the lowest bin has all below it, too
      at = Block::narrow(smem, at, key, n, 0, max(1, rank / 32));
      threshold.above = rank_value(at.lo);
      // Where many scores tie at the cut, what passes ends at the key of that rank.
      if (at.inside - at.need > max(1, rank / 8) && threshold.above > -INFINITY) {
        const auto order = [&](int j) { return staged[j] == at.lo ? ~uint32_t(j) : 0u; };
        const auto last = Block::narrow(smem, {~uint32_t(n - 1), ~0u, at.need, at.inside}, order, n, 0, 0);
        threshold.tied = rank_score(at.lo), threshold.end = task.key(w.x + int(~last.lo)) + 1;
      }
    }
    if (spans) {
      uint32_t low = rank_key(threshold.above);
      if (n <= rank) {  // with too small a sample the cut may lie well below what was sampled
        uint32_t least = ~0u;
        Block::each(key, n, [&](uint32_t key, int) { least = min(least, key); });
        least = Block::range(smem, least, most, rank, n).lo;
        low = least - min(least, most - least);
      }
      span = Span::of(low, max(low, most));
    }
  }
  if (threadIdx.x == 0) {
    thresholds[i] = threshold;
    if (spans) spans[i] = span;
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

inline void launch_threshold(const Task& sampling, const Logits& sample, int rank, int k, Threshold* thresholds, Span* spans,
                             const Divide& next, const Failed& emptied, cudaStream_t stream) {
  const Grid grid{1 + sampling.rows, CUT_THREADS, int(sample.ld) * 4};
  launch_behind("threshold_kernel", threshold_kernel, grid, stream, sampling, sample, rank, k, thresholds, spans, next, emptied);
}

}  // namespace
}  // namespace misa
