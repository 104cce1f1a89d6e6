// Cheap scores of all sketched keys of decode rows, as 16-bit numbers that order like them.
//
//   s[r, l] = Σ_c gate[r, c] · max(q[r, c] · mean + scale[l] · q[r, c] · (code[l] - z), floor)        z = (2^bits - 1) / 2
//
// A warp takes some pages of one row, a few of which are always on their way to its shared memory. The products with their means come
// from one bf16 product of 16 pages; then each page is 64 keys in four products of 16. Queries are signed bytes, so products with codes
// are whole numbers. The codes of a byte belong to different keys, and a code that stands higher in it is itself times a power of two: so
// one mask makes an operand of codes, and a key comes out by as much larger. q · z is rounded down, by at most half a unit of the query.
// A product with the gates, in tf32, adds up the columns, and leaves each lane the keys that it writes.
#include <cmath>

#include "launch.cuh"
#include "mma_sync.cuh"
#include "shape.cuh"
#include "sketch.cuh"

namespace misa {
namespace {

constexpr int BITS = SKETCH_BITS, TILES = (COLUMNS + 7) / 8;  // of 8 columns, which one product takes
constexpr int PAGE = 64, DIM = 128;
constexpr int CODE_BYTES = PAGE * DIM * BITS / 8, SKETCH_BYTES = CODE_BYTES + PAGE * 2;
constexpr int WARPS = 4;          // of a thread block
constexpr int STAGES = 4;         // pages on their way to a warp, or read by it
constexpr int WINDOW = 16;        // pages whose products with their means come at once
constexpr int WINDOWS = TILES == 1 ? 1 : 2;           // of a warp, at most: with one tile of columns a second costs registers
constexpr int RESIDENT = TILES <= 2 ? 6 - TILES : 1;  // blocks of a multiprocessor, at least
constexpr int STEPS = DIM / 32;   // products over 32 dimensions
constexpr int PLANES = 8 / BITS;  // codes of a byte
// A whole number below 2²² in size, added to the bits of this float, is added to the float: conversions run at a quarter of the rate.
constexpr float BASE = 12582912.f;
constexpr int BASE_BITS = 0x4B400000;

struct Scan {
  const int8_t* queries;    // [R, columns, 128]
  const float* gates;       // [R, columns]
  const uint8_t* means;     // [P, 128] bf16
  const uint8_t* sketches;  // [P, SKETCH_BYTES]
  const int32_t* pages;     // [R, ...]: page table
  const int32_t* lens;      // [R]
  uint16_t* scores;         // [R, room]
  int64_t pitch;            // of the page table
  int64_t room;
  int columns;
  int residual;             // whether the last column has no ReLU
  int candidates;           // rows of no more tokens are not scored
  int span;                 // pages of a warp, at most WINDOWS · WINDOW
  int blocks;               // thread blocks of a row
};

struct Smem {
  alignas(16) uint8_t pages[WARPS][STAGES][SKETCH_BYTES];
  uint64_t landed[WARPS][STAGES];
};

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Of the key of a row of operands: how far up its codes stand in their bytes.
__device__ constexpr int shift_of(int group, int odd) { return (2 * group + odd) % PLANES * BITS; }

__global__ void __launch_bounds__(WARPS * 32, RESIDENT) scan_kernel(const Scan in) {
  int lane = threadIdx.x % 32;
  asm("" : "+r"(lane));  // or the compiler finds it anew for every page
  const int warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int row = blockIdx.x / in.blocks;
  const int first = ((blockIdx.x % in.blocks) * WARPS + warp) * in.span;
  const int length = __ldg(in.lens + row);
  const int count = length > in.candidates ? min(in.span, sketched_pages(length) - first) : 0;
  if (count <= 0) {
    sm90::launch_wait();
    sm90::launch_next();
    return;
  }

  // Behind the router's launch, which waited for its own, sketches, means and page table may be read at once.
  __shared__ Smem s;
  const uint8_t* landing = s.pages[warp][0];
  const uint32_t landed = sm90::smem_address(s.landed[warp]);
  const int id = lane < count ? __ldg(in.pages + row * in.pitch + first + lane) : 0;
  const auto fetch = [&](int stage) {  // this lane's page
    sm90::barrier_arrive_expect(landed + stage * 8, SKETCH_BYTES);
    sm90::copy_run_once(sm90::smem_address(landing + stage * SKETCH_BYTES), in.sketches + int64_t(id) * SKETCH_BYTES, SKETCH_BYTES, landed + stage * 8);
  };
  if (lane < STAGES) sm90::barrier_init(landed + lane * 8, 1);
  sm90::barrier_init_fence();
  __syncwarp();
  if (lane < min(STAGES, count)) fetch(lane);
  uint4 mean[2][4];  // dimensions 32·c … 32·c + 31 of pages r and r + 8 of a window
  const auto load_means = [&](int window) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t of = __shfl_sync(~0u, id, min(window + r + 8 * half, count - 1));
#pragma unroll
      for (int i = 0; i < 4; ++i) mean[half][i] = sm90::load_once(in.means + of * DIM * 2 + c * 64 + i * 16);
    }
  };
  load_means(0);
  if (WINDOWS > 1 && lane >= WINDOW && lane < count) {
#pragma unroll
    for (int i = 0; i < DIM * 2; i += 128) sm90::prefetch(in.means + int64_t(id) * DIM * 2 + i);
  }

