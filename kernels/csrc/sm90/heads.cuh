// A query's index heads in one warp: the choice of those that are scored, and the residual query that stands for the others.
#pragma once
#include <cfloat>
#include <climits>

#include "ptx.cuh"
#include "shape.cuh"

namespace misa {
namespace {

constexpr int DIM = 128;                      // head dimension
constexpr int WARP_HEADS = INDEX_HEADS / 32;  // of a lane when a warp ranks
constexpr int ROW_THREADS = 256;              // of the kernels that take one warp a row

enum Router : int { MEAN, PEAK, SIGNED, WEIGHT, ERROR };  // as in layout.py; by error, prefill's heads are chosen in choose_heads.cu

// Integers in the order of the numbers: -0 equals 0, and a NaN is below them all.
__device__ __forceinline__ int order(float x) {
  const int bits = x == 0.f ? 0 : __float_as_int(x);
  return x != x ? INT_MIN : bits < 0 ? bits ^ INT_MAX : bits;
}

// Writes the `heads` heads with the largest keys, ascending; lane l brings those of heads l and l + 32, and learns which are chosen.
// Among equals the lower head goes first.
__device__ __forceinline__ void choose(const int (&key)[WARP_HEADS], int heads, int32_t* out, bool (&chosen)[WARP_HEADS]) {
  const int lane = threadIdx.x % 32;
  int before[WARP_HEADS] = {};
#pragma unroll
  for (int other = 0; other < 32; ++other)
#pragma unroll
    for (int i = 0; i < WARP_HEADS; ++i) {
      const int theirs = __shfl_sync(~0u, key[i], other);
#pragma unroll
      for (int mine = 0; mine < WARP_HEADS; ++mine)
        before[mine] += theirs > key[mine] || (theirs == key[mine] && (i < mine || (i == mine && other < lane)));
    }
#pragma unroll
  for (int i = 0; i < WARP_HEADS; ++i) {
    chosen[i] = before[i] < heads;
    const uint32_t all = __ballot_sync(~0u, chosen[i]);
    if (chosen[i]) out[__popc(all & ((1u << lane) - 1))] = i * 32 + lane;
    out += __popc(all);
  }
}

// The gate in the residual: 0 of a head that is chosen, or not finite.
__device__ __forceinline__ float residual_gate(bool chosen, float gate, float share) {
  const float own = gate * share;
  return !chosen && fabsf(own) <= FLT_MAX ? own : 0.f;
}

// How a warp takes a row's queries: a lane has a piece of 16 dimensions of every fourth head.
constexpr int PIECES = DIM / 16, HEAD_STEP = 32 / PIECES;

__device__ __forceinline__ uint4 query_piece(const uint8_t* q, int64_t t, int head, int piece) {
  return __ldg(reinterpret_cast<const uint4*>(q + (t * INDEX_HEADS + head) * DIM) + piece);
}

__device__ __forceinline__ uint4 without_nan(const uint4& bytes) {
  return {sm90::no_nan(bytes.x), sm90::no_nan(bytes.y), sm90::no_nan(bytes.z), sm90::no_nan(bytes.w)};
}

// Calls take(dimension, number) for each of a piece.
template <class Take>
__device__ __forceinline__ void each_number(const uint4& bytes, Take take) {
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int pair = 0; pair < 8; ++pair) {
    const float2 two = sm90::of_e4m3(uint16_t(words[pair / 2] >> pair % 2 * 16));
    take(pair * 2, two.x), take(pair * 2 + 1, two.y);
  }
}

// Writes row t's residual in e4m3 and what it is to be multiplied with, by what each lane has summed of its piece.
__device__ __forceinline__ void write_residual(const float (&sum)[16], int64_t t, uint32_t* query, float* scale) {
  constexpr float LARGEST = 448.f;  // e4m3
  const int lane = threadIdx.x % 32, piece = lane % PIECES, part = lane / PIECES;
  // Each of two lanes keeps the sums of half of their dimensions: eight, then four.
  const bool upper = part / 2, odd = part % 2;
  float half[8], own[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) half[i] = (upper ? sum[i + 8] : sum[i]) + __shfl_xor_sync(~0u, upper ? sum[i] : sum[i + 8], 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = (odd ? half[i + 4] : half[i]) + __shfl_xor_sync(~0u, odd ? half[i] : half[i + 4], 8);
  uint32_t most = 0;  // as bits, NaN is above infinity and that above all others
#pragma unroll
  for (int i = 0; i < 4; ++i) most = max(most, __float_as_uint(fabsf(own[i])));
  float step = __uint_as_float(__reduce_max_sync(~0u, most)) / LARGEST;
  const bool none = !(step > 0.f && step <= FLT_MAX);
  if (none) step = 1.f;
  const uint32_t low = sm90::to_e4m3({own[0] / step, own[1] / step}), high = sm90::to_e4m3({own[2] / step, own[3] / step});
  query[t * DIM / 4 + piece * 4 + upper * 2 + odd] = none ? 0 : low | high << 16;
  if (lane == 0) scale[t] = step;
}

// The residual query Σ_j gates[t, j] · q[t, j]. Gates are finite; a NaN in a query is 0.
__global__ void __launch_bounds__(ROW_THREADS)
    residual_kernel(const uint8_t* q, const float* gates, int rows, uint32_t* query, float* scale) {
  sm90::launch_wait();
  const int64_t t = (int64_t(blockIdx.x) * ROW_THREADS + threadIdx.x) / 32;
  if (t >= rows) return;
  const int piece = threadIdx.x % PIECES, part = threadIdx.x % 32 / PIECES;
  float sum[16] = {};
#pragma unroll 8
  for (int j = part; j < INDEX_HEADS; j += HEAD_STEP) {
    const float gate = __ldg(gates + t * INDEX_HEADS + j);
    each_number(without_nan(query_piece(q, t, j, piece)), [&](int i, float x) { sum[i] = fmaf(gate, x, sum[i]); });
  }
  write_residual(sum, t, query, scale);
}

}  // namespace
}  // namespace misa
