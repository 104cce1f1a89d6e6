// Routed-head scores of query rows against a flat run of index keys, and the exact top k of them, without a score matrix.
//
//   s[t, l] = k_scale[l] · Σ_{j in head_ids[t]} w[t, j] · ReLU(q[t, j] · k[l])        for l in [ks[t], ke[t])
//
// A tile is 64 keys (rows) × 128 columns, the columns being the (query, head) pairs of one warpgroup's QUERIES queries,
// ordered so that in the m64n128 accumulator fragment a thread holds every head of its own queries: no lane is shuffled.
// One warp feeds a ring of key tiles; every warpgroup reads each tile for its own queries and runs at its own pace.
//
// Top k: (1) score every `stride`-th key, (2) take a quantile of that sample as the row's threshold, (3) score all keys and
// append what passes to buffers that each thread owns alone, (4) take the exact top k of the appended, (5) rows that came
// out short or overflowed are scored into memory and selected there. See score_ragged.py for the statistics.
#include <algorithm>
#include <climits>
#include <cstddef>

#include "output.cuh"
#include "select.cuh"
#include "sm90.cuh"

#ifndef MISA_HEADS
#define MISA_HEADS 8  // routed heads h: 4, 8, 16, 32 or 64
#endif

namespace misa {

constexpr int DIM = 128;                              // head dimension = bytes of a key
constexpr int HEADS = MISA_HEADS;
constexpr int COLUMNS = 128;                          // columns of one matrix product
constexpr int KEYS = 64;                              // rows of one matrix product
constexpr int PASSES = HEADS > 32 ? HEADS / 32 : 1;   // products for all heads of a query
constexpr int PASS_HEADS = HEADS / PASSES;
constexpr int QUERIES = COLUMNS / PASS_HEADS;         // of a warpgroup
constexpr int LANE_QUERIES = QUERIES / 4;             // of a thread
constexpr int PAIRS = PASS_HEADS / 2;
constexpr int GROUPS = 2;                             // consumer warpgroups; more would leave no registers for two products
constexpr int ROWS = GROUPS * QUERIES;                // of a block
constexpr int TILE = 128;                             // keys of a ring stage
constexpr int STAGES = 4;
constexpr int CONSUMERS = GROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;              // and one warpgroup whose first warp feeds
constexpr int FEED_REGISTERS = 24, FOLD_REGISTERS = 240;
constexpr int SUBS = 32;                              // private buffers of a row and split: 4 warps × 8 lane rows
constexpr int BURST = TILE / 32;                      // entries that one tile may bring to a private buffer

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
  // collect: what is above the row's threshold
  const float* threshold;   // [rows]
  uint2* entries;           // [rows, splits, SUBS, capacity] of (score bits, key)
  int32_t* counts;          // [rows, splits, SUBS]; -1 marks an overflow
  int capacity;
  // logits: every score, at the key's own column or from the row's start
  float* logits;            // [rows, ld]
  int64_t ld;
  bool from_start;

  __device__ int row(int i) const { return row_list ? row_list[first + i] : first + i; }
  __device__ int sampled(int key) const { return (max(key - phase, 0) + stride - 1) / stride; }
  __device__ int2 window(int i) const {  // in units of scored keys; empty beyond the rows
    if (i >= rows) return {0, 0};
    int t = row(i), lo = max(starts[t], 0), hi = min(ends[t], keys);
    return hi > lo ? int2{sampled(lo), sampled(hi)} : int2{0, 0};
  }
};

enum class Mode { Collect, Logits };

struct Smem {
  alignas(1024) uint8_t queries[GROUPS][PASSES][COLUMNS * DIM];
  alignas(1024) uint8_t keys[STAGES][TILE * DIM];
  float scale[STAGES][TILE];
  int2 window[GROUPS][QUERIES];
  uint64_t full[STAGES], empty[STAGES];
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

// Column n of a pass belongs to query (n/8 / PAIRS)·4 + (n%8)/2 and head slot (n/8 % PAIRS)·2 + n%2.
__device__ __forceinline__ void load_queries(const Task& task, int first, uint8_t (*smem)[COLUMNS * DIM]) {
  const int n = threadIdx.x % 128;
  const int query = first + n / 8 / PAIRS * 4 + n % 8 / 2;
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int slot = pass * PASS_HEADS + n / 8 % PAIRS * 2 + n % 2;
    const uint4* source = nullptr;
    if (query < task.rows) {
      const int64_t t = task.row(query);
      source = reinterpret_cast<const uint4*>(task.q + (t * task.all_heads + task.head_ids[t * HEADS + slot]) * DIM);
    }
#pragma unroll
    for (int chunk = 0; chunk < DIM / 16; ++chunk) {
      uint4 value = source ? __ldg(source + chunk) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(smem[pass] + n * DIM + (chunk ^ (n % 8)) * 16) = value;
    }
  }
}

