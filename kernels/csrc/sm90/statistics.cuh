// What the router keeps of a query's products with the pooled keys.
#pragma once
#include <cuda_runtime.h>

#include <cfloat>

namespace misa {
namespace {

constexpr int TILE = 128;  // pooled keys of a matrix product

enum class Statistic { NONE, SUM, MAXIMUM };  // of ReLU(x)

// What a pass over the pooled keys leaves of each (query, head): the statistic and, where a residual is wanted, the products' sum and
// sum of squares. A NaN product counts nothing in a statistic, and makes the moments NaN.
template <Statistic STATISTIC, bool RESIDUAL>
struct Folded {
  static constexpr bool MOMENTS = RESIDUAL, RANKED = STATISTIC != Statistic::NONE, MAXIMUM = STATISTIC == Statistic::MAXIMUM;
  static constexpr int SUM = RANKED ? 1 : 0, SQUARES = SUM + 1;  // places among the values, behind the statistic
  static constexpr int VALUES = SUM + (RESIDUAL ? 2 : 0);
  static constexpr int CHUNK = RESIDUAL ? 4 : 5;  // tiles that stay while the block's queries pass: as many as fit beside the values
  float values[VALUES][2][2] = {};                // [value][row of the thread's two][column's lowest bit]

  static __device__ float join(int value, float a, float b) { return MAXIMUM && value == 0 ? fmaxf(a, b) : a + b; }

  // Adds the first `limit` columns of a product.
  template <bool MASKED>
  __device__ __forceinline__ void add(const float (&d)[64], int limit) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int bit = 0; bit < 2; ++bit) {
          const float x = MASKED && n * 8 + column + bit >= limit ? 0.f : d[n * 4 + row * 2 + bit];
          if constexpr (RANKED) {
            float& statistic = values[0][row][bit];
            statistic = MAXIMUM ? fmaxf(statistic, x) : statistic + fmaxf(x, 0.f);
          }
          if constexpr (RESIDUAL) {
            values[SUM][row][bit] += x;
            values[SQUARES][row][bit] = fmaf(x, x, values[SQUARES][row][bit]);
          }
        }
  }
  // One value of a row, over all columns: for the first lane of a quad.
  __device__ float total(int value, int row) const {
    float all = join(value, values[value][row][0], values[value][row][1]);
    all = join(value, all, __shfl_xor_sync(~0u, all, 1));
    return join(value, all, __shfl_xor_sync(~0u, all, 2));
  }
};

// Mean and deviation of a head's products; {-∞, 0} where they are not finite, so that the head counts as never positive. In fp32 σ² is off
// by some 1e-6 of E[x²], which moves Φ(μ/σ) by less than 1e-5 while |μ/σ| < 6, where it is not 0 or 1 yet.
struct Normal {
  float mean, deviation;
  static __device__ __forceinline__ Normal of(float sum, float squares, int n) {
    if (!(squares <= FLT_MAX)) return {-INFINITY, 0.f};
    const float mean = sum / float(n), variance = squares / float(n) - mean * mean;
    return {mean, variance > 0.f ? sqrtf(variance) : 0.f};
  }
};

constexpr float SPREAD = 1.f / 6.f;  // as in layout.py

// What a residual takes for a head's ReLU(x): `share` · x, with φ = Φ(μ/σ), the share of keys on which a head like this is positive; ½ where
// nothing is known (a mean of 0 or of no products). "Is it positive" deviates from its share by √(φ(1 - φ)), so `error`, that times σ, is
// lost. Keys spread about the mean of their block, which it does not show: so the error's σ is a part of μ at least, without which heads
// beyond 13 σ would tie at 0.
struct LinearPart {
  float share, error;
};
__device__ __forceinline__ LinearPart linear_part(const Normal& x) {
  const float share = x.deviation > 0.f ? normcdff(x.mean / x.deviation) : x.mean > 0.f ? 1.f : x.mean < 0.f ? 0.f : 0.5f;
  const float spread = fmaxf(x.deviation, fabsf(x.mean) * SPREAD);
  if (!(spread > 0.f && spread <= FLT_MAX)) return {share, 0.f};
  const float tail = normcdff(-fabsf(x.mean / spread));
  return {share, spread * sqrtf(tail * (1.f - tail))};
}

}  // namespace
}  // namespace misa
