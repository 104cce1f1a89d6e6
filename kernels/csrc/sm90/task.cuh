// What one launch of the scorer is asked: which rows, by which of their heads, and which keys each sees.
#pragma once
#include <climits>

#include "inputs.cuh"
#include "ptx.cuh"
#include "shape.cuh"

namespace misa {
namespace {

constexpr int DIM = 128;                              // head dimension = bytes of a key
constexpr int ROUTED_HEADS = COLUMNS - RESIDUAL;      // the residual, if there is one, is the column behind them
constexpr int PRODUCT_COLUMNS = COLUMNS > 4 ? 256 : 128;  // of one product: 16 queries' settings a thread would not fit
constexpr int KEYS = 64;                              // rows of one product
constexpr int QUERIES = PRODUCT_COLUMNS / COLUMNS;    // of a warpgroup
constexpr int LANE_QUERIES = QUERIES / 4;             // of a thread
constexpr int PAIRS = COLUMNS / 2;
constexpr int GROUPS = COLUMNS > 4 ? 2 : 3;           // warpgroups that multiply and fold
constexpr int ROWS = GROUPS * QUERIES;                // of a block
constexpr int TILE = 128;                             // keys that are visited at once
constexpr int CONSUMERS = GROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;              // and one warpgroup whose first warp feeds

// One launch of scoring: rows [first, first + rows), or row_list[first ...]; all keys, or one in `stride` of them (sample.cuh).
struct Task {
  const uint8_t* q;         // [T, all_heads, DIM] e4m3
  const float* gates;       // [T, all_heads]
  const int32_t* head_ids;  // [T, ROUTED_HEADS]
  const float* scale;       // of the scored keys
  const int32_t* starts;    // [T]
  const int32_t* ends;      // [T]
  const int32_t* row_list;  // or null
  const int32_t* division;  // a Division, or null: all row blocks alike
  ResidualColumn residual;  // if RESIDUAL
  int first, rows, all_heads, keys, stride;

  __host__ __device__ int scored() const { return (keys + stride - 1) / stride; }
  // The key that stands for the ith `stride` keys. Its place among them is hashed, so that no period of the keys is in step with it.
  __host__ __device__ int key(int i) const {
    uint32_t hash = uint32_t(i) * 0x9E3779B1u;
    hash = (hash ^ hash >> 15) * 0x85EBCA6Bu;
    hash ^= hash >> 13;
    const int among = keys - i * stride < stride ? keys - i * stride : stride;
    return i * stride + int(uint64_t(hash) * among >> 32);
  }
  __device__ int blocks() const { return (rows + ROWS - 1) / ROWS; }
  __device__ int row(int i) const { return row_list ? row_list[first + i] : first + i; }
  // Column `slot` of row t: its query, and its weight.
  static constexpr __device__ bool linear(int slot) { return slot == ROUTED_HEADS; }
  __device__ const uint8_t* query(int64_t t, int slot) const {
    return linear(slot) ? residual.query + t * DIM : q + (t * all_heads + head_ids[t * ROUTED_HEADS + slot]) * DIM;
  }
  __device__ float weight(int64_t t, int slot) const {
    return linear(slot) ? residual.scale[t] : gates[t * all_heads + head_ids[t * ROUTED_HEADS + slot]];
  }
  // Scored keys before one of all keys.
  __device__ int before(int limit) const {
    if (stride == 1) return limit;
    const int i = limit / stride;
    return i + (limit > i * stride && key(i) < limit);
  }
  __device__ int2 window(int i) const {  // in units of scored keys; empty beyond the rows
    if (i >= rows) return {0, 0};
    int t = row(i), lo = max(starts[t], 0), hi = min(ends[t], keys);
    return hi > lo ? int2{before(lo), before(hi)} : int2{0, 0};
  }
};

// Extent of `count` windows as seen by one warp: the union, and what all of them share.
struct Extent {
  int lo = INT_MAX, hi = 0, all_lo = 0, all_hi = INT_MAX;
  __device__ Extent(const Task& task, int first, int count) {
    for (int i = threadIdx.x % 32; i < count; i += 32) {
      int2 w = task.window(first + i);
      if (w.y > w.x) lo = min(lo, w.x), hi = max(hi, w.y);
      all_lo = max(all_lo, w.x), all_hi = min(all_hi, w.y);
    }
    lo = __reduce_min_sync(~0u, lo), hi = __reduce_max_sync(~0u, hi);
    all_lo = __reduce_max_sync(~0u, all_lo), all_hi = __reduce_min_sync(~0u, all_hi);
  }
  __device__ int first_tile() const { return hi > 0 ? lo / TILE : 0; }
  __device__ int end_tile() const { return hi > 0 ? (hi + TILE - 1) / TILE : 0; }
};

// ---- host -----------------------------------------------------------------------------------------------------------

// Scores of rows [first, first + rows) of a call, by all its keys.
inline Task task_of(const Inputs& in, int first, int rows) {
  return {in.index_q, in.head_gates, in.head_ids, in.k_scale, in.ks, in.ke, nullptr, nullptr, in.residual, first, rows, in.index_heads, in.keys, 1};
}

}  // namespace
}  // namespace misa
