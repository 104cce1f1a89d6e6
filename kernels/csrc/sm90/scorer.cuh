// Routed-head scores of query rows against a flat run of index keys, handed to a sink as they are made.
//
//   s[t, l] = k_scale[l] · Σ_{j in head_ids[t]} w[t, j] · ReLU(q[t, j] · k[l])        for l in [ks[t], ke[t])
//
// and, where the last column is a residual, k_scale[l] · scale[t] · (query[t] · k[l]) more.
//
// A product is 64 keys (rows) × 256 columns, the columns being the (query, head) pairs of one warpgroup's QUERIES queries,
// ordered so that in the m64n256 accumulator fragment a thread holds every head of its own queries: no lane is shuffled.
// One warp feeds a ring of key tiles; every warpgroup reads each tile for its own queries and runs at its own pace.
#pragma once
#include <algorithm>
#include <cstddef>

#include "items.cuh"
#include "launch.cuh"
#include "output.cuh"
#include "turns.cuh"

namespace misa {
namespace {

constexpr int STAGES = 4;  // of the ring, a tile each
constexpr int FEED_REGISTERS = 24, FOLD_REGISTERS = GROUPS == 2 ? 240 : 160;

struct Smem {
  alignas(1024) uint8_t queries[GROUPS][PRODUCT_COLUMNS * DIM];
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

// The place of a thread in its warpgroup: which queries and which keys of a product it has the scores of.
struct Seat {
  int first;       // the warpgroup's first query
  int warp;        // of the warpgroup: keys warp · 16 … of a product
  int lane_row;    // key of the warp's first eight (+ 8 for the second half)
  int lane_query;  // this thread has queries first + 4q + lane_query
  __device__ int lane() const { return lane_row * 4 + lane_query; }
  __device__ int query(int q) const { return first + q * 4 + lane_query; }
  __device__ int key(int half) const { return warp * 16 + half * 8 + lane_row; }
  __device__ static Seat of(int first, int thread) { return {first, thread / 32 % 4, thread % 32 / 4, thread % 4}; }
  // The same, but unknown to the compiler: what follows from it after an item's tiles is not made before them, to wait in registers
  // and predicates that the tiles want.
  __device__ Seat anew() const { return of(first, sm90::thread()); }
};

__device__ __forceinline__ void feed(const Task& task, const CUtensorMap* map, Smem& s, Ring& ring) {
  const int lane = threadIdx.x % 32;
  const int scored = task.scored();
  const Places places(s);
  for (Items items(task); items.more();) {
    for (Item item = items.next(); item.more(); item.advance()) {
      if (!item.seen()) continue;
      const int tile = item.tile;
      sm90::barrier_wait(places.empty(ring.stage), ring.parity ^ 1);
      if (lane == 0) {
        sm90::barrier_arrive_expect(places.full(ring.stage), TILE * DIM);
        sm90::copy_box(places.keys(ring.stage), map, places.full(ring.stage), 0, tile * TILE);
      }
#pragma unroll
      for (int k = lane; k < TILE; k += 32) {
        int key = tile * TILE + k;
        bool valid = key < scored;
        sm90::copy4(places.scale(ring.stage) + k * 4, task.scale + (valid ? key : 0), valid);
      }
      sm90::barrier_arrive_copies(places.full(ring.stage));
      ring.advance();
    }
  }
}

// Column n belongs to query (n/8 / PAIRS)·4 + (n%8)/2 and head slot (n/8 % PAIRS)·2 + n%2.
__device__ __forceinline__ void load_queries(const Task& task, int first, uint8_t* smem) {
#pragma unroll
  for (int n = threadIdx.x % 128; n < PRODUCT_COLUMNS; n += 128) {
    const int query = first + n / 8 / PAIRS * 4 + n % 8 / 2, slot = n / 8 % PAIRS * 2 + n % 2;
    const uint4* source = nullptr;
    if (query < task.rows) source = reinterpret_cast<const uint4*>(task.query(task.row(query), slot));
#pragma unroll
    for (int chunk = 0; chunk < DIM / 16; ++chunk) {
      uint4 value = source ? __ldg(source + chunk) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(smem + n * DIM + (chunk ^ (n % 8)) * 16) = value;
    }
  }
}

// Whether one of a warpgroup's queries sees keys of a tile.
__device__ __forceinline__ bool seen(const int2* windows, int tile) {
  const int i = threadIdx.x % 32;
  return __any_sync(~0u, i < QUERIES && tile * TILE < windows[i].y && (tile + 1) * TILE > windows[i].x);
}

// When a sink takes a product's scores: what is fastest for it.
enum class Taking {
  ANY_TIME,     // and the compiler may have the next product open among what the sink does
  BEFORE_NEXT,  // for stores that wait: an open product would wait with them
  DURING_NEXT,  // for a few instructions that wait for nothing: the tensor cores work meanwhile. Warpgroups then multiply in turn
};

// A sink says what becomes of scores: as TAKING when, and as ALONE whether its launch waits for the end of the one before. Its Lane, made
// once a thread, is called as begin(seat) before an item's tiles; for each product as take(scores[LANE_QUERIES][2], the product's first
// key, windows[QUERIES]), and as refuse() of the same before it where some keys are outside some windows, or if begin() has said that the
// warpgroup's queries have more to look at; as settle(tiles left) after each tile, unless it takes a product's scores during the next; and
// as finish() after the item's tiles. Where begin() says so, a sink that takes them during the next is spared tiles that none of the
// warpgroup's queries sees.
template <class Sink>
__device__ __forceinline__ void consume(const Task& task, const Sink& sink, Shared<Sink>& shared, Ring& ring) {
  Smem& s = shared.scorer;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // seen by the compiler as one value for the warp
  const int lane = threadIdx.x % 32;
  const Places places(s);
  const uint64_t b = sm90::tile_descriptor(places.base + group * PRODUCT_COLUMNS * DIM);
  const uint64_t a_tile = sm90::tile_descriptor(places.keys(0));

  typename Sink::Lane lane_sink(sink, shared.sink, task);
  constexpr bool LATE = Sink::TAKING == Taking::DURING_NEXT;
  const Turns<LATE, GROUPS> turns(group);

  for (Items items(task); items.more();) {
    Item item = items.next();
    const Seat seat = Seat::of(item.first_row + group * QUERIES, threadIdx.x);
    Extent extent(task, seat.first, QUERIES);

    sm90::named_barrier(1 + group, 128);  // the last item's products have been read
    load_queries(task, seat.first, s.queries[group]);
    if (threadIdx.x % 128 < QUERIES) s.window[group][threadIdx.x % 128] = task.window(seat.first + threadIdx.x % 128);
    sm90::fence_async_shared();
    sm90::named_barrier(1 + group, 128);

    float weight[LANE_QUERIES][COLUMNS];
#pragma unroll
    for (int q = 0; q < LANE_QUERIES; ++q) {
      const bool live = seat.query(q) < task.rows;
      const int64_t t = live ? task.row(seat.query(q)) : 0;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) weight[q][j] = live ? task.weight(t, j) : 0.f;
    }
    const bool refuses = lane_sink.begin(seat);
    if (refuses) extent.all_lo = INT_MAX;
    const int plain = LATE && refuses ? 0 : item.end;  // tiles before it are not looked at

    const auto take_in = [&] { sm90::barrier_wait(places.full(ring.stage), ring.parity); };
    const auto release = [&] {
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(places.empty(ring.stage));
      ring.advance();
    };
    float score[LANE_QUERIES][2];
    int key0 = -1;  // of the scores
    for (; item.more(); item.advance()) {
      if (item.tile >= plain) {
        if (!item.seen()) continue;
        if (!seen(s.window[group], item.tile)) {
          take_in();
          turns.skip(TILE / KEYS);
          release();
          continue;
        }
      }
      take_in();
#pragma unroll
      for (int product = 0; product < TILE / KEYS; ++product) {
        const float* scale = s.scale[ring.stage] + product * KEYS;
        const float scales[2] = {scale[seat.key(0)], scale[seat.key(1)]};
        const uint64_t a = a_tile + (ring.stage * TILE + product * KEYS) * DIM / 16;
        float d[PRODUCT_COLUMNS / 2];
        turns.wait();
        sm90::mma_fence();
        sm90::mma(d, a, b);
#pragma unroll
        for (int k = 1; k < DIM / 32; ++k) sm90::mma_add(d, a + k * 2, b + k * 2);
        sm90::mma_commit();
        if (LATE && key0 >= 0) lane_sink.take(score, key0, s.window[group]);
        sm90::mma_wait<0>();
        turns.pass();
        // Here and below: never so, but the compiler does not know, and moves nothing of one product into another, nor the turn behind
        // the sums.
        if constexpr (LATE) {
          key0 = item.tile * TILE + product * KEYS;
          if (key0 < 0) continue;
        }
        sm90::pin(d);
        if (product == TILE / KEYS - 1) release();
        if constexpr (!LATE) key0 = item.tile * TILE + product * KEYS;
        if (Sink::TAKING == Taking::BEFORE_NEXT && key0 < 0) continue;
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q) score[q][0] = score[q][1] = 0.f;
#pragma unroll
        for (int n = 0; n < PRODUCT_COLUMNS / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int bit = 0; bit < 2; ++bit) {
              const int slot = n % PAIRS * 2 + bit;
              const float x = d[n * 4 + half * 2 + bit];
              float& sum = score[n / PAIRS][half];
              sum = fmaf(Task::linear(slot) ? x : fmaxf(x, 0.f), weight[n / PAIRS][slot], sum);
            }
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q)
#pragma unroll
          for (int half = 0; half < 2; ++half) score[q][half] *= scales[half];
        if (key0 < extent.all_lo || key0 + KEYS > extent.all_hi) lane_sink.refuse(score, key0, s.window[group]);
        if (!LATE) lane_sink.take(score, key0, s.window[group]);
      }
      if constexpr (!LATE) lane_sink.settle(item.left);
    }
    if (LATE && key0 >= 0) lane_sink.take(score, key0, s.window[group]);
    lane_sink.finish();
  }
  turns.end();
}

template <class Sink>
__global__ void __launch_bounds__(THREADS, 1)
    score_kernel(const __grid_constant__ Task task, const __grid_constant__ Sink sink, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<Shared<Sink>*>(raw);
  barriers_init(shared.scorer);
  sm90::launch_wait();
  sm90::launch_next();
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

inline CUtensorMap key_map(const void* k, int keys) {
  return tensor_map(k, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, keys, TILE);
}

// By `workers` thread blocks, for which its division was made if it has one. `k`: the scored keys.
template <class Sink>
void launch_score(const Task& task, const uint8_t* k, const Sink& sink, int workers, cudaStream_t stream) {
  const Grid grid{workers, THREADS, sizeof(Shared<Sink>), 1, Sink::ALONE};
  launch_behind("score_kernel", score_kernel<Sink>, grid, stream, task, sink, key_map(k, task.scored()));
}

}  // namespace
}  // namespace misa
