// The keys that stand for all of a call's: gathered once, so that scoring them is a scan like any other.
#pragma once
#include "scorer.cuh"

namespace misa {
namespace {

constexpr int GATHER_THREADS = 256, KEY_CHUNKS = DIM / 16;

struct Sample {
  uint8_t* keys;  // [scored keys, DIM]
  float* scale;   // [scored keys]
  int stride;     // one key in so many

  // The scan of these keys for the rows of `task`.
  __host__ __device__ Task of(const Task& task) const {
    Task part = task;
    part.scale = scale, part.stride = stride, part.division = nullptr;
    return part;
  }
};

// Eight threads a key. `whole` scores all keys, which lie at `k`.
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_kernel(const __grid_constant__ Task whole, const uint8_t* k, const __grid_constant__ Sample to) {
  sm90::launch_wait();
  sm90::launch_next();
  const Task task = to.of(whole);
  const int thread = blockIdx.x * GATHER_THREADS + threadIdx.x, i = thread / KEY_CHUNKS, chunk = thread % KEY_CHUNKS;
  if (i >= task.scored()) return;
  const int key = task.key(i);
  reinterpret_cast<uint4*>(to.keys)[int64_t(i) * KEY_CHUNKS + chunk] = __ldg(reinterpret_cast<const uint4*>(k) + int64_t(key) * KEY_CHUNKS + chunk);
  if (chunk == 0) to.scale[i] = whole.scale[key];
}

// ---- host -----------------------------------------------------------------------------------------------------------

inline void launch_gather(const Task& whole, const uint8_t* k, const Sample& to, cudaStream_t stream) {
  const int64_t threads = int64_t(to.of(whole).scored()) * KEY_CHUNKS;
  const Grid grid{int((threads + GATHER_THREADS - 1) / GATHER_THREADS), GATHER_THREADS};
  launch_behind("gather_kernel", gather_kernel, grid, stream, whole, k, to);
}

}  // namespace
}  // namespace misa