template <Mode MODE>
__device__ __forceinline__ void consume(const Task& task, Smem& s, Ring& ring) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // seen by the compiler as the same in all lanes
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int lane_row = lane / 4, lane_query = lane % 4;
  const Places places(s);
  const uint64_t b_tile = sm90::tile_descriptor(places.base + group * PASSES * COLUMNS * DIM);
  const uint64_t a_tile = sm90::tile_descriptor(places.keys(0));

  for (int i = blockIdx.x; i < items_of(task); i += gridDim.x) {
    const Item item(task, i);
    if (item.begin >= item.end && MODE == Mode::Logits) continue;
    const int first = item.rows + group * QUERIES;
    const Extent extent(task, first, QUERIES);

    sm90::named_barrier(1 + group, 128);  // the last item's products have been read
    load_queries(task, first, s.queries[group]);
    if (threadIdx.x % 128 < QUERIES) s.window[group][threadIdx.x % 128] = task.window(first + threadIdx.x % 128);
    sm90::fence_async_shared();
    sm90::named_barrier(1 + group, 128);

    float weight[PASSES][LANE_QUERIES][PASS_HEADS];
    float threshold[LANE_QUERIES];
    uint32_t offset[LANE_QUERIES], limit[LANE_QUERIES];
    const uint32_t query_stride = 4u * task.splits * SUBS * task.capacity;
    const uint32_t offset0 =
        ((uint32_t(first + lane_query) * task.splits + item.split) * SUBS + warp * 8 + lane_row) * task.capacity;
#pragma unroll
    for (int q = 0; q < LANE_QUERIES; ++q) {
      const int query = first + q * 4 + lane_query;
      const bool live = query < task.rows;
      const int64_t t = live ? task.row(query) : 0;
#pragma unroll
      for (int j = 0; j < HEADS; ++j)  // half the weight: ReLU(x) = (x + |x|) / 2
        weight[j / PASS_HEADS][q][j % PASS_HEADS] =
            live ? 0.5f * task.gates[t * task.all_heads + task.head_ids[t * HEADS + j]] : 0.f;
      if constexpr (MODE == Mode::Collect) {
        threshold[q] = live ? task.threshold[query] : INFINITY;
        offset[q] = offset0 + q * query_stride;
        limit[q] = offset[q] + task.capacity - BURST;
      }
    }

    const auto multiply = [&](float (&d)[64], int stage, int half, int pass) {
      const uint64_t a = a_tile + (stage * TILE + half * KEYS) * DIM / 16, b = b_tile + pass * COLUMNS * DIM / 16;
      sm90::mma_fence();
      sm90::mma(d, a, b);
#pragma unroll
      for (int k = 1; k < DIM / 32; ++k) sm90::mma_add(d, a + k * 2, b + k * 2);
      sm90::mma_commit();
    };

    const auto fold = [&](float (&d)[64], float (&score)[LANE_QUERIES][2], int pass) {
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int bit = 0; bit < 2; ++bit) {
            const float x = d[n * 4 + half * 2 + bit];
            float& sum = score[n / PAIRS][half];
            sum = fmaf(x + fabsf(x), weight[pass][n / PAIRS][n % PAIRS * 2 + bit], sum);
          }
    };

    const auto emit = [&](float (&score)[LANE_QUERIES][2], float scale0, float scale1, int key0) {
      const int key = key0 + warp * 16 + lane_row;
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) score[q][0] *= scale0, score[q][1] *= scale1;
      if constexpr (MODE == Mode::Collect) {
        if (key0 < extent.all_lo || key0 + KEYS > extent.all_hi) {
#pragma unroll
          for (int q = 0; q < LANE_QUERIES; ++q) {
            const int2 w = s.window[group][q * 4 + lane_query];
#pragma unroll
            for (int half = 0; half < 2; ++half)
              if (key + half * 8 < w.x || key + half * 8 >= w.y) score[q][half] = NAN;  // above no threshold
          }
        }
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            asm volatile(
                "{\n"
                ".reg .pred hit;\n"
                ".reg .u64 place;\n"
                "setp.gt.f32 hit, %1, %2;\n"
                "mad.wide.u32 place, %0, 8, %4;\n"
                "@hit st.global.v2.b32 [place], {%1, %3};\n"
                "@hit add.u32 %0, %0, 1;\n"
                "}\n"
                : "+r"(offset[q])
                : "f"(score[q][half]), "f"(threshold[q]), "r"(key + half * 8), "l"(task.entries)
                : "memory");
      } else {
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q) {
          const int2 w = s.window[group][q * 4 + lane_query];
          float* out = task.logits + int64_t(first + q * 4 + lane_query) * task.ld - (task.from_start ? w.x : 0);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (key + half * 8 >= w.x && key + half * 8 < w.y) out[key + half * 8] = score[q][half];
        }
      }
    };

    // Ends collecting where a buffer might not hold what the next tile brings.
    const auto guard = [&] {
      if constexpr (MODE == Mode::Collect) {
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q) threshold[q] = offset[q] > limit[q] ? INFINITY : threshold[q];
      }
    };

    const int tiles = item.begin < item.end ? (item.end - item.begin + task.splits - 1) / task.splits : 0;
    const auto release = [&] {
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(places.empty(ring.stage));
      ring.advance();
    };
    // Two products are in flight: the second multiplies while the first is folded. They are the halves of a tile of keys, or
    // of one half's heads where a query has more than a product holds. (Keeping one in flight from tile to tile would be
    // better yet, but ptxas then makes them wait for each other.)
    float d0[64], d1[64];
    for (int tile = 0; tile < tiles; ++tile) {
      const int key0 = (item.begin + tile * task.splits) * TILE;
      sm90::barrier_wait(places.full(ring.stage), ring.parity);
      const float* scale = s.scale[ring.stage] + warp * 16 + lane_row;
      const float scale0 = scale[0], scale1 = scale[8], scale2 = scale[KEYS], scale3 = scale[KEYS + 8];
      float score0[LANE_QUERIES][2] = {}, score1[LANE_QUERIES][2] = {};
      if constexpr (PASSES == 1) {
        multiply(d0, ring.stage, 0, 0);
        multiply(d1, ring.stage, 1, 0);
        sm90::mma_wait<1>();
        sm90::pin(d0);
        fold(d0, score0, 0);
        emit(score0, scale0, scale1, key0);
        sm90::mma_wait<0>();
        sm90::pin(d1);
        release();
        fold(d1, score1, 0);
        emit(score1, scale2, scale3, key0 + KEYS);
      } else {
        multiply(d0, ring.stage, 0, 0);
        multiply(d1, ring.stage, 0, 1);
        sm90::mma_wait<1>();
        sm90::pin(d0);
        fold(d0, score0, 0);
        sm90::mma_wait<0>();
        sm90::pin(d1);
        fold(d1, score0, 1);
        emit(score0, scale0, scale1, key0);
        multiply(d0, ring.stage, 1, 0);
        multiply(d1, ring.stage, 1, 1);
        sm90::mma_wait<1>();
        sm90::pin(d0);
        fold(d0, score1, 0);
        sm90::mma_wait<0>();
        sm90::pin(d1);
        release();
        fold(d1, score1, 1);
        emit(score1, scale2, scale3, key0 + KEYS);
      }
      guard();
    }

    if constexpr (MODE == Mode::Collect) {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        const uint32_t query = first + q * 4 + lane_query;
        if (query < task.rows)
          task.counts[(int64_t(query) * task.splits + item.split) * SUBS + warp * 8 + lane_row] =
              offset[q] > limit[q] ? -1 : int(offset[q] - offset0 - q * query_stride);
      }
    }
  }
}

