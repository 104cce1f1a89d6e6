// Rows that a sample's threshold failed: scored into memory, a bounded number at a time, and selected from exactly.
#pragma once
#include "scorer.cuh"
#include "select.cuh"

namespace misa {

using Redoers = Select<CONSUMERS>;

// The folding warpgroups of all blocks of a cooperative grid meet here; `meeting` counts arrivals since the launch began.
__device__ __forceinline__ void meet(int32_t* meeting, int& round) {
  __threadfence();
  sm90::named_barrier(0, CONSUMERS);
  if (threadIdx.x == 0) {
    atomicAdd(meeting, 1);
    const int due = ++round * gridDim.x;
    while (*reinterpret_cast<volatile int32_t*>(meeting) < due) __nanosleep(64);
    __threadfence();
  }
  sm90::named_barrier(0, CONSUMERS);
}

// For a cooperative grid of THREADS: hands the failed rows, `at_once` of them at a time, to finish(task, row) of one block each,
// whose folding threads find all scores of task.row(row) in row `row` of `scores`.
template <class Finish>
__device__ __forceinline__ void redo(const Task& whole, const CUtensorMap& map, const Logits& scores, int at_once, const int32_t* failed,
                                     int32_t* meeting, const Finish& finish) {
  extern __shared__ __align__(1024) uint8_t raw[];
  const int count = *failed;
  if (count == 0) return;
  auto& shared = *reinterpret_cast<Shared<Logits>*>(raw);
  barriers_init(shared.scorer);
  Ring ring;
  const auto part = [&](int first) {
    Task task = whole;
    task.row_list = failed + 1, task.first = first, task.rows = min(at_once, count - first);
    return task;
  };
  if (threadIdx.x >= CONSUMERS) {
    sm90::fewer_registers<FEED_REGISTERS>();
    if (threadIdx.x < CONSUMERS + 32)
      for (int first = 0; first < count; first += at_once) feed(part(first), &map, shared.scorer, ring);
  } else {
    sm90::more_registers<FOLD_REGISTERS>();
    int round = 0;
    for (int first = 0; first < count; first += at_once) {
      const Task task = part(first);
      consume(task, scores, shared, ring);
      meet(meeting, round);
      for (int row = blockIdx.x; row < task.rows; row += gridDim.x) finish(task, row);
      meet(meeting, round);
    }
  }
}

// Calls emit(place, position) for the k best of n scores in memory.
template <class Emit>
__device__ __forceinline__ void best_of(Redoers::Smem& s, const float* scores, int n, int k, const Emit& emit) {
  const auto key = [&](int j) { return rank_key(__ldcg(scores + j)); };
  uint32_t least = ~0u, most = 0;
  Redoers::each(key, n, [&](uint32_t k, int) { least = min(least, k), most = max(most, k); });
  const auto all = Redoers::range(s, least, most, k, n);
  Redoers::top(s, all, key, [](int j) { return j; }, n, emit);
}

}  // namespace misa
