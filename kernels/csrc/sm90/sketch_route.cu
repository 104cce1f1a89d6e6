// What scores the sketched keys of decode rows: a row's routed heads, and the residual of the others, as signed bytes. One cluster a row.
//
// Each block multiplies all heads with a tile of page means: as many of the row's as all blocks have room for, evenly spaced. Each thread
// has two heads, and keeps the sum of their products, the sum of squares, and the router's statistic. The blocks send these to the first
// one, which ranks the heads and writes the columns. Sums have an order that depends on the row alone.
#include "cluster.cuh"
#include "heads.cuh"
#include "launch.cuh"
#include "sketch.cuh"
#include "statistics.cuh"

namespace misa {
namespace {

constexpr int BLOCKS = 8, THREADS = 128, WARPS = THREADS / 32;  // of a cluster, and of each of its blocks
constexpr int RESIDENT = 5;                                     // blocks of a multiprocessor: clusters of 64 rows run at once
constexpr int PAGES = 32;                                       // of a tile
constexpr int ROUTED_PAGES = BLOCKS * PAGES;                    // as in layout.py
constexpr int LINE = 128, HALF_BYTES = PAGES * LINE;            // of shared memory: half a page's dimensions, and half a tile's
constexpr int PIECE = 16;                                       // bytes that a thread copies at once
constexpr int COPIES = 2 * HALF_BYTES / PIECE / THREADS;        // of a thread, for a tile
constexpr int QUERY_COPIES = INDEX_HEADS * DIM / PIECE / THREADS;
constexpr int MOMENTS = 3;                                      // kept of a head's products
constexpr int WARP_ROWS = 16;                                   // heads of a warp in a product, which has room for 64
constexpr int OWN_HEADS = INDEX_HEADS / WARPS;                  // heads of a warp when all are ranked
constexpr int PARTS = THREADS / INDEX_HEADS;                    // threads of a head then

struct PageRoute {
  const uint8_t* index_q;   // [R, INDEX_HEADS, 128] e4m3
  const float* head_gates;  // [R, INDEX_HEADS]
  const uint8_t* means;     // [P, 128] bf16
  const int32_t* pages;     // [R, …]: page table
  const int32_t* lens;      // [R]
  uint32_t* queries;        // [R, heads + residual, 128] signed bytes
  float* gates;             // [R, heads + residual]
  int64_t pitch;            // of the page table
  int heads;                // that are routed; INDEX_HEADS: all of them
  int router;
  int residual;             // whether the others are a column too
  int candidates;           // rows of no more tokens get none
};

struct Smem {
  alignas(1024) uint8_t tile[2][HALF_BYTES];
  alignas(1024) uint8_t queries[INDEX_HEADS * DIM];
  alignas(16) float moments[BLOCKS][MOMENTS][INDEX_HEADS];  // sum, sum of squares and statistic, of each block's pages
  float rest[WARPS][DIM];                                   // the residual, of each warp's heads
  int keys[INDEX_HEADS];                                    // what heads are ranked by
  float weights[INDEX_HEADS];                               // in the residual
  float gates[INDEX_HEADS];
  int ids[INDEX_HEADS];                                     // routed heads, ascending
  uint32_t routed[WARPS];                                   // ballots
  uint64_t sent;
};

// The swizzle of 128 bytes: pieces change places within every eight lines.
__device__ __forceinline__ int swizzled(int piece, int line) { return (piece ^ line % 8) * PIECE; }

// Four dimensions of a query, NaN as 0.
__device__ __forceinline__ float4 numbers(uint32_t four) {
  four = sm90::no_nan(four);
  const float2 low = sm90::of_e4m3(four), high = sm90::of_e4m3(four >> 16);
  return {low.x, low.y, high.x, high.y};
}

// Writes a query of four dimensions a lane in units of which its largest number has 127; one that is not finite, or 0, has a unit of 0.
__device__ __forceinline__ void write_column(const PageRoute& in, int64_t column, const float4& x, float gate) {
  const int lane = threadIdx.x % 32;
  const float own = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  const bool is_nan = x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w;
  const float most = __uint_as_float(__reduce_max_sync(~0u, is_nan ? ~0u : __float_as_uint(own)));  // NaN's bits are above all others
  const bool usable = most > 0.f && most <= FLT_MAX;
  const float per_unit = 127.f / most;
  const auto byte = [&](float number, int i) { return uint32_t(__float2int_rn(number * per_unit) & 0xFF) << i * 8; };
  in.queries[column * (DIM / 4) + lane] = usable ? byte(x.x, 0) | byte(x.y, 1) | byte(x.z, 2) | byte(x.w, 3) : 0;
  if (lane == 0) in.gates[column] = gate * (usable ? most * (1.f / 127.f) : 0.f);
}

// What the router and the residual need of a thread's two heads.
struct Moments {
  float sum[2] = {}, squares[2] = {}, active[2] = {};

