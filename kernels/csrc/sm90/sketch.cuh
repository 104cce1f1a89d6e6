// What the kernels of a decode step over sketches share.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace misa {
namespace {

// Complete pages whose sketches a row of `length` tokens reads: not the newest, which this step or its drafts may have completed.
__device__ __forceinline__ int sketched_pages(int length) { return max(length / 64 - 1, 0); }

// 16 bits that order like the score: its sign, six bits of exponent for 2⁻³² … 2³¹ and nine of fraction. NaN is 0, below all numbers.
__device__ __forceinline__ uint32_t score_key(float score) {
  constexpr int LEAST = (127 - 32) << 23, MOST = (1 << 29) - 1, CUT = 14;
  const int bits = __float_as_int(score);
  const int size = min(max((bits & 0x7FFFFFFF) - LEAST, 0), MOST) >> CUT;
  const uint32_t key = bits < 0 ? 0x7FFF - min(size, 0x7FFE) : 0x8000 + size;
  return score != score ? 0 : key;
}

}  // namespace
}  // namespace misa
