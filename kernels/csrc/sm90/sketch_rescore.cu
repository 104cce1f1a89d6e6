// Scores with all heads of decode rows' candidates on their stored keys.
//
//   logits[r, i] = k_scale · Σ_j gate[r, j] · ReLU(q[r, j] · k)        k: the key at position positions[r, i] of the row
//
// A block takes some tiles of 64 candidates of one row, a few of which are always on their way to shared memory, their pages looked up
// before that. A product of a tile with all heads leaves each thread a quarter of the heads of two keys.
#include "launch.cuh"
#include "ptx.cuh"
#include "shape.cuh"

namespace misa {
namespace {

constexpr int THREADS = 128, RESIDENT = 5;  // of a block; blocks of a multiprocessor
constexpr int TILE = 64;                    // candidates of a product
constexpr int WARP_KEYS = TILE / 4;         // of them that a warp copies
constexpr int STAGES = 4;                   // tiles on their way, or multiplied
constexpr int PAGE = 64, DIM = 128, PAGE_BYTES = PAGE * (DIM + 4);
constexpr int PIECE = 16, PIECES = DIM / PIECE;  // bytes that a thread copies at once; those of a key
constexpr int COPIES = TILE * PIECES / THREADS;

struct Rescore {
  const uint8_t* index_q;        // [R, INDEX_HEADS, 128] e4m3
  const float* head_gates;       // [R, INDEX_HEADS]
  const uint8_t* index_k_pages;  // [P, PAGE_BYTES]
  const int32_t* pages;          // [R, ...]: page table
  const int32_t* lens;           // [R]
  const int32_t* positions;      // [R, candidates]
  float* logits;                 // [R, candidates]
  int64_t pitch;                 // of the page table
  int candidates;
  int topk;                      // rows of no more tokens are not scored
  int span;                      // tiles of a block
  int blocks;                    // of a row
};

struct Smem {  // lines of 128 bytes under the 128-byte swizzle
  alignas(1024) uint8_t queries[INDEX_HEADS * DIM];
  alignas(1024) uint8_t keys[STAGES][TILE * DIM];
  float scales[STAGES][TILE];
};

// Where the swizzle puts a piece of a line.
__device__ __forceinline__ int swizzled(int line, int piece) { return line * DIM + (piece ^ line % 8) * PIECE; }

__global__ void __launch_bounds__(THREADS, RESIDENT) rescore_kernel(const Rescore in) {
  __shared__ Smem s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4, row = blockIdx.x / in.blocks;
  const int length = __ldg(in.lens + row), n = min(length, in.candidates);
  const int first = blockIdx.x % in.blocks * in.span * TILE, end = min(first + in.span * TILE, n);
  const bool idle = length <= in.topk || first >= n;
  float2 gates[INDEX_HEADS / 8];  // of a thread's columns of a product
  if (!idle) {  // all but the positions is older than the launch before this one, which began its dependents once that was complete
    const uint8_t* queries = in.index_q + int64_t(row) * INDEX_HEADS * DIM;
#pragma unroll
    for (int i = 0; i < INDEX_HEADS * PIECES / THREADS; ++i) {
      const int line = threadIdx.x / PIECES + i * (THREADS / PIECES), piece = threadIdx.x % PIECES;
      sm90::copy16(sm90::smem_address(s.queries) + swizzled(line, piece), queries + line * DIM + piece * PIECE, true);
    }
    const float2* from = reinterpret_cast<const float2*>(in.head_gates + int64_t(row) * INDEX_HEADS) + c;
#pragma unroll
    for (int i = 0; i < INDEX_HEADS / 8; ++i) gates[i] = __ldg(from + i * 4);
  }
  sm90::copies_commit();
  sm90::launch_wait();
  sm90::launch_next();
  if (idle) return;

  // Two lanes of a warp look up each of its keys of a tile; beyond the end the last key is read again.
  const int own = warp * WARP_KEYS + lane % WARP_KEYS;
  const int32_t* positions = in.positions + int64_t(row) * in.candidates;
  const int32_t* table = in.pages + row * in.pitch;
  const auto look = [&](int tile) { return __ldcg(positions + min(first + tile * TILE + own, end - 1)); };
  const auto find = [&](int position) { return __ldg(table + position / PAGE); };
  const uint32_t keys = sm90::smem_address(s.keys), scales = sm90::smem_address(s.scales);
  const uint32_t landing = keys + swizzled(warp * WARP_KEYS + lane / PIECES, lane % PIECES);
  const uint8_t* from = in.index_k_pages + lane % PIECES * PIECE;
  const uint8_t* of_scales = in.index_k_pages + PAGE * DIM;
  asm("" : "+l"(from), "+l"(of_scales));  // or the compiler adds up anew for every key
  const auto fetch = [&](int tile, int position, int page) {
    if (first + tile * TILE < end) {
      const int stage = tile % STAGES, line = page * (PAGE_BYTES / DIM) + position % PAGE;
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {  // lines that lie 4 apart differ by one bit in their swizzle
        const int of = __shfl_sync(~0u, line, i * 4 + lane / PIECES);
        sm90::copy16((landing ^ i % 2 * 4 * PIECE) + stage * (TILE * DIM) + i * 4 * DIM, from + int64_t(of) * DIM, true);
      }
      if (lane < WARP_KEYS) sm90::copy4(scales + (stage * TILE + own) * 4, of_scales + int64_t(page) * PAGE_BYTES + position % PAGE * 4, true);
    }
    sm90::copies_commit();
  };
  int position[STAGES + 2], page[STAGES + 1];
#pragma unroll
  for (int i = 0; i < STAGES + 2; ++i) position[i] = look(i);
#pragma unroll
  for (int i = 0; i < STAGES + 1; ++i) page[i] = find(position[i]);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i, position[i], page[i]);