  sm90::launch_wait();
  sm90::launch_next();
  const bool is_linear = in.residual && c == (in.columns - 1) % 8 / 2;  // the last column
  uint32_t query[TILES][STEPS][2];  // the same dimensions of column 8·t + r
  int start[TILES][PLANES / 2][4];  // of sums of products, as the bits of BASE
  float gate[TILES][4][2];  // for each group of 16 keys; those of a lane's column of sums are its own, the others 0
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int column = t * 8 + r;
    uint4 part[2] = {};
    if (column < in.columns) {
      const int8_t* from = in.queries + (int64_t(row) * in.columns + column) * DIM + c * 32;
      part[0] = __ldg(reinterpret_cast<const uint4*>(from)), part[1] = __ldg(reinterpret_cast<const uint4*>(from) + 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) query[t][i / 2][i % 2] = word(part[i / 4], i % 4);
    int sum[4] = {};  // of the queries, as products with codes of 1
    constexpr uint32_t ONES[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) sm90::mma_int8(sum, ONES, query[t][step], sum);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own = t * 8 + c * 2 + e;
      float of_column = own < in.columns ? __ldg(in.gates + int64_t(row) * in.columns + own) : 0.f;
      if (!(is_linear && t == TILES - 1 && e == 1)) of_column *= 0.5f;
#pragma unroll
      for (int group = 0; group < 4; ++group) gate[t][group][e] = r == 2 * group ? of_column : 0.f;
      const int z = sum[e] * ((1 << BITS) - 1) >> 1;
#pragma unroll
      for (int pair = 0; pair < PLANES / 2; ++pair)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) start[t][pair][odd * 2 + e] = BASE_BITS - (z << shift_of(pair, odd));
    }
  }

  uint32_t* scores = reinterpret_cast<uint32_t*>(in.scores + row * in.room + int64_t(first) * PAGE) + c * 8 + r;
  float with_mean[TILES][4];
  const auto multiply_means = [&] {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) with_mean[t][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        asm("" : "+r"(query[t][i / 2][i % 2]));  // or the compiler keeps the pairs
        const uint2 pairs = sm90::bf16_of_int8(query[t][i / 2][i % 2]);
        const uint32_t a[4] = {word(mean[0][i / 2], i % 2 * 2), word(mean[1][i / 2], i % 2 * 2), word(mean[0][i / 2], i % 2 * 2 + 1),
                               word(mean[1][i / 2], i % 2 * 2 + 1)};
        const uint32_t b[2] = {pairs.x, pairs.y};
        sm90::mma_bf16(with_mean[t], a, b);
      }
    }
  };
  multiply_means();
#pragma unroll 1
  for (int window = 0; window < count; window += WINDOW) {
    for (int turn = window / STAGES; turn < (window + WINDOW) / STAGES && turn * STAGES < count; ++turn) {
#pragma unroll(TILES == 1 ? STAGES : 1)  // so that a stage's place is a constant, where registers are left for it
      for (int stage = 0; stage < STAGES; ++stage) {
        const int p = turn * STAGES + stage;
        if (p >= count) break;
        const uint8_t* page = landing + stage * SKETCH_BYTES;
        sm90::barrier_wait(landed + stage * 8, turn % 2);
        uint4 codes[BITS][2];
#pragma unroll
        for (int i = 0; i < 2 * BITS; ++i) codes[i / 2][i % 2] = *reinterpret_cast<const uint4*>(page + (i * 32 + lane) * 16);
        const uint4 scales = *reinterpret_cast<const uint4*>(page + CODE_BYTES + r * 16);
        float mean_part[TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e) mean_part[t][e] = __shfl_sync(~0u, p % WINDOW < 8 ? with_mean[t][e] : with_mean[t][2 + e], p % 8 * 4 + c);

        float sums[4] = {};  // [0] of even key r of group c, [2] of the odd one
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          constexpr uint32_t LOWEST = 0x01010101u * ((1 << BITS) - 1);
          uint32_t a[STEPS][4];
#pragma unroll
          for (int i = 0; i < STEPS * 4; ++i)
            a[i / 4][i % 4] = word(codes[2 * group / PLANES][i / 8], i / 2 % 4) & LOWEST << shift_of(group, i % 2);
          const uint32_t pair = word(scales, group);
          const float scale[2] = {low_bf16(pair) / (1 << shift_of(group, 0)), high_bf16(pair) / (1 << shift_of(group, 1))};
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            int d[4];
            sm90::mma_int8(d, a[0], query[t][0], start[t][group % (PLANES / 2)]);
#pragma unroll
            for (int step = 1; step < STEPS; ++step) sm90::mma_int8(d, a[step], query[t][step], d);
            float active[4];  // twice, but in the residual's column
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float x = fmaf(scale[odd], __int_as_float(d[odd * 2 + e]) - BASE, mean_part[t][e]);
                if (!(is_linear && t == TILES - 1 && e == 1)) x += fabsf(x);
                active[e * 2 + odd] = x;
              }
            sm90::mma_tf32(sums, active, gate[t][group]);
          }
        }
        scores[p * (PAGE / 2)] = score_keys(sums[0], sums[2]);
        // Behind what the page's numbers went into: a bulk copy does not wait for loads that are still under way.
        __syncwarp();
        if (lane == p + STAGES && lane < count) fetch(stage);
      }
    }
    if (WINDOWS > 1 && window + WINDOW < count) {
      load_means(window + WINDOW);
      multiply_means();
    }
  }
}

// ---- host

void scan(Bytes call, int64_t rows, int64_t stream) {
  const auto in = unpack<Scan>(call);
  launch_behind("scan_kernel", scan_kernel, {int(rows) * in.blocks, WARPS * 32}, stream_at(stream), in);
}

int64_t resident() { return resident_blocks(scan_kernel, WARPS * 32); }

int64_t most_pages() { return WINDOWS * WINDOW; }  // of a warp

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, misa::scan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(resident, misa::resident);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(most_pages, misa::most_pages);
