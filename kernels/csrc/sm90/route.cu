// MISA's router: the h of H index heads whose keys' scores a query is likely to owe most to, judged on pooled keys.
//
//   E[t, j] = |w[t, j]| · Σ_b or max_b ReLU(q[t, j] · k̃_b)        for b < row_len[t] / block_size; the h largest j are written
//
// and the residual, one more query in the place of the other heads: q̄[t] = Σ_j w[t, j] · Φ(μ/σ) · q[t, j], with the mean and the
// standard deviation of the same products. Where heads go by what a residual gets wrong of them, only the products' moments and the
// residual of all heads are made here: choose_heads.cu chooses.
//
// The 64 rows of a matrix product are the heads of one query (of two, where H = 32), held in registers as bf16, and its
// columns are 128 pooled keys in shared memory: the sum over keys then stays inside a thread until a query is finished.
// A thread block owns a run of queries and keeps a chunk of pooled keys while its warpgroups pass all of them over it, so
// that pooled keys are read once a block and queries once a chunk. Of the last warpgroup one warp feeds, planning all
// work, and one warp for each of the others ranks heads while those go on to the next query.
//
// A row's sums are taken tile by tile in one order, whatever the rows beside it: its heads do not depend on the call's shape.
#include <algorithm>
#include <climits>
#include <cstddef>

#include "heads.cuh"
#include "launch.cuh"
#include "output.cuh"
#include "statistics.cuh"

namespace misa {
namespace {

constexpr int LINES = 64;                         // rows of a matrix product: (query, head)
constexpr int QUERIES = LINES / INDEX_HEADS;            // of a unit, which a warpgroup takes at once
constexpr int TILE_BYTES = TILE * DIM * 2;
constexpr int GROUPS = 3;                         // consumer warpgroups
constexpr int DEPTH = 2;                          // units on their way to each
constexpr int UNITS = 64;                         // of a thread block at once
constexpr int PLACES = (UNITS + GROUPS - 1) / GROUPS;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int HELP_REGISTERS = 56, FOLD_REGISTERS = 152;

struct Task {
  const float* gates;        // [T, INDEX_HEADS]
  const int32_t* row_batch;  // [T]
  const int32_t* row_len;    // [T]
  int32_t* head_ids;         // [T, heads]
  float* residual_gates;     // [T, INDEX_HEADS] of the heads in the residual, 0 for the others; or null
  int rows, share, max_blocks, block_size, heads, router;
  Normal* products;          // [T, INDEX_HEADS] of the heads, which are then chosen later; or null