  float* logits = in.logits + int64_t(row) * in.candidates;
  const uint64_t a = sm90::tile_descriptor(keys), b = sm90::tile_descriptor(sm90::smem_address(s.queries));
  const int key = warp * WARP_KEYS + lane / 4 + (c % 2) * 8;  // of a thread's two keys, the one that it finishes
  for (int tile = 0; first + tile * TILE < end; ++tile) {
    sm90::copies_wait<STAGES - 2>();
    sm90::fence_async_shared();
    __syncthreads();  // the tile is there, and nothing reads the one before
    const int stage = tile % STAGES;
    const float scale = s.scales[stage][key];
    fetch(tile + STAGES - 1, position[STAGES - 1], page[STAGES - 1]);
    position[STAGES - 1] = position[STAGES], page[STAGES - 1] = page[STAGES];
    position[STAGES] = position[STAGES + 1], page[STAGES] = find(position[STAGES]);
    position[STAGES + 1] = look(tile + STAGES + 2);
    float d[INDEX_HEADS / 2];
    sm90::mma_fence();
#pragma unroll
    for (int k = 0; k < DIM / 32; ++k) {
      const uint64_t left = a + stage * (TILE * DIM / 16) + k * 2, right = b + k * 2;
      if (k == 0) sm90::mma(d, left, right);
      else sm90::mma_add(d, left, right);
    }
    sm90::mma_commit();
    sm90::mma_wait<0>();
    sm90::pin(d);
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < INDEX_HEADS / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = fmaf(fmaxf(d[i * 4 + half * 2], 0.f), gates[i].x, sum[half]);
        sum[half] = fmaf(fmaxf(d[i * 4 + half * 2 + 1], 0.f), gates[i].y, sum[half]);
      }
    const bool odd = c % 2;
    float score = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
    score = (score + __shfl_xor_sync(~0u, score, 2)) * scale;
    if (c < 2 && first + tile * TILE + key < end) logits[first + tile * TILE + key] = score;
  }
}

// ---- host

void rescore(Bytes call, int64_t rows, int64_t stream) {
  const auto in = unpack<Rescore>(call);
  launch_behind("rescore_kernel", rescore_kernel, {int(rows) * in.blocks, THREADS}, stream_at(stream), in);
}

int64_t resident() { return resident_blocks(rescore_kernel, THREADS); }

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rescore, misa::rescore);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(resident, misa::resident);