template <Mode MODE>
__global__ void __launch_bounds__(THREADS, 1) score_kernel(const __grid_constant__ Task task, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Smem& s = *reinterpret_cast<Smem*>(raw);
  barriers_init(s);
  Ring ring;
  if (threadIdx.x >= CONSUMERS) {
    sm90::fewer_registers<FEED_REGISTERS>();
    if (threadIdx.x < CONSUMERS + 32) feed(task, &map, s, ring);
  } else {
    sm90::more_registers<FOLD_REGISTERS>();
    consume<MODE>(task, s, ring);
  }
}

constexpr int CUT_THREADS = 256, SELECT_THREADS = 512;

// Threshold of each row from its sampled scores; the first block also empties the list of failed rows.
__global__ void __launch_bounds__(CUT_THREADS)
    threshold_kernel(const __grid_constant__ Task task, int rank, int k, float* threshold, int32_t* failed) {
  using Block = Select<CUT_THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Smem smem;
  const int i = blockIdx.x, t = task.row(i);
  if (failed && i == 0 && threadIdx.x == 0) *failed = 0;
  const int2 w = task.window(i);
  const int length = min(task.ends[t], task.keys) - max(task.starts[t], 0), n = w.y - w.x;
  float value = -INFINITY;
  if (length <= k) {
    value = INFINITY;  // every visible token is taken: nothing to collect
  } else if (n > rank) {
    const float* logits = task.logits + i * task.ld;
    uint32_t least = ~0u, most = 0;
    Block::each([&](int j) { return rank_key(__ldcg(logits + j)); }, n, [&](uint32_t key, int j) {
      staged[j] = key;
      least = min(least, key), most = max(most, key);
    });
    const auto all = Block::range(smem, least, most, rank, n);
    const auto cut = Block::narrow(smem, all, [&](int j) { return staged[j]; }, n, 0, max(1, rank / 32));
    // Where many scores tie at the cut (zeros, mostly), they are left out: better short than overflowing.
    value = rank_value(cut.inside - cut.need <= max(1, rank / 8) ? cut.lo : cut.lo + 1);
  }
  if (threadIdx.x == 0) threshold[i] = value;
}