  // Pooled keys that row t sees.
  __device__ int blocks(int t) const { return min(max(row_len[t], 0) / block_size, max_blocks); }
};

// One pass of QUERIES queries over one chunk. row < 0 ends the work of a warpgroup.
struct Unit {
  int row, place;       // first query; the unit's place among those of its warpgroup in the run
  int blocks[QUERIES];  // pooled keys in sight, -1 where there is no query
  int base, tiles;      // the chunk's first pooled key and its tiles
  int stage, parity;    // of the first tile in the ring
  bool leaves;          // whether the warpgroup then frees the chunk's tiles
  bool last;            // whether the sums are then complete
};

// A finished unit, for the warp that ranks.
struct Report {
  int row, place;
  int blocks[QUERIES];
};

template <class Fold>
struct Smem {
  static constexpr int CHUNK = Fold::CHUNK;
  alignas(1024) uint8_t keys[CHUNK][2][TILE * 128];  // two halves of 64 dimensions, 128-byte swizzle
  alignas(1024) uint8_t queries[GROUPS][DEPTH][LINES * DIM];
  float values[Fold::VALUES][GROUPS][PLACES][LINES];
  Unit unit[GROUPS][DEPTH];
  Report report[GROUPS];
  uint64_t full[CHUNK], empty[CHUNK];
  uint64_t given[GROUPS][DEPTH], taken[GROUPS][DEPTH];  // units
  uint64_t summed[GROUPS], ranked[GROUPS];              // reports
};

// Shared-memory addresses. The shuffle tells the compiler that `base` is one value for the warp and not worth computing
// again, so that addresses and descriptors stay in uniform registers.
template <class Smem>
struct Places {
  uint32_t base;
  static_assert(sizeof(Smem) <= 227 * 1024, "what a thread block may have on Hopper");
  __device__ explicit Places(const Smem& s) : base(__shfl_sync(~0u, sm90::smem_address(&s), 0)) {}
  __device__ uint32_t keys(int stage) const { return base + uint32_t(offsetof(Smem, keys)) + stage * TILE_BYTES; }
  __device__ uint32_t queries(int group, int way) const {
    return base + uint32_t(offsetof(Smem, queries)) + (group * DEPTH + way) * LINES * DIM;
  }
  __device__ uint32_t full(int stage) const { return base + uint32_t(offsetof(Smem, full)) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return base + uint32_t(offsetof(Smem, empty)) + stage * 8; }
  __device__ uint32_t given(int group, int way) const {
    return base + uint32_t(offsetof(Smem, given)) + (group * DEPTH + way) * 8;
  }
  __device__ uint32_t taken(int group, int way) const {
    return base + uint32_t(offsetof(Smem, taken)) + (group * DEPTH + way) * 8;
  }
  __device__ uint32_t summed(int group) const { return base + uint32_t(offsetof(Smem, summed)) + group * 8; }
  __device__ uint32_t ranked(int group) const { return base + uint32_t(offsetof(Smem, ranked)) + group * 8; }
};

template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <class Smem>
__device__ __forceinline__ void barriers_init(const Places<Smem>& places) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Smem::CHUNK; ++i) {
      sm90::barrier_init(places.full(i), 1);
      sm90::barrier_init(places.empty(i), GROUPS * 4);
    }
    for (int g = 0; g < GROUPS; ++g) {
      for (int way = 0; way < DEPTH; ++way) {
        sm90::barrier_init(places.given(g, way), 1);
        sm90::barrier_init(places.taken(g, way), 4);
      }
      sm90::barrier_init(places.summed(g), 4);
      sm90::barrier_init(places.ranked(g), 1);
    }
    sm90::barrier_init_fence();
  }
  __syncthreads();
}

// Plans the thread block's work and loads what it needs: runs of rows of one request, chunk by chunk.
template <class Smem>
struct Feeder {
  static constexpr int CHUNK = Smem::CHUNK;
  const Task& task;
  const CUtensorMap *q_map, *k_map;
  Smem& s;
  const Places<Smem> places;
  const int lane = threadIdx.x % 32;
  Ring<CHUNK> ring;
  int issued = 0;  // lane g counts the units of group g
  int turn = 0;    // the group that the next run begins with

  __device__ Feeder(const Task& task, const CUtensorMap* q_map, const CUtensorMap* k_map, Smem& s)
      : task(task), q_map(q_map), k_map(k_map), s(s), places(s) {}

  __device__ void issue(int group, const Unit& unit) {
    const int count = __shfl_sync(~0u, issued, group), way = count % DEPTH;
    sm90::barrier_wait(places.taken(group, way), count / DEPTH % 2 ^ 1);
    if (lane == 0) {
      s.unit[group][way] = unit;
      if (unit.row < 0) {
        sm90::barrier_arrive(places.given(group, way));
      } else {
        sm90::barrier_arrive_expect(places.given(group, way), LINES * DIM);
        sm90::copy_box(places.queries(group, way), q_map, places.given(group, way), 0, unit.row * INDEX_HEADS);
      }
    }
    issued += lane == group;
    __syncwarp();
  }

  __device__ void load_chunk(int first_key, int tiles, int idle_groups) {
    for (int i = 0; i < tiles; ++i, ring.advance()) {
      sm90::barrier_wait(places.empty(ring.stage), ring.parity ^ 1);
      if (lane == 0) {
        const uint32_t full = places.full(ring.stage), keys = places.keys(ring.stage);
        sm90::barrier_arrive_expect(full, TILE_BYTES);
        sm90::copy_box(keys, k_map, full, 0, first_key + i * TILE);
        sm90::copy_box(keys + TILE_BYTES / 2, k_map, full, DIM / 2, first_key + i * TILE);
      }
      __syncwarp();
      if (lane < idle_groups * 4) sm90::barrier_arrive(places.empty(ring.stage));  // in place of groups without a unit
    }
  }

