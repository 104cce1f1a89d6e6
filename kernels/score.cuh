// Routed-head scores of query rows against a flat run of index keys, handed to a sink as they are made.
//
//   s[t, l] = k_scale[l] · Σ_{j in head_ids[t]} w[t, j] · ReLU(q[t, j] · k[l])        for l in [ks[t], ke[t])
//
// A product is 64 keys (rows) × 256 columns, the columns being the (query, head) pairs of one warpgroup's QUERIES queries,
// ordered so that in the m64n256 accumulator fragment a thread holds every head of its own queries: no lane is shuffled.
// One warp feeds a ring of key tiles; every warpgroup reads each tile for its own queries and runs at its own pace. (Making
// them take turns at the tensor cores changed nothing: while one multiplies, the other's FP32 instructions take 2.4 cycles.)
#pragma once
#include <algorithm>
#include <climits>
#include <cstddef>

#include "output.cuh"
#include "sm90.cuh"

#ifndef MISA_HEADS
#define MISA_HEADS 8  // routed heads h: 4, 8, 16, 32 or 64
#endif

namespace misa {

constexpr int DIM = 128;                              // head dimension = bytes of a key
constexpr int HEADS = MISA_HEADS;
constexpr int COLUMNS = HEADS > 4 ? 256 : 128;        // of one product: 16 queries' settings a thread would not fit
constexpr int KEYS = 64;                              // rows of one product
constexpr int QUERIES = COLUMNS / HEADS;              // of a warpgroup
constexpr int LANE_QUERIES = QUERIES / 4;             // of a thread
constexpr int PAIRS = HEADS / 2;
constexpr int GROUPS = HEADS > 4 ? 2 : 3;             // warpgroups that multiply and fold
constexpr int ROWS = GROUPS * QUERIES;                // of a block
constexpr int TILE = 128;                             // keys of a ring stage
constexpr int STAGES = 4;
constexpr int CONSUMERS = GROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;              // and one warpgroup whose first warp feeds
constexpr int FEED_REGISTERS = 24, FOLD_REGISTERS = GROUPS == 2 ? 240 : 160;

// One launch of scoring: rows [first, first + rows), or row_list[first ...]; every stride-th key from `phase` on.
struct Task {
  const uint8_t* q;         // [T, all_heads, DIM] e4m3
  const float* gates;       // [T, all_heads]
  const int32_t* head_ids;  // [T, HEADS]
  const float* scale;       // [keys]
  const int32_t* starts;    // [T]
  const int32_t* ends;      // [T]
  const int32_t* row_list;  // or null
  int first, rows, all_heads, keys, stride, phase, splits;

  __device__ int row(int i) const { return row_list ? row_list[first + i] : first + i; }
  __device__ int sampled(int key) const { return (max(key - phase, 0) + stride - 1) / stride; }
  __device__ int2 window(int i) const {  // in units of scored keys; empty beyond the rows
    if (i >= rows) return {0, 0};
    int t = row(i), lo = max(starts[t], 0), hi = min(ends[t], keys);
    return hi > lo ? int2{sampled(lo), sampled(hi)} : int2{0, 0};
  }
};

struct Smem {
  alignas(1024) uint8_t queries[GROUPS][COLUMNS * DIM];
  alignas(1024) uint8_t keys[STAGES][TILE * DIM];
  float scale[STAGES][TILE];
  int2 window[GROUPS][QUERIES];
  uint64_t full[STAGES], empty[STAGES];
};

// What a block holds, and what its sink wants beside it.
template <class Sink>
struct Shared {
  Smem scorer;
  typename Sink::Shared sink;
};

// Shared-memory addresses of the ring. The shuffle tells the compiler that `base` is one value for the warp and not worth
// computing again, so that addresses and descriptors stay in uniform registers.
struct Places {
  uint32_t base;
  __device__ explicit Places(const Smem& s) : base(__shfl_sync(~0u, sm90::smem_address(&s), 0)) {}
  __device__ uint32_t full(int stage) const { return base + uint32_t(offsetof(Smem, full)) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + uint32_t(offsetof(Smem, empty)) + stage * 8; }
  __device__ uint32_t keys(int stage) const { return base + uint32_t(offsetof(Smem, keys)) + stage * TILE * DIM; }
  __device__ uint32_t scale(int stage) const { return base + uint32_t(offsetof(Smem, scale)) + stage * TILE * 4; }
};

struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
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
};

