// Rows that a sample's threshold failed: scored into memory, a bounded number at a time, and selected from exactly.
#pragma once
#include "logits.cuh"
#include "select.cuh"

namespace misa {
namespace {

using Redoers = Select<CONSUMERS>;

// The rows that no threshold answered for.
struct Failed {
  int32_t* list;      // how many, then the rows; or null
  int32_t* meeting;   // a counter for `meet`, 0 at first
  int64_t* ever;      // how many there have been on this device
  int at_once;        // whose scores there is room for
  __device__ void clear() const {
    if (list) *list = 0, *meeting = 0;
  }
  __device__ int count() const { return *list; }
  __device__ void add(int row) const { list[1 + atomicAdd(list, 1)] = row; }
};

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

// For a cooperative grid of THREADS: hands the failed rows, some at a time, to finish(task, row) of one block each, whose folding
// threads find all scores of task.row(row) in row `row` of `scores`.
template <class Finish>
__device__ __forceinline__ void redo(const Task& whole, const CUtensorMap& map, const Logits& scores, const Failed& failed,
                                     const Finish& finish) {
  extern __shared__ __align__(1024) uint8_t raw[];
  sm90::launch_wait();
  const int count = failed.count(), at_once = failed.at_once;
  if (count == 0) return;
  auto& shared = *reinterpret_cast<Shared<Logits>*>(raw);
  barriers_init(shared.scorer);
  Ring ring;
  const auto part = [&](int first) {
    Task task = whole;
    task.row_list = failed.list + 1, task.first = first, task.rows = min(at_once, count - first);
    return task;
  };
  if (threadIdx.x >= CONSUMERS) {
    sm90::fewer_registers<FEED_REGISTERS>();
    if (threadIdx.x < CONSUMERS + 32)
      for (int first = 0; first < count; first += at_once) feed(part(first), &map, shared.scorer, ring);
  } else {
    sm90::more_registers<FOLD_REGISTERS>();
    int round = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) *failed.ever += count;
    for (int first = 0; first < count; first += at_once) {
      const Task task = part(first);
      consume(task, scores, shared, ring);
      meet(failed.meeting, round);
      for (int row = blockIdx.x; row < task.rows; row += gridDim.x) finish(task, row);
      meet(failed.meeting, round);
    }
  }
}

constexpr int IN_FLIGHT = 16;  // loads of a thread: there are few threads, and memory is far

// Calls emit(place, position) for the k best of n scores in memory.
template <class Emit>
__device__ __forceinline__ void best_of(Redoers::Smem& s, const float* scores, int n, int k, const Emit& emit) {
  const auto key = [&](int j) { return rank_key(__ldcg(scores + j)); };
  constexpr int WIDTH = 32 - Redoers::LOG_BINS;  // a bin is a quarter of an octave, whatever the scores are
  Redoers::clear(s);
  Redoers::sync();
  Redoers::each<IN_FLIGHT>(key, n, [&](uint32_t k, int) { Redoers::count(s, k, 0, WIDTH); });
  Redoers::sync();
  const auto cut = Redoers::cut(s, {0, ~0u - 1, uint32_t(k), uint32_t(n)}, WIDTH);
  Redoers::top<IN_FLIGHT>(s, cut, key, [](int j) { return j; }, n, [](int j) { return j; }, emit);
}

}  // namespace
}  // namespace misa