  // Rows [row, row + count) of request `batch`, which see at most `most` pooled keys.
  __device__ void run(int row, int count, int batch, int most) {
    const int units = (count + QUERIES - 1) / QUERIES, busy = min(units, GROUPS);
    for (int base = 0; base == 0 || base < most; base += CHUNK * TILE) {
      const int tiles = min((most - base + TILE - 1) / TILE, CHUNK);
      const Ring<CHUNK> first = ring;
      for (int u = 0; u < units; ++u) {
        Unit unit{row + u * QUERIES, u / GROUPS, {}, base, tiles, first.stage, first.parity, u + GROUPS >= units,
                  base + CHUNK * TILE >= most};
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) unit.blocks[q] = u * QUERIES + q < count ? task.blocks(unit.row + q) : -1;
        issue((turn + u) % GROUPS, unit);
        if (u == busy - 1) load_chunk(batch * task.max_blocks + base, tiles, GROUPS - busy);
      }
    }
    turn = (turn + units) % GROUPS;
  }

  __device__ void all() {
    for (int begin = blockIdx.x * task.share; begin < task.rows; begin += gridDim.x * task.share) {
      const int end = min(begin + task.share, task.rows);
      for (int row = begin, count; row < end; row += count) {
        const int batch = task.row_batch[row];
        int most = 0;
        count = end - row;
        for (int i = lane; i < count; i += 32)
          if (task.row_batch[row + i] != batch) count = i;
        count = __reduce_min_sync(~0u, count);
        for (int i = lane; i < count; i += 32) most = max(most, task.blocks(row + i));
        run(row, count, batch, __reduce_max_sync(~0u, most));
      }
    }
    for (int g = 0; g < GROUPS; ++g) issue(g, Unit{-1});
  }
};

// A operand of one unit as bf16: rows lane/4 and lane/4 + 8 of the warp's 16, two dimensions a register.
__device__ __forceinline__ void load_queries(uint32_t (&a)[DIM / 16][4], const uint8_t* queries) {
  const int warp = threadIdx.x / 32 % 4, line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = queries + (warp * 16 + line + i % 2 * 8) * DIM + (k ^ line) * 16 + i / 2 * 8 + pair;
      a[k][i] = sm90::to_bf16(sm90::of_e4m3(*reinterpret_cast<const uint16_t*>(from)));
    }
}

template <class Fold>
__device__ __forceinline__ void consume(Smem<Fold>& s) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // seen by the compiler as the same in all lanes
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, query = warp * 16 / INDEX_HEADS;
  const Places<Smem<Fold>> places(s);
  const uint64_t b_tile = sm90::tile_descriptor(places.keys(0));

  int report_parity = 0;
  for (Ring<DEPTH> way;; way.advance()) {
    sm90::barrier_wait(places.given(group, way.stage), way.parity);
    const Unit unit = s.unit[group][way.stage];
    const int blocks = s.unit[group][way.stage].blocks[query];  // of this warp's query
    if (unit.row < 0) {
      sm90::barrier_wait(places.ranked(group), report_parity ^ 1);
      if (threadIdx.x % 128 == 0) s.report[group].row = -1;
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(places.summed(group));
      return;
    }
    uint32_t a[DIM / 16][4];
    load_queries(a, s.queries[group][way.stage]);
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(places.taken(group, way.stage));

    const int sight = blocks - unit.base;
    const int furthest = max(unit.blocks[0], unit.blocks[QUERIES - 1]) - unit.base;
    Fold fold;
    Ring<Fold::CHUNK> ring{unit.stage, unit.parity};
    const auto release = [&] {
      if (unit.leaves) {
        __syncwarp();
        if (lane == 0) sm90::barrier_arrive(places.empty(ring.stage));
      }
      ring.advance();
    };
    for (int tile = 0; tile < unit.tiles; ++tile) {
      const int stage = __shfl_sync(~0u, ring.stage, 0);
      sm90::barrier_wait(places.full(stage), ring.parity);
      if (tile * TILE >= furthest) {
        release();
        continue;
      }
      float d[64];
      const uint64_t b = b_tile + stage * (TILE_BYTES / 16);
      sm90::mma_fence();
#pragma unroll
      for (int k = 0; k < DIM / 16; ++k) sm90::mma_bf16(d, a[k], b + k / 4 * (TILE_BYTES / 2 / 16) + k % 4 * 2, k > 0);
      sm90::mma_commit();
      sm90::mma_wait<0>();
      sm90::pin(d);
      release();
      if (sight >= (tile + 1) * TILE) fold.template add<false>(d, TILE);
      else fold.template add<true>(d, sight - tile * TILE);
    }

    sm90::barrier_wait(places.ranked(group), report_parity ^ 1);  // earlier values have been read
#pragma unroll
    for (int value = 0; value < Fold::VALUES; ++value)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& held = s.values[value][group][unit.place][warp * 16 + lane / 4 + row * 8];
        const float total = fold.total(value, row);
        if (lane % 4 == 0) held = unit.base == 0 ? total : Fold::join(value, held, total);
      }
    if (unit.last) {
      if (threadIdx.x % 128 == 0) {
        s.report[group].row = unit.row, s.report[group].place = unit.place;
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) s.report[group].blocks[q] = unit.blocks[q];
      }
      __syncwarp();
      if (lane == 0) sm90::barrier_arrive(places.summed(group));
      report_parity ^= 1;
    }
  }
}

