// Cheap scores of all sketched keys of decode rows, as 16-bit numbers that order like them.
//
//   s[r, l] = Σ_c gate[r, c] · max(q[r, c] · mean + scale[l] · q[r, c] · (code[l] - z), floor)        z = (2^bits - 1) / 2
//
// A warp takes some pages of one row. The products with their means come from one bf16 product of 16 pages; then each page is 64 keys
// in four products of 16, whose codes a lane loads just as it feeds them. Queries are signed bytes, so products with codes are whole
// numbers. A code shifted up within its byte is itself times a power of two: so a mask makes operands of codes, and odd keys come
// out 2^bits times as large. q · z is rounded down, by at most half a unit of the query. A product with the gates, in tf32, adds up the
// columns, and leaves each lane the keys that it writes.
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
constexpr int LOADS = 2 * BITS;   // of 16 bytes, that bring a lane its codes of a page
constexpr int STEPS = DIM / 32;   // products over 32 dimensions
constexpr float ODD = 1.f / (1 << BITS);
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
  int span;                 // pages of a warp
  int blocks;               // thread blocks of a row
};

struct Page {
  uint4 codes[LOADS];
  uint4 scales;
};

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The four operands of 16 keys and 32 dimensions.
__device__ __forceinline__ void operands(uint32_t (&a)[4], const Page& page, int group, int step) {
  constexpr uint32_t EVEN = BITS == 1 ? 0x01010101u : 0x03030303u;
  uint32_t codes;
  if constexpr (BITS == 1) codes = word(page.codes[group / 2], group % 2 * 2 + step / 2) >> (step % 2 * 4);
  else codes = word(page.codes[group], step);
  a[0] = codes & EVEN, a[1] = codes & (EVEN << BITS);
  codes >>= 2 * BITS;
  a[2] = codes & EVEN, a[3] = codes & (EVEN << BITS);
}

__global__ void __launch_bounds__(WARPS * 32) scan_kernel(const Scan in) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int row = blockIdx.x / in.blocks;
  const int first = ((blockIdx.x % in.blocks) * WARPS + threadIdx.x / 32) * in.span;
  const int length = __ldg(in.lens + row);
  const int count = length > in.candidates ? min(in.span, sketched_pages(length) - first) : 0;
  if (count <= 0) {
    sm90::launch_wait();
    sm90::launch_next();
    return;
  }

  // Behind the router's launch, which waited for its own, sketches, means and page table may be read at once.
  const int32_t* pages = in.pages + row * in.pitch + first;
  int ids[2];  // of pages r and r + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) ids[half] = __ldg(pages + min(r + 8 * half, count - 1));
  const auto load = [&](int p) {
    const int64_t id = __shfl_sync(~0u, p < 8 ? ids[0] : ids[1], p % 8 * 4);
    const uint8_t* from = in.sketches + id * SKETCH_BYTES;
    Page page;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) page.codes[i] = sm90::load_once(from + (i * 32 + lane) * 16);
    page.scales = sm90::load_once(from + CODE_BYTES + r * 16);
    return page;
  };
  Page next = load(0);
  uint4 mean[2][4];  // dimensions 32·c … 32·c + 31 of both pages
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[half][i] = sm90::load_once(in.means + int64_t(ids[half]) * DIM * 2 + c * 64 + i * 16);

  sm90::launch_wait();
  sm90::launch_next();
  uint32_t query[TILES][STEPS][2];  // the same dimensions of column 8·t + r
  int start[TILES][4];  // of sums of products, as the bits of BASE
  float gate[TILES][4][2];  // for each group of 16 keys; those of a lane's column of sums are its own, the others 0
  float with_mean[TILES][4] = {};
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
    for (int i = 0; i < 8; ++i) {
      const uint2 pairs = sm90::bf16_of_int8(query[t][i / 2][i % 2]);
      const uint32_t a[4] = {word(mean[0][i / 2], i % 2 * 2), word(mean[1][i / 2], i % 2 * 2), word(mean[0][i / 2], i % 2 * 2 + 1),
                             word(mean[1][i / 2], i % 2 * 2 + 1)};
      const uint32_t b[2] = {pairs.x, pairs.y};
      sm90::mma_bf16(with_mean[t], a, b);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own = t * 8 + c * 2 + e;
      float of_column = own < in.columns ? __ldg(in.gates + int64_t(row) * in.columns + own) : 0.f;
      if (t < TILES - 1 || e == 0) of_column *= 0.5f;
#pragma unroll
      for (int group = 0; group < 4; ++group) gate[t][group][e] = r == 2 * group ? of_column : 0.f;
      const int z = sum[e] * ((1 << BITS) - 1) >> 1;
      start[t][e] = BASE_BITS - z, start[t][2 + e] = BASE_BITS - (z << BITS);
    }
  }
  // Of the residual's column, which is the last one, and of its neighbours in that place.
  const float floor = in.residual && c == (in.columns - 1) % 8 / 2 ? -INFINITY : 0.f;

  uint32_t* scores = reinterpret_cast<uint32_t*>(in.scores + row * in.room + int64_t(first) * PAGE) + c * 8 + r;
  for (int p = 0; p < count; ++p) {
    const Page page = next;
    if (p + 1 < count) next = load(p + 1);
    float mean_part[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) mean_part[t][e] = __shfl_sync(~0u, p < 8 ? with_mean[t][e] : with_mean[t][2 + e], p % 8 * 4 + c);

    float sums[4] = {};  // [0] of even key r of group c, [2] of the odd one
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      uint32_t a[STEPS][4];
#pragma unroll
      for (int step = 0; step < STEPS; ++step) operands(a[step], page, group, step);
      const uint32_t pair = word(page.scales, group);
      const float scale[2] = {low_bf16(pair), high_bf16(pair) * ODD};
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        int d[4];
        sm90::mma_int8(d, a[0], query[t][0], start[t]);
#pragma unroll
        for (int step = 1; step < STEPS; ++step) sm90::mma_int8(d, a[step], query[t][step], d);
        float active[4];  // twice, but in the residual's place
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float x = fmaf(scale[odd], __int_as_float(d[odd * 2 + e]) - BASE, mean_part[t][e]);
            active[e * 2 + odd] = t == TILES - 1 && e == 1 ? sm90::max_or_nan(x, floor) : x + fabsf(x);
          }
        sm90::mma_tf32(sums, active, gate[t][group]);
      }
    }
    scores[p * (PAGE / 2)] = score_key(sums[0]) | score_key(sums[2]) << 16;
  }
}

// ---- host

void scan(Bytes call, int64_t rows, int64_t stream) {
  const auto in = unpack<Scan>(call);
  launch_behind("scan_kernel", scan_kernel, int(rows) * in.blocks, WARPS * 32, stream_at(stream), in);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(scan, misa::scan);
