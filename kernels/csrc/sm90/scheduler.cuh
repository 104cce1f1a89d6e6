// Makes the division of a task's tiles among the scorer's thread blocks (items.cuh), on the device, where the windows are.
#pragma once
#include "items.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int SECTOR = 4;  // entries that L2 takes as fast as one: it writes whole sectors

// The private buffers of a thread block: how many of a row's hits one of them holds follows from the thread block's tiles.
struct Buffers {
  float hits;    // that a whole row is expected to bring to one buffer; 0: none are wanted
  float sigmas;  // standard deviations of room above that
  float rank;    // of the row's threshold in its sample: the fewer, the more a row's hits vary
  int spare;     // entries beyond those: a tile's, and what the scratch has left, for hits that come in clusters
  int room;      // entries of one buffer, summed over thread blocks; mirrored by plan.py

  // For tiles that are `part` of a row's (or of several rows').
  __device__ int capacity(float part) const {
    const float expected = hits * part;
    const float most = expected + sigmas * sqrtf(expected + expected * expected / rank);
    return (int(most) + spare + SECTOR) / SECTOR * SECTOR;
  }
};

struct Divide {
  int32_t* table;  // a Division
  int workers;     // thread blocks
  int runs;        // into which a row block's tiles are cut, at most
  Buffers buffers;
};

// Inclusive sums in place, by one warp.
__device__ __forceinline__ void sum_up(int32_t* values, int count) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base < count; base += 32) {
    const int value = before + warp_sum_up(base + lane < count ? values[base + lane] : 0, lane);
    if (base + lane < count) values[base + lane] = value;
    before = __shfl_sync(~0u, value, 31);
  }
}

// By one thread block. Rows that see at most k keys take them all: a row block of nothing else has no tiles.
__device__ __forceinline__ void divide(const Task& task, int k, const Divide& to) {
  __shared__ int longest;
  const int blocks = task.blocks(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t *before = to.table + Division::before(0), *first = to.table + Division::first(blocks);
  int32_t* held = to.table + Division::held(blocks, to.workers);
  if (threadIdx.x == 0) longest = 0, before[0] = 0;
  __syncthreads();
  for (int block = warp; block < blocks; block += blockDim.x / 32) {
    const Extent extent(task, block * ROWS, ROWS);
    const int tiles = extent.hi > 0 && extent.hi - extent.lo > k ? extent.end_tile() - extent.first_tile() : 0;
    if (lane == 0) before[block + 1] = tiles, atomicMax(&longest, tiles);
  }
  __syncthreads();
  if (warp == 0) sum_up(before + 1, blocks);
  __syncthreads();
  const int total = before[blocks];
  const int share = max((total + to.workers - 1) / to.workers, (longest - 1) / (to.runs - 1) + 1);
  if (threadIdx.x == 0) to.table[Division::SHARE] = share, held[0] = 0;
  for (int worker = threadIdx.x; worker < to.workers; worker += blockDim.x) {
    const int at = worker * share, last = min(at + share, total);
    int low = 0, high = blocks;  // before[low] <= at < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= at ? low : high) = middle;
    }
    first[worker] = low;
    float part = 0.f;
    for (int block = low; block < blocks && before[block] < last; ++block) {
      const int from = before[block], end = before[block + 1], covered = min(last, end) - max(at, from);
      if (covered > 0) part += float(covered) / float(end - from);
    }
    held[worker + 1] = to.buffers.hits > 0 ? to.buffers.capacity(part) : 0;
  }
  __syncthreads();
  if (warp == 0) {
    sum_up(held + 1, to.workers);
    // Should the host have counted otherwise: buffers that end early overflow, and their rows are redone.
    for (int worker = lane; worker < to.workers; worker += 32) held[worker + 1] = min(held[worker + 1], to.buffers.room);
  }
}

}  // namespace
}  // namespace misa