// Ranks a row's heads by `key` and writes their choice, and the gates of the others in the residual, where those are finite.
__device__ __forceinline__ void settle(const Task& task, int64_t t, const int (&key)[WARP_HEADS], const float (&gate)[WARP_HEADS],
                                       const float (&share)[WARP_HEADS]) {
  bool chosen[WARP_HEADS] = {};
  if (!task.products) choose(key, task.heads, task.head_ids + t * task.heads, chosen);
  if (!task.residual_gates) return;
#pragma unroll
  for (int i = 0; i < WARP_HEADS; ++i)
    task.residual_gates[t * INDEX_HEADS + i * 32 + threadIdx.x % 32] = residual_gate(chosen[i], gate[i], share[i]);
}

template <class Fold>
__device__ __forceinline__ void rank(const Task& task, const Smem<Fold>& s, int group) {
  const int lane = threadIdx.x % 32;
  const Places<Smem<Fold>> places(s);
  for (int parity = 0;; parity ^= 1) {
    sm90::barrier_wait(places.summed(group), parity);
    const Report report = s.report[group];
    if (report.row < 0) return;
    float values[Fold::VALUES][QUERIES][WARP_HEADS];
#pragma unroll
    for (int value = 0; value < Fold::VALUES; ++value)
#pragma unroll
      for (int q = 0; q < QUERIES; ++q)
#pragma unroll
        for (int i = 0; i < WARP_HEADS; ++i) values[value][q][i] = s.values[value][group][report.place][q * INDEX_HEADS + i * 32 + lane];
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(places.ranked(group));
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
      const int blocks = report.blocks[q];
      if (blocks < 0) break;
      const int64_t t = report.row + q;
      int key[WARP_HEADS];
      float gates[WARP_HEADS], share[WARP_HEADS];
#pragma unroll
      for (int i = 0; i < WARP_HEADS; ++i) {
        const float gate = task.gates[t * INDEX_HEADS + i * 32 + lane], weight = task.router == SIGNED ? gate : fabsf(gate);
        key[i] = order(Fold::RANKED && blocks > 0 ? weight * values[0][q][i] : fabsf(gate));
        gates[i] = gate, share[i] = 0.5f;
        if constexpr (Fold::MOMENTS) {
          const Normal products = Normal::of(values[Fold::SUM][q][i], values[Fold::SQUARES][q][i], blocks);
          share[i] = linear_part(products).share;
          if (task.products) task.products[t * INDEX_HEADS + i * 32 + lane] = products;
        }
      }
      settle(task, t, key, gates, share);
    }
  }
}

template <class Fold>
__global__ void __launch_bounds__(THREADS, 1)
    route_kernel(const __grid_constant__ Task task, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<Smem<Fold>*>(raw);
  barriers_init(Places<Smem<Fold>>(s));
  sm90::launch_wait();
  sm90::launch_next();
  if (threadIdx.x < GROUPS * 128) {
    sm90::more_registers<FOLD_REGISTERS>();
    consume(s);
  } else {
    sm90::fewer_registers<HELP_REGISTERS>();
    const int helper = __shfl_sync(~0u, threadIdx.x / 32 - GROUPS * 4, 0);
    if (helper == 0) Feeder<Smem<Fold>>(task, &q_map, &k_map, s).all();
    else if (helper <= GROUPS) rank(task, s, helper - 1);
  }
}