  __device__ __forceinline__ void add(const float (&d)[PAGES / 2], bool maximum) {
#pragma unroll
    for (int i = 0; i < PAGES / 2; ++i) {
      const int head = i / 2 % 2;
      sum[head] += d[i], squares[head] = fmaf(d[i], d[i], squares[head]);
      active[head] = maximum ? fmaxf(active[head], d[i]) : active[head] + fmaxf(d[i], 0.f);
    }
  }
  // Adds up what the four lanes with the same heads have.
  __device__ __forceinline__ void join(bool maximum) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2)
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        sum[head] += __shfl_xor_sync(~0u, sum[head], other), squares[head] += __shfl_xor_sync(~0u, squares[head], other);
        const float theirs = __shfl_xor_sync(~0u, active[head], other);
        active[head] = maximum ? fmaxf(active[head], theirs) : active[head] + theirs;
      }
  }
};

// Ranks the row's heads by what all blocks sent: their ids, and the weights of those that are not routed, by all threads of a block.
// `gate`: of this thread's head.
__device__ __forceinline__ void rank(const PageRoute& in, Smem& s, float gate, int pages) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
  float sum = 0.f, squares = 0.f, active = 0.f;
#pragma unroll
  for (int i = 0; i < BLOCKS / PARTS; ++i) {
    const auto& sent = s.moments[part * (BLOCKS / PARTS) + i];
    sum += sent[0][head], squares += sent[1][head];
    active = in.router == PEAK ? fmaxf(active, sent[2][head]) : active + sent[2][head];
  }
#pragma unroll
  for (int other = 1; other < PARTS; other *= 2) {
    sum += __shfl_xor_sync(~0u, sum, other), squares += __shfl_xor_sync(~0u, squares, other);
    const float theirs = __shfl_xor_sync(~0u, active, other);
    active = in.router == PEAK ? fmaxf(active, theirs) : active + theirs;
  }
  const LinearPart rest = linear_part(Normal::of(sum, squares, pages));
  float statistic = fabsf(gate);
  if (in.router == ERROR) {
    if (pages > 1) statistic *= rest.error;
  } else if (in.router != WEIGHT) {
    statistic = (in.router == SIGNED ? gate : statistic) * (in.router == PEAK ? active : active / float(pages));
    if (sum != sum) statistic = sum;  // a maximum drops it
  }
  const int key = order(statistic);
  s.keys[head] = key, s.gates[head] = gate;
  __syncthreads();
  int before = 0;
#pragma unroll 8  // code that runs once is fetched for it, from memory where a whole model's layer came in between
  for (int i = 0; i < INDEX_HEADS / PARTS; ++i) {
    const int other = i * PARTS + part, theirs = s.keys[other];
    before += theirs > key || (theirs == key && other < head);
  }
#pragma unroll
  for (int other = 1; other < PARTS; other *= 2) before += __shfl_xor_sync(~0u, before, other);
  const bool routed = before < in.heads;
  s.weights[head] = residual_gate(routed, gate, rest.share);
  const uint32_t votes = __ballot_sync(~0u, routed);  // PARTS of each head
  s.routed[warp] = votes;
  __syncthreads();
  int place = __popc(votes & ((1u << lane) - 1));
#pragma unroll
  for (int w = 0; w < WARPS; ++w) place += w < warp ? __popc(s.routed[w]) : 0;
  if (routed && part == 0) s.ids[place / PARTS] = head;
}

