// What the lanes of a warp do together.
#pragma once
#include <cuda_runtime.h>

namespace misa {
namespace {

// Inclusive sum over the lanes.
template <class T>
__device__ __forceinline__ T warp_sum_up(T value, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

}  // namespace
}  // namespace misa
