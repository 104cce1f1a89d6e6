// What the kernels of a decode step over sketches share.
#pragma once
#include "mma_sync.cuh"

namespace misa {
namespace {

// Complete pages whose sketches a row of `length` tokens reads: not the newest, which this step or its drafts may have completed.
__device__ __forceinline__ int sketched_pages(int length) { return max(length / 64 - 1, 0); }

__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y
                                                                                    : i == 2   ? v.z
                                                                                               : v.w; }

// Two times 16 bits that order like the scores: sign, six bits of exponent for 2⁻³² … 2³¹ (below it is linear) and nine of fraction.
// NaN is 0, below all numbers.
__device__ __forceinline__ uint32_t score_keys(float low, float high) {
  constexpr float BELOW = 0x1p-94f;               // brings the least exponent down to fp32's
  constexpr float MOST = 0x1.ff7ffep-64f;         // whose bits 14 … 29 are 0x7FFE
  const uint32_t sizes[2] = {__float_as_uint(fminf(fabsf(low * BELOW), MOST)) * 4, __float_as_uint(fminf(fabsf(high * BELOW), MOST)) * 4};
  const uint32_t negative = sm90::pick_bytes<0xFFBB>(__float_as_uint(low), __float_as_uint(high));  // all bits of a half
  uint32_t keys = sm90::pick_bytes<0x7632>(sizes[0], sizes[1]) ^ negative ^ 0x80008000u;
  if (low != low || high != high) keys &= (low == low ? 0xFFFFu : 0u) | (high == high ? 0xFFFF0000u : 0u);
  return keys;
}

}  // namespace
}  // namespace misa