// Heads by |w| alone, where no pooled key has a say.
__global__ void __launch_bounds__(ROW_THREADS) weight_kernel(const __grid_constant__ Task task) {
  sm90::launch_wait();
  sm90::launch_next();
  const int64_t t = (int64_t(blockIdx.x) * ROW_THREADS + threadIdx.x) / 32;
  if (t >= task.rows) return;
  int key[WARP_HEADS];
  float gate[WARP_HEADS], share[WARP_HEADS];
#pragma unroll
  for (int i = 0; i < WARP_HEADS; ++i) {
    gate[i] = task.gates[t * INDEX_HEADS + i * 32 + threadIdx.x % 32];
    key[i] = order(fabsf(gate[i])), share[i] = 0.5f;
  }
  settle(task, t, key, gate, share);
}

struct Route {
  const uint8_t* index_q;     // [rows, INDEX_HEADS, DIM] e4m3
  const float* head_gates;    // [rows, INDEX_HEADS]
  const void* block_means;    // [requests, max_blocks, DIM] bf16
  const int32_t* row_batch;   // [rows]
  const int32_t* row_len;     // [rows]
  int32_t* head_ids;          // [rows, heads]
  float* residual_gates;      // [rows, INDEX_HEADS] where a residual is wanted, or null
  uint32_t* residual_query;   // [rows, DIM] e4m3
  float* residual_scale;      // [rows]
  Normal* products;           // [rows, INDEX_HEADS] where heads go by error, or null
  int rows, requests, max_blocks, block_size, heads, router;
};

// ---- host -----------------------------------------------------------------------------------------------------------

template <class Fold>
void launch_route(Task task, const Route& in, cudaStream_t stream) {
  const int blocks = multiprocessors(), units = (task.rows + QUERIES - 1) / QUERIES;
  const int rounds = (units + blocks * UNITS - 1) / (blocks * UNITS);
  task.share = (units + blocks * rounds - 1) / (blocks * rounds) * QUERIES;
  const int shares = (task.rows + task.share - 1) / task.share;
  const CUtensorMap q_map = tensor_map(in.index_q, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, int64_t(task.rows) * INDEX_HEADS, LINES);
  const CUtensorMap k_map = tensor_map(in.block_means, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, int64_t(in.requests) * in.max_blocks, TILE);
  const Grid grid{std::min(shares, blocks), THREADS, sizeof(Smem<Fold>)};
  launch_behind("route_kernel", route_kernel<Fold>, grid, stream, task, q_map, k_map);
}

// Heads and their residual; with `products` of these, and the residual of all heads.
void route(Bytes call, int64_t stream_address) {
  const auto in = unpack<Route>(call);
  const cudaStream_t stream = stream_at(stream_address);
  const Task task{in.head_gates, in.row_batch,   in.row_len,    in.head_ids, in.residual_gates, in.rows,
                  0,             in.max_blocks, in.block_size, in.heads,    in.router,         in.products};
  const int row_blocks = (in.rows * 32 + ROW_THREADS - 1) / ROW_THREADS;
  const bool residual = in.residual_gates;
  if (in.max_blocks == 0 || (in.router == WEIGHT && !residual)) {
    launch_behind("weight_kernel", weight_kernel, {row_blocks, ROW_THREADS}, stream, task);
  } else if (in.router == WEIGHT) {
    launch_route<Folded<Statistic::NONE, true>>(task, in, stream);
  } else if (in.router == PEAK) {
    if (residual) launch_route<Folded<Statistic::MAXIMUM, true>>(task, in, stream);
    else launch_route<Folded<Statistic::MAXIMUM, false>>(task, in, stream);
  } else {
    if (residual) launch_route<Folded<Statistic::SUM, true>>(task, in, stream);
    else launch_route<Folded<Statistic::SUM, false>>(task, in, stream);
  }
  if (!residual) return;
  const Grid grid{row_blocks, ROW_THREADS};
  launch_behind("residual_kernel", residual_kernel, grid, stream, in.index_q, in.residual_gates, in.rows, in.residual_query, in.residual_scale);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, misa::route);
