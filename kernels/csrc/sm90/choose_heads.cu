// The index heads that a residual would get most wrong, and the residual of the others. A warp a row.
//
//   E[t, j] = |w[t, j]| · σ·√(φ(1 - φ)),  φ = Φ(μ/σ)        the h largest j are written
//
// with the mean and deviation of a head's products with the pooled keys (route.cu), where the mean is tilted towards the keys that score
// high (tilt.py) by the query's product with the row's direction.
#include "heads.cuh"
#include "launch.cuh"
#include "output.cuh"
#include "statistics.cuh"

namespace misa {
namespace {

struct ChooseHeads {
  const uint8_t* index_q;    // [rows, INDEX_HEADS, DIM] e4m3
  const float* head_gates;   // [rows, INDEX_HEADS]
  const int32_t* row_len;    // [rows]
  const Normal* products;    // [rows, INDEX_HEADS]
  const float* direction;    // [rows, DIM]
  int32_t* head_ids;         // [rows, heads]
  uint32_t* residual_query;  // [rows, DIM] e4m3
  float* residual_scale;     // [rows]
  int rows, max_blocks, block_size, heads;
};

constexpr int ROWS = ROW_THREADS / 32;
constexpr int OWN_HEADS = INDEX_HEADS / HEAD_STEP;  // of which a lane has a piece

// Queries are read once for the tilts and once for the residual: held, they would leave registers for a third of the warps.
__global__ void __launch_bounds__(ROW_THREADS, 3) choose_kernel(const __grid_constant__ ChooseHeads in) {
  __shared__ float held[ROWS][INDEX_HEADS];  // tilts, then gates in the residual
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % PIECES, part = lane / PIECES;
  const int64_t t = int64_t(blockIdx.x) * ROWS + warp;
  sm90::launch_wait();
  sm90::launch_next();
  if (t >= in.rows) return;
  float sum[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i] = __ldg(in.direction + t * DIM + piece * 16 + i);
  float tilt[OWN_HEADS] = {};  // NaN of a query with one, whose products have no deviation that a tilt could add to
#pragma unroll
  for (int j = 0; j < OWN_HEADS; ++j)
    each_number(query_piece(in.index_q, t, j * HEAD_STEP + part, piece), [&](int i, float x) { tilt[j] = fmaf(sum[i], x, tilt[j]); });
  // The lanes of a head's pieces share out their heads, half of them at a time.
  int first = 0;
#pragma unroll
  for (int halved = 2; halved <= PIECES; halved *= 2) {
    const int other = PIECES / halved, half = OWN_HEADS / halved;
    const bool upper = piece & other;
#pragma unroll
    for (int j = 0; j < half; ++j)
      tilt[j] = (upper ? tilt[j + half] : tilt[j]) + __shfl_xor_sync(~0u, upper ? tilt[j] : tilt[j + half], other);
    first += upper ? half : 0;
  }
#pragma unroll
  for (int j = 0; j < OWN_HEADS / PIECES; ++j) held[warp][(first + j) * HEAD_STEP + part] = tilt[j];
  __syncwarp();
  const bool known = min(in.row_len[t] / in.block_size, in.max_blocks) > 1;  // one block has no deviation
  int key[WARP_HEADS];
  float gate[WARP_HEADS], share[WARP_HEADS];
#pragma unroll
  for (int i = 0; i < WARP_HEADS; ++i) {
    const int head = i * 32 + lane;
    Normal products = in.products[t * INDEX_HEADS + head];
    if (products.deviation > 0.f) products.mean += held[warp][head];
    const LinearPart linear = linear_part(products);
    gate[i] = in.head_gates[t * INDEX_HEADS + head], share[i] = linear.share;
    key[i] = order(known ? fabsf(gate[i]) * linear.error : fabsf(gate[i]));
  }
  bool chosen[WARP_HEADS];
  choose(key, in.heads, in.head_ids + t * in.heads, chosen);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < WARP_HEADS; ++i) held[warp][i * 32 + lane] = residual_gate(chosen[i], gate[i], share[i]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i] = 0.f;
#pragma unroll 8
  for (int j = part; j < INDEX_HEADS; j += HEAD_STEP) {
    const float weight = held[warp][j];
    each_number(without_nan(query_piece(in.index_q, t, j, piece)), [&](int i, float x) { sum[i] = fmaf(weight, x, sum[i]); });
  }
  write_residual(sum, t, in.residual_query, in.residual_scale);
}

// ---- host -----------------------------------------------------------------------------------------------------------

void choose_heads(Bytes call, int64_t stream) {
  const auto in = unpack<ChooseHeads>(call);
  launch_behind("choose_kernel", choose_kernel, {(in.rows + ROWS - 1) / ROWS, ROW_THREADS}, stream_at(stream), in);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(choose_heads, misa::choose_heads);