// Exact top k of each row's appended entries; a row that cannot be answered from them goes on the failed list.
__global__ void __launch_bounds__(SELECT_THREADS) select_kernel(const __grid_constant__ Task task, const __grid_constant__ Output output, int room, int32_t* failed) {
  using Block = Select<SELECT_THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Smem smem;
  __shared__ int begin[SELECT_THREADS + 1];
  uint32_t* keys = staged;
  int32_t* index = reinterpret_cast<int32_t*>(staged + room);

  const int i = blockIdx.x, t = task.first + i, k = output.k;
  const int start = max(task.starts[t], 0), length = max(min(task.ends[t], task.keys) - start, 0);
  int32_t* out = output.out + int64_t(t) * k;
  if (length <= k) {
    for (int j = threadIdx.x; j < k; j += SELECT_THREADS) out[j] = j < length ? output.place(t, j) : -1;
    return;
  }
  const int buffers = task.splits * SUBS;
  const int count = threadIdx.x < buffers ? task.counts[int64_t(i) * buffers + threadIdx.x] : 0;
  const bool overflow = __syncthreads_or(count < 0);
  const int after = Block::scan(smem, count);
  if (threadIdx.x < buffers) begin[threadIdx.x + 1] = after;
  if (threadIdx.x == 0) begin[0] = 0;
  __syncthreads();
  const int total = begin[buffers];
  if (overflow || total < k || total > room) {
    if (threadIdx.x == 0) failed[1 + atomicAdd(failed, 1)] = t;
    return;
  }
  // Half a warp a buffer, two entries (16 bytes) a lane.
  uint32_t least = ~0u, most = 0;
  for (int buffer = threadIdx.x / 16; buffer < buffers; buffer += SELECT_THREADS / 16) {
    const uint4* from = reinterpret_cast<const uint4*>(task.entries + (int64_t(i) * buffers + buffer) * task.capacity);
    const int at = begin[buffer], n = begin[buffer + 1] - at;
#pragma unroll 4
    for (int j = threadIdx.x % 16 * 2; j < n; j += 32) {
      const uint4 two = __ldcg(from + j / 2);
      const uint32_t key0 = rank_key(__uint_as_float(two.x));
      keys[at + j] = key0, index[at + j] = two.y;
      least = min(least, key0), most = max(most, key0);
      if (j + 1 < n) {
        const uint32_t key1 = rank_key(__uint_as_float(two.z));
        keys[at + j + 1] = key1, index[at + j + 1] = two.w;
        least = min(least, key1), most = max(most, key1);
      }
    }
  }
  const auto all = Block::range(smem, least, most, k, total);
  Block::top(smem, all, [&](int j) { return keys[j]; }, [&](int j) { return index[j]; }, total,
             [&](int place, int j) { out[place] = output.place(t, index[j] - start); });
}

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