__device__ __forceinline__ void barriers_init(Smem& s) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      sm90::barrier_init(sm90::smem_address(&s.full[i]), 32 + 1);  // the feeding warp's lanes and the copy engine's expectation
      sm90::barrier_init(sm90::smem_address(&s.empty[i]), CONSUMERS / 32);
    }
    sm90::barrier_init_fence();
  }
  __syncthreads();
}

// The key tiles [begin, end) of a block of rows that split `split` visits: begin + split, begin + split + splits, ...
struct Item {
  int rows, split, begin, end;
  __device__ Item(const Task& task, int item) : rows(item / task.splits * ROWS), split(item % task.splits) {
    Extent extent(task, rows, ROWS);
    begin = extent.hi > 0 ? extent.lo / TILE + split : 0;
    end = extent.hi > 0 ? (extent.hi + TILE - 1) / TILE : 0;
  }
};

// The place of a thread in its warpgroup: which queries and which keys of a product it has the scores of.
struct Seat {
  int first;       // the warpgroup's first query
  int split;       // of the item
  int warp;        // of the warpgroup: keys warp · 16 … of a product
  int lane_row;    // key of the warp's first eight (+ 8 for the second half)
  int lane_query;  // this thread has queries first + 4q + lane_query
  __device__ int query(int q) const { return first + q * 4 + lane_query; }
  __device__ int key(int half) const { return warp * 16 + half * 8 + lane_row; }
};

__device__ __forceinline__ int items_of(const Task& task) { return (task.rows + ROWS - 1) / ROWS * task.splits; }

__device__ __forceinline__ void feed(const Task& task, const CUtensorMap* map, Smem& s, Ring& ring) {
  const int lane = threadIdx.x % 32;
  const int scored = task.sampled(task.keys);
  const Places places(s);
  for (int i = blockIdx.x; i < items_of(task); i += gridDim.x) {
    Item item(task, i);
    for (int tile = item.begin; tile < item.end; tile += task.splits, ring.advance()) {
      sm90::barrier_wait(places.empty(ring.stage), ring.parity ^ 1);
      if (lane == 0) {
        sm90::barrier_arrive_expect(places.full(ring.stage), TILE * DIM);
        sm90::copy_box(places.keys(ring.stage), map, places.full(ring.stage), 0, tile * TILE);
      }
#pragma unroll
      for (int k = lane; k < TILE; k += 32) {
        int key = tile * TILE + k;
        bool valid = key < scored;
        sm90::copy4(places.scale(ring.stage) + k * 4, task.scale + (valid ? int64_t(key) * task.stride + task.phase : 0), valid);
      }
      sm90::barrier_arrive_copies(places.full(ring.stage));
    }
  }
}

// Column n belongs to query (n/8 / PAIRS)·4 + (n%8)/2 and head slot (n/8 % PAIRS)·2 + n%2.
__device__ __forceinline__ void load_queries(const Task& task, int first, uint8_t* smem) {
#pragma unroll
  for (int n = threadIdx.x % 128; n < COLUMNS; n += 128) {
    const int query = first + n / 8 / PAIRS * 4 + n % 8 / 2, slot = n / 8 % PAIRS * 2 + n % 2;
    const uint4* source = nullptr;
    if (query < task.rows) {
      const int64_t t = task.row(query);
      source = reinterpret_cast<const uint4*>(task.q + (t * task.all_heads + task.head_ids[t * HEADS + slot]) * DIM);
    }
#pragma unroll
    for (int chunk = 0; chunk < DIM / 16; ++chunk) {
      uint4 value = source ? __ldg(source + chunk) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(smem + n * DIM + (chunk ^ (n % 8)) * 16) = value;
    }
  }
}

