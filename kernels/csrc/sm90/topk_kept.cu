// Exact top k of the scores of a row's kept or listed tokens, as physical slots in the row's order: one thread block a row.
//
// The row stays in registers. One histogram, linear between the row's extremes, leaves a handful of candidates around
// the k-th largest; they are ranked against one another. Where scores cluster, further histograms of order-preserving
// integers narrow the candidates by 11 bits a round until few are left, so any input ends.
#include <cfloat>

#include "launch.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32, BINS = 2048, CANDIDATES = 256, PAGE = 64, MAX_GROUPS = 8;
static_assert(BINS == 2 * THREADS, "a thread scans two bins");

// Tokens of whole pages in the order of the row, `block` tokens of which are neighbours in it.
struct Kept {
  const int32_t* pages;   // [R, room / 64]
  const int32_t* blocks;  // [R, room / block]
  int room, block;

  struct Four {
    int slot, position;
    __device__ int slot_of(int e) const { return slot + e; }
    __device__ int position_of(int e) const { return position + e; }
  };
  __device__ int count(int length) const { return length; }
  // What is looked up of four neighbours ahead, and what they are once some of them are chosen.
  using Early = int;
  __device__ Early early(int64_t r, int first, int) const { return __ldcg(pages + r * (room / PAGE) + first / PAGE); }
  __device__ Four four(int64_t r, int first, Early page, bool placed) const {
    const int position = placed ? blocks[r * (room / block) + first / block] * block + first % block : 0;
    return {page * PAGE + first % PAGE, position};
  }
};

// Tokens at ascending positions of the row.
struct Listed {
  const int32_t* positions;  // [R, room], 16-byte aligned rows
  const int32_t* table;      // page table
  int64_t pitch;
  int room;

  struct Four {
    int4 slots, at;
    static __device__ int of(const int4& four, int e) { return e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w; }
    __device__ int slot_of(int e) const { return of(slots, e); }
    __device__ int position_of(int e) const { return of(at, e); }
  };
  __device__ int count(int length) const { return min(length, room); }
  using Early = int4;  // slots
  __device__ int4 at(int64_t r, int first) const { return __ldcg(reinterpret_cast<const int4*>(positions + r * room + first)); }
  __device__ Early early(int64_t r, int first, int n) const {
    const int4 four = at(r, first);
    const int32_t* row = table + r * pitch;
    const auto slot = [&](int e, int position) { return first + e < n ? __ldg(row + position / PAGE) * PAGE + position % PAGE : 0; };
    return {slot(0, four.x), slot(1, four.y), slot(2, four.z), slot(3, four.w)};
  }
  __device__ Four four(int64_t r, int first, Early slots, bool placed) const { return {slots, placed ? at(r, first) : int4{}}; }
};

struct Scored {
  const float* scores;  // [R, room], 16-byte aligned rows
  const int32_t* lens;  // [R]
  int32_t* slots;       // [R, k]
  int32_t* positions;   // [R, k] or null
  int k;
};

template <class Tokens>
struct Rows : Scored {
  Tokens tokens;
};

struct Smem {
  uint32_t bins[BINS];
  uint64_t candidates[CANDIDATES];
  uint32_t counts[MAX_GROUPS][WARPS];
  uint32_t scan[WARPS];
  uint32_t least[WARPS], most[WARPS];
  unsigned long long lowest, highest, cut;
  uint32_t listed, bin, above, inside;
};

// Larger score, larger key; and the score of a key.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// The same with the token: among equal scores the older one has the larger order. All orders of a row differ.
__device__ __forceinline__ uint64_t order_of(float score, int token) { return uint64_t(key_of(score)) << 16 | uint32_t(0xFFFF - token); }

__device__ __forceinline__ int token_of(uint64_t order) { return 0xFFFF - int(order & 0xFFFF); }