// Failed rows, `at_once` of them at a time: all their scores into memory, then the exact top k.
__global__ void __launch_bounds__(THREADS, 1)
    redo_kernel(const __grid_constant__ Task whole, const __grid_constant__ CUtensorMap map, const __grid_constant__ Output output,
                int at_once, const int32_t* failed, int32_t* meeting) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Block = Select<CONSUMERS>;
  __shared__ Block::Smem smem;
  const int count = *failed;
  if (count == 0) return;
  Smem& s = *reinterpret_cast<Smem*>(raw);
  barriers_init(s);
  Ring ring;
  const auto part = [&](int first) {
    Task task = whole;
    task.row_list = failed + 1, task.first = first, task.rows = min(at_once, count - first);
    task.splits = max(1, int(gridDim.x) / ((task.rows + ROWS - 1) / ROWS));
    return task;
  };
  if (threadIdx.x >= CONSUMERS) {
    sm90::fewer_registers<FEED_REGISTERS>();
    if (threadIdx.x < CONSUMERS + 32)
      for (int first = 0; first < count; first += at_once) feed(part(first), &map, s, ring);
  } else {
    sm90::more_registers<FOLD_REGISTERS>();
    int round = 0;
    for (int first = 0; first < count; first += at_once) {
      const Task task = part(first);
      consume<Mode::Logits>(task, s, ring);
      meet(meeting, round);
      for (int i = blockIdx.x; i < task.rows; i += gridDim.x) {
        const int t = task.row(i);
        const int2 w = task.window(i);
        const float* logits = task.logits + i * task.ld;
        int32_t* out = output.out + int64_t(t) * output.k;
        const auto key = [&](int j) { return rank_key(__ldcg(logits + j)); };
        uint32_t least = ~0u, most = 0;
        Block::each(key, w.y - w.x, [&](uint32_t k, int) { least = min(least, k), most = max(most, k); });
        const auto all = Block::range(smem, least, most, output.k, w.y - w.x);
        Block::top(smem, all, key, [](int j) { return j; }, w.y - w.x,
                   [&](int place, int j) { out[place] = output.place(t, j); });
      }
      meet(meeting, round);
    }
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

// The inputs of one call, kept between its launches. All addresses are device pointers.
struct Call {
  Task task{};
  int64_t k = 0;
};

Call call_of(int64_t q, int64_t gates, int64_t head_ids, int64_t k, int64_t scale, int64_t starts, int64_t ends, int64_t all_heads, int64_t keys) {
  Call call;
  call.task.q = pointer<uint8_t>(q), call.task.gates = pointer<float>(gates), call.task.head_ids = pointer<int32_t>(head_ids);
  call.task.scale = pointer<float>(scale), call.task.starts = pointer<int32_t>(starts), call.task.ends = pointer<int32_t>(ends);
  call.task.all_heads = int(all_heads), call.task.keys = int(keys), call.task.stride = 1, call.task.splits = 1;
  call.k = k;
  return call;
}

template <Mode MODE>
void launch_score(const Task& task, int64_t k, cudaStream_t stream) {
  const auto kernel = score_kernel<MODE>;
  allow_shared(kernel, sizeof(Smem));
  const int items = (task.rows + ROWS - 1) / ROWS * task.splits;
  kernel<<<std::min(items, Shape().multiprocessors), THREADS, sizeof(Smem), stream>>>(task, key_map(k, task.keys, task.stride, task.phase));
  check(cudaGetLastError(), "score_kernel");
}

// Scores of rows [first, first + rows) on every stride-th key from `phase` on, into logits [rows, ld].
void logits(tvm::ffi::Array<int64_t> inputs, int64_t first, int64_t rows, int64_t splits, int64_t stride, int64_t phase,
            int64_t out, int64_t ld, bool from_start, int64_t stream) {
  Call call = call_of(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8]);
  Task& task = call.task;
  task.first = int(first), task.rows = int(rows), task.splits = int(splits), task.stride = int(stride), task.phase = int(phase);
  task.logits = pointer<float>(out), task.ld = ld, task.from_start = from_start;
  launch_score<Mode::Logits>(task, call.k, pointer<CUstream_st>(stream));
}