// A sink says what becomes of scores. Its Lane, made once an item and thread, is called for each product with
// take(scores[LANE_QUERIES][2], the product's first key, whether all keys are inside all windows, windows[QUERIES]), and
// once as finish() after the item's tiles.
template <class Sink>
__device__ __forceinline__ void consume(const Task& task, const Sink& sink, Shared<Sink>& shared, Ring& ring) {
  Smem& s = shared.scorer;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // seen by the compiler as one value for the warp
  const int lane = threadIdx.x % 32;
  const Places places(s);
  const uint64_t b = sm90::tile_descriptor(places.base + group * COLUMNS * DIM);
  const uint64_t a_tile = sm90::tile_descriptor(places.keys(0));

  for (int i = blockIdx.x; i < items_of(task); i += gridDim.x) {
    const Item item(task, i);
    const Seat seat{item.rows + group * QUERIES, item.split, int(threadIdx.x) / 32 % 4, lane / 4, lane % 4};
    const Extent extent(task, seat.first, QUERIES);

    sm90::named_barrier(1 + group, 128);  // the last item's products have been read
    load_queries(task, seat.first, s.queries[group]);
    if (threadIdx.x % 128 < QUERIES) s.window[group][threadIdx.x % 128] = task.window(seat.first + threadIdx.x % 128);
    sm90::fence_async_shared();
    sm90::named_barrier(1 + group, 128);

    float weight[LANE_QUERIES][HEADS];
#pragma unroll
    for (int q = 0; q < LANE_QUERIES; ++q) {
      const bool live = seat.query(q) < task.rows;
      const int64_t t = live ? task.row(seat.query(q)) : 0;
#pragma unroll
      for (int j = 0; j < HEADS; ++j)
        weight[q][j] = live ? task.gates[t * task.all_heads + task.head_ids[t * HEADS + j]] : 0.f;
    }
    typename Sink::Lane lane_sink(sink, shared.sink, task, seat);

    for (int tile = item.begin; tile < item.end; tile += task.splits) {
      sm90::barrier_wait(places.full(ring.stage), ring.parity);
#pragma unroll
      for (int product = 0; product < TILE / KEYS; ++product) {
        const int key0 = tile * TILE + product * KEYS;
        const float* scale = s.scale[ring.stage] + product * KEYS;
        const float scales[2] = {scale[seat.key(0)], scale[seat.key(1)]};
        const uint64_t a = a_tile + (ring.stage * TILE + product * KEYS) * DIM / 16;
        float d[COLUMNS / 2];
        sm90::mma_fence();
        sm90::mma(d, a, b);
#pragma unroll
        for (int k = 1; k < DIM / 32; ++k) sm90::mma_add(d, a + k * 2, b + k * 2);
        sm90::mma_commit();
        sm90::mma_wait<0>();
        sm90::pin(d);
        if (product == TILE / KEYS - 1) {
          __syncwarp();
          if (lane == 0) sm90::barrier_arrive(places.empty(ring.stage));
          ring.advance();
        }
        float score[LANE_QUERIES][2] = {};
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int bit = 0; bit < 2; ++bit) {
              const float x = d[n * 4 + half * 2 + bit];
              float& sum = score[n / PAIRS][half];
              sum = fmaf(fmaxf(x, 0.f), weight[n / PAIRS][n % PAIRS * 2 + bit], sum);
            }
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q)
#pragma unroll
          for (int half = 0; half < 2; ++half) score[q][half] *= scales[half];
        lane_sink.take(score, key0, key0 >= extent.all_lo && key0 + KEYS <= extent.all_hi, s.window[group]);
      }
    }
    lane_sink.finish();
  }
}