// Finds the bin that holds the `rank`-th largest (s.bin), with s.above elements in higher bins and s.inside in it.
// The bins are zero again afterwards.
__device__ void find_bin(Smem& s, uint32_t rank) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, top = BINS - 1 - 2 * int(threadIdx.x);
  const uint32_t first = s.bins[top], second = s.bins[top - 1];
  s.bins[top] = s.bins[top - 1] = 0;
  const uint32_t upto = warp_sum_up(first + second, lane);
  if (lane == 31) s.scan[warp] = upto;
  __syncthreads();
  const uint32_t above = __reduce_add_sync(~0u, lane < warp ? s.scan[lane] : 0u) + upto - first - second;
  if (above < rank && above + first >= rank) s.bin = top, s.above = above, s.inside = first;
  if (above + first < rank && above + first + second >= rank) s.bin = top - 1, s.above = above + first, s.inside = second;
  __syncthreads();
}

template <class Tokens, int GROUPS>
__global__ void __launch_bounds__(THREADS, 1) topk_kernel(const Rows<Tokens> row) {
  __shared__ Smem s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r = blockIdx.x;
  const int n = row.tokens.count(__ldcg(row.lens + r));  // as what tokens are, older than the launch before this one, which waited for it
  const float* scores = row.scores + r * row.tokens.room;
  int32_t* slots = row.slots + r * row.k;
  int32_t* positions = row.positions ? row.positions + r * row.k : nullptr;
  typename Tokens::Early early[GROUPS] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int token = 4 * (g * THREADS + threadIdx.x);
    if (token < n) early[g] = row.tokens.early(r, token, n);
  }
  s.bins[threadIdx.x] = s.bins[THREADS + threadIdx.x] = 0;
  if (threadIdx.x == 0) s.listed = 0;
  for (int j = max(n, 0) + threadIdx.x; j < row.k; j += THREADS) {
    slots[j] = -1;
    if (positions) positions[j] = -1;
  }

  float least_chosen = 0.f;  // scores above it are chosen, and those equal to it up to token `last_tie`
  int last_tie = 0;
  const auto in_row = [&](int g) { return 4 * (g * THREADS + 32 * warp) < n; };  // any token of this warp's group
  float x[4 * GROUPS];
  sm90::launch_wait();
  if (n > row.k) {
    float least = INFINITY, most = -INFINITY;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int token = 4 * (g * THREADS + threadIdx.x);
      float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
      if (token < n) four = __ldcg(reinterpret_cast<const float4*>(scores + token));
      const float loaded[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = loaded[e] > -FLT_MAX ? loaded[e] : -FLT_MAX;  // NaN too
        x[4 * g + e] = score;
        if (token + e < n) least = fminf(least, score), most = fmaxf(most, score);
      }
    }
    const uint32_t lowest = __reduce_min_sync(~0u, key_of(least)), highest = __reduce_max_sync(~0u, key_of(most));
    if (lane == 0) s.least[warp] = lowest, s.most[warp] = highest;
    __syncthreads();
    least = score_of(__reduce_min_sync(~0u, s.least[lane])), most = score_of(__reduce_max_sync(~0u, s.most[lane]));

    // Rounding keeps the order of bins; a span that is zero or overflows puts everything into few bins, which is allowed.
    const float scale = float(BINS - 1) / (most - least);
    const auto bin_of = [&](float score) {
      const float place = fminf(fmaxf((score - least) * scale, 0.f), float(BINS - 1));  // NaN becomes 0
      // Added to 2^23, an integer stands in the mantissa's low bits: conversions run at an eighth of the rate.
      return int(__float_as_uint(place + 8388608.f) & (BINS - 1));
    };
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      if (!in_row(g)) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (4 * (g * THREADS + int(threadIdx.x)) + e < n) atomicAdd(&s.bins[bin_of(x[4 * g + e])], 1u);
    }
    __syncthreads();
    find_bin(s, row.k);
    uint32_t rank = row.k - s.above, inside = s.inside;
    const int bin = s.bin;

    uint64_t lo = 0, hi = ~uint64_t(0);  // candidates: in the bin, with an order in [lo, hi]
    const auto each_candidate = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < 4 * GROUPS; ++i) {
        const int token = 4 * ((i / 4) * THREADS + int(threadIdx.x)) + i % 4;
        if (token < n && bin_of(x[i]) == bin) {
          const uint64_t order = order_of(x[i], token);
          if (order >= lo && order <= hi) visit(order);
        }
      }
    };
    while (inside > CANDIDATES) {
      sm90::pin(x);  // bins are computed anew each round: kept, they spill
      __syncthreads();
      if (threadIdx.x == 0) s.lowest = ~0ull, s.highest = 0;
      __syncthreads();
      unsigned long long lowest = ~0ull, highest = 0;
      each_candidate([&](uint64_t order) { lowest = min(lowest, (unsigned long long)order), highest = max(highest, (unsigned long long)order); });
      if (lowest <= highest) atomicMin(&s.lowest, lowest), atomicMax(&s.highest, highest);
      __syncthreads();
      lo = s.lowest, hi = s.highest;
      const int shift = max(0, 64 - __clzll(hi - lo) - 11);
      each_candidate([&](uint64_t order) { atomicAdd(&s.bins[(order - lo) >> shift], 1u); });
      __syncthreads();
      find_bin(s, rank);
      rank -= s.above, inside = s.inside;
      lo += uint64_t(s.bin) << shift;
      hi = min(hi, lo + ((uint64_t(1) << shift) - 1));
    }

    each_candidate([&](uint64_t order) { s.candidates[atomicAdd(&s.listed, 1u)] = order; });
    __syncthreads();
    if (threadIdx.x < inside) {
      const uint64_t own = s.candidates[threadIdx.x];
      uint32_t larger = 0;
      for (uint32_t i = 0; i < inside; ++i) larger += s.candidates[i] > own;
      if (larger == rank - 1) s.cut = own;
    }
    __syncthreads();
    least_chosen = score_of(uint32_t(s.cut >> 16)), last_tie = token_of(s.cut);
  }

  // Places: tokens in order, four a thread and group; the counts of four groups fit one word, 8 bits each.
  uint32_t chosen[GROUPS];
  uint64_t packed = 0;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    chosen[g] = 0;
    if (!in_row(g)) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = 4 * (g * THREADS + threadIdx.x) + e;
      const float score = x[4 * g + e];
      const bool wins = n <= row.k || score > least_chosen || (score == least_chosen && token <= last_tie);
      if (token < n && wins) chosen[g] |= 1u << e;
    }
    packed |= uint64_t(__popc(chosen[g])) << (8 * g);
  }
  const uint32_t low = warp_sum_up(uint32_t(packed), lane), high = GROUPS > 4 ? warp_sum_up(uint32_t(packed >> 32), lane) : 0;
  const uint64_t upto = uint64_t(high) << 32 | low;
  if (lane == 31) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) s.counts[g][warp] = uint32_t(upto >> (8 * g)) & 0xFF;
  }
  __syncthreads();
  uint32_t before = 0;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const uint32_t count = s.counts[g][lane];
    uint32_t place = before + __reduce_add_sync(~0u, lane < warp ? count : 0u);
    before += __reduce_add_sync(~0u, count);
    place += (uint32_t(upto >> (8 * g)) & 0xFF) - __popc(chosen[g]);
    if (!chosen[g]) continue;
    const auto four = row.tokens.four(r, 4 * (g * THREADS + threadIdx.x), early[g], positions);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(chosen[g] >> e & 1)) continue;
      slots[place] = four.slot_of(e);
      if (positions) positions[place] = four.position_of(e);
      ++place;
    }
  }
}

// ---- host

template <class Tokens, int GROUPS = 1>
void launch(const Rows<Tokens>& row, int64_t rows, int64_t stream) {
  if (row.tokens.room > 4 * THREADS * GROUPS) {
    if constexpr (GROUPS < MAX_GROUPS) return launch<Tokens, GROUPS + 1>(row, rows, stream);
    TVM_FFI_THROW(ValueError) << "room: expected at most " << 4 * THREADS * MAX_GROUPS << " tokens, got " << row.tokens.room;
  }
  launch_behind("topk_kernel", topk_kernel<Tokens, GROUPS>, {int(rows), THREADS}, stream_at(stream), row);
}

template <class Tokens>
void topk(Bytes scored, Bytes tokens, int64_t rows, int64_t stream) {
  launch(Rows<Tokens>{unpack<Scored>(scored), unpack<Tokens>(tokens)}, rows, stream);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_kept, misa::topk<misa::Kept>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_listed, misa::topk<misa::Listed>);