__global__ void __launch_bounds__(THREADS, RESIDENT) route_kernel(const PageRoute in) {
  Smem& s = sm90::shared<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = sm90::cluster_rank(), row = blockIdx.x / BLOCKS;
  sm90::launch_wait();
  sm90::launch_next();
  const int length = __ldg(in.lens + row), pages = sketched_pages(length);
  if (length <= in.candidates) return;
  const uint8_t* index_q = in.index_q + int64_t(row) * INDEX_HEADS * DIM;
  const float* head_gates = in.head_gates + int64_t(row) * INDEX_HEADS;
  if (in.heads == INDEX_HEADS) {
    for (int head = block * WARPS + warp; head < INDEX_HEADS; head += BLOCKS * WARPS) {
      const uint32_t four = __ldg(reinterpret_cast<const uint32_t*>(index_q + head * DIM) + lane);
      write_column(in, int64_t(row) * INDEX_HEADS + head, numbers(four), __ldg(head_gates + head));
    }
    return;
  }

  const int stride = (pages + ROUTED_PAGES - 1) / ROUTED_PAGES, count = (pages + stride - 1) / stride;
  if (block == 0 && threadIdx.x == 0) {
    sm90::barrier_init(sm90::smem_address(&s.sent), 1);
    sm90::barrier_init_fence();
    sm90::barrier_arrive_expect(sm90::smem_address(&s.sent), sizeof(s.moments));
  }
  sm90::cluster_arrive();

  // A thread copies the same piece of pages that lie 8 apart in the tile.
  const int piece = threadIdx.x % 16, line = threadIdx.x / 16, first = block * PAGES + line;
  int ids[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; ++i) ids[i] = first + i * 8 < count ? __ldg(in.pages + row * in.pitch + (first + i * 8) * stride) : 0;
  // As rows r and r + 8 of a warp's product are heads 2·r and 2·r + 1 of its 16, pieces of queries change places by pairs of heads.
#pragma unroll
  for (int i = 0; i < QUERY_COPIES; ++i) {
    const int head = i * 16 + threadIdx.x / 8;
    const uint8_t* from = index_q + head * DIM + threadIdx.x % 8 * PIECE;
    sm90::copy16(sm90::smem_address(s.queries) + head * DIM + swizzled(threadIdx.x % 8, threadIdx.x / 16), from, true);
  }
  sm90::copies_commit();
  const uint32_t tile = sm90::smem_address(s.tile), landing = tile + piece / 8 * HALF_BYTES + line * LINE + swizzled(piece % 8, line);
#pragma unroll
  for (int i = 0; i < COPIES; ++i)
    sm90::copy16(landing + i * 8 * LINE, in.means + int64_t(ids[i]) * (DIM * 2) + piece * PIECE, first + i * 8 < count);
  sm90::copies_commit();
  const float gate = __ldg(head_gates + threadIdx.x / PARTS);
  sm90::copies_wait<1>();
  __syncthreads();

  uint32_t a[DIM / 16][4] = {};  // 32 heads leave half of a product's rows 0
  const int heads = warp * WARP_ROWS + lane / 4 * 2, pair = lane % 4;  // this thread's two heads, and columns of a product
  if (heads < INDEX_HEADS) {
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint8_t* two = s.queries + (heads + i % 2) * DIM + swizzled(k, lane / 4) + i / 2 * 8 + pair * 2;
        a[k][i] = sm90::to_bf16(sm90::of_e4m3(*reinterpret_cast<const uint16_t*>(two)));
      }
  }

  Moments moments;
  if (block * PAGES < count) {
    sm90::copies_wait<0>();
    sm90::fence_async_shared();
    __syncthreads();
    float d[PAGES / 2];
    const uint64_t b = sm90::tile_descriptor(tile);
    sm90::mma_fence();
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) sm90::mma_bf16(d, a[k], b + k / 4 * (HALF_BYTES / 16) + k % 4 * 2, k > 0);
    sm90::mma_commit();
    sm90::mma_wait<0>();
    sm90::pin(d);
    moments.add(d, in.router == PEAK);
  }

  moments.join(in.router == PEAK);
  sm90::cluster_wait();  // the first block waits for what is sent
  Smem& target = sm90::shared_of<Smem>(0);
  if (heads < INDEX_HEADS && pair < MOMENTS) {
    const auto own = [&](int i) { return pair == 0 ? moments.sum[i] : pair == 1 ? moments.squares[i] : moments.active[i]; };
    sm90::send(&target.moments[block][pair][heads], {own(0), own(1)}, &target.sent);
  }
  if (block > 0) return;

  const auto query = [&](int head) {  // four dimensions a lane
    return numbers(*reinterpret_cast<const uint32_t*>(s.queries + head * DIM + swizzled(lane / 4, head / 2) + lane % 4 * 4));
  };
  sm90::barrier_wait(sm90::smem_address(&s.sent), 0);
  rank(in, s, gate, count);
  if (in.residual) {
    float4 sum{};
#pragma unroll 4
    for (int i = 0; i < OWN_HEADS; ++i) {
      const float weight = s.weights[warp * OWN_HEADS + i];
      const float4 x = query(warp * OWN_HEADS + i);
      sum = {fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z), fmaf(weight, x.w, sum.w)};
    }
    *reinterpret_cast<float4*>(s.rest[warp] + lane * 4) = sum;
  }
  __syncthreads();
  for (int i = warp; i < in.heads + in.residual; i += WARPS) {
    float4 x{};
    float own_gate = 1.f;
    if (i < in.heads) {
      x = query(s.ids[i]), own_gate = s.gates[s.ids[i]];
    } else {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(s.rest[w] + lane * 4);
        x = {x.x + part.x, x.y + part.y, x.z + part.z, x.w + part.w};
      }
    }
    write_column(in, int64_t(row) * (in.heads + in.residual) + i, x, own_gate);
  }
}

// ---- host

void route(Bytes call, int64_t rows, int64_t stream) {
  const Grid grid{int(rows) * BLOCKS, THREADS, sizeof(Smem), BLOCKS};
  launch_behind("route_kernel", route_kernel, grid, stream_at(stream), unpack<PageRoute>(call));
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, misa::route);