// Scores of keys outside their query's window become NaN, which is above no threshold.
__device__ __forceinline__ void drop_outside(float (&score)[LANE_QUERIES][2], const Seat& seat, int key0, const int2* windows) {
#pragma unroll
  for (int q = 0; q < LANE_QUERIES; ++q) {
    const int2 w = windows[q * 4 + seat.lane_query];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key0 + seat.key(half);
      if (key < w.x || key >= w.y) score[q][half] = NAN;
    }
  }
}

// Every score into memory, at the key's own column or from the row's start on; nothing outside the windows.
struct Logits {
  float* out;  // [rows, ld]
  int64_t ld;
  bool from_start;

  struct Shared {};

  struct Lane {
    const Logits& to;
    const Seat seat;
    __device__ Lane(const Logits& sink, Shared&, const Task&, const Seat& seat) : to(sink), seat(seat) {}
    __device__ void take(float (&score)[LANE_QUERIES][2], int key0, bool, const int2* windows) {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        const int2 w = windows[q * 4 + seat.lane_query];
        float* row = to.out + int64_t(seat.query(q)) * to.ld - (to.from_start ? w.x : 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = key0 + seat.key(half);
          if (key >= w.x && key < w.y) row[key] = score[q][half];
        }
      }
    }
    __device__ void finish() {}
  };
};

template <class Sink>
__global__ void __launch_bounds__(THREADS, 1)
    score_kernel(const __grid_constant__ Task task, const __grid_constant__ Sink sink, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<Sink>*>(raw);
  barriers_init(shared.scorer);
  Ring ring;
  if (threadIdx.x >= CONSUMERS) {
    sm90::fewer_registers<FEED_REGISTERS>();
    if (threadIdx.x < CONSUMERS + 32) feed(task, &map, shared.scorer, ring);
  } else {
    sm90::more_registers<FOLD_REGISTERS>();
    consume(task, sink, shared, ring);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Rows of 128 bytes, `stride` rows apart, starting at row `phase`.
CUtensorMap key_map(int64_t k, int keys, int stride, int phase) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), "cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const int scored = (keys - phase + stride - 1) / stride;
  cuuint64_t extent[2] = {DIM, cuuint64_t(scored > 0 ? scored : 1)}, pitch[1] = {cuuint64_t(stride) * DIM};
  cuuint32_t box[2] = {DIM, TILE}, step[2] = {1, 1};
  CUtensorMap map;
  CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, pointer<void>(k + (scored > 0 ? int64_t(phase) * DIM : 0)),
                           extent, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: CUDA driver error " << int(status);
  return map;
}

struct Shape {
  int multiprocessors = 0;
  Shape() {
    int device;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  }
};

// The inputs of a call: addresses of q, gates, head_ids, k, scale, starts, ends; then all_heads and keys.
struct Inputs {
  Task task{};
  int64_t k;
  explicit Inputs(const tvm::ffi::Array<int64_t>& v) : k(v[3]) {
    task.q = pointer<uint8_t>(v[0]), task.gates = pointer<float>(v[1]), task.head_ids = pointer<int32_t>(v[2]);
    task.scale = pointer<float>(v[4]), task.starts = pointer<int32_t>(v[5]), task.ends = pointer<int32_t>(v[6]);
    task.all_heads = int(v[7]), task.keys = int(v[8]), task.stride = 1, task.splits = 1;
  }
  Task rows(int first, int count, int splits) const {
    Task part = task;
    part.first = first, part.rows = count, part.splits = splits;
    return part;
  }
};

template <class Sink>
void launch_score(const Task& task, int64_t k, const Sink& sink, const Shape& shape, cudaStream_t stream) {
  const auto kernel = score_kernel<Sink>;
  allow_shared(kernel, sizeof(Shared<Sink>));
  const int items = (task.rows + ROWS - 1) / ROWS * task.splits;
  kernel<<<std::min(items, shape.multiprocessors), THREADS, sizeof(Shared<Sink>), stream>>>(task, sink, key_map(k, task.keys, task.stride, task.phase));
  check(cudaGetLastError(), "score_kernel");
}

}  // namespace misa