// Thresholds [rows] at `rank` of the sampled logits; rows of at most k keys get +inf, too small samples -inf.
void thresholds(tvm::ffi::Array<int64_t> inputs, int64_t first, int64_t rows, int64_t stride, int64_t phase, int64_t sampled,
                int64_t ld, int64_t rank, int64_t k, int64_t out, int64_t failed, int64_t stream) {
  Task task = call_of(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8]).task;
  task.first = int(first), task.rows = int(rows), task.stride = int(stride), task.phase = int(phase);
  task.logits = pointer<float>(sampled), task.ld = ld;
  const int bytes = int(ld) * 4;  // a row of samples
  allow_shared(threshold_kernel, bytes);
  threshold_kernel<<<rows, CUT_THREADS, bytes, pointer<CUstream_st>(stream)>>>(task, int(rank), int(k), pointer<float>(out), pointer<int32_t>(failed));
  check(cudaGetLastError(), "threshold_kernel");
}

void collect(tvm::ffi::Array<int64_t> inputs, int64_t first, int64_t rows, int64_t splits, int64_t threshold, int64_t entries,
             int64_t counts, int64_t capacity, int64_t stream) {
  Call call = call_of(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8]);
  Task& task = call.task;
  task.first = int(first), task.rows = int(rows), task.splits = int(splits);
  task.threshold = pointer<float>(threshold), task.entries = pointer<uint2>(entries), task.counts = pointer<int32_t>(counts);
  task.capacity = int(capacity);
  launch_score<Mode::Collect>(task, call.k, pointer<CUstream_st>(stream));
}

void select(tvm::ffi::Array<int64_t> inputs, tvm::ffi::Array<int64_t> output, int64_t first, int64_t rows, int64_t splits,
            int64_t entries, int64_t counts, int64_t capacity, int64_t room, int64_t failed, int64_t stream) {
  Task task = call_of(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8]).task;
  task.first = int(first), task.rows = int(rows), task.splits = int(splits);
  task.entries = pointer<uint2>(entries), task.counts = pointer<int32_t>(counts), task.capacity = int(capacity);
  const int bytes = int(room) * 8;
  allow_shared(select_kernel, bytes);
  select_kernel<<<rows, SELECT_THREADS, bytes, pointer<CUstream_st>(stream)>>>(task, output_of(output), int(room), pointer<int32_t>(failed));
  check(cudaGetLastError(), "select_kernel");
}

void redo(tvm::ffi::Array<int64_t> inputs, tvm::ffi::Array<int64_t> output, int64_t scratch, int64_t ld, int64_t at_once,
          int64_t failed, int64_t meeting, int64_t stream_address) {
  Call call = call_of(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], inputs[8]);
  Task& task = call.task;
  task.logits = pointer<float>(scratch), task.ld = ld, task.from_start = true;
  const CUtensorMap map = key_map(call.k, task.keys, 1, 0);
  Output out = output_of(output);
  int rows = int(at_once);
  int32_t *list = pointer<int32_t>(failed), *meet_at = pointer<int32_t>(meeting);
  const auto stream = pointer<CUstream_st>(stream_address);
  allow_shared(redo_kernel, sizeof(Smem));
  check(cudaMemsetAsync(meet_at, 0, sizeof(int32_t), stream), "cudaMemsetAsync");
  void* arguments[] = {&task, const_cast<CUtensorMap*>(&map), &out, &rows, &list, &meet_at};
  check(cudaLaunchCooperativeKernel(redo_kernel, dim3(Shape().multiprocessors), dim3(THREADS), arguments, sizeof(Smem), stream), "redo_kernel");
}

}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(logits, misa::logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(thresholds, misa::thresholds);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(collect, misa::collect);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select, misa::select);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(redo, misa::redo);
