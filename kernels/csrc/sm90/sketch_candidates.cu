// The candidates of decode rows: the C tokens of the highest score keys, the newest tokens always among them. One thread block a row.
//
// Two histograms find the key that the cut falls on, its upper 11 bits first. Then each warp counts what it has above the cut and on
// it, and lists that in the order of positions, so that among equal keys the earlier tokens are in.
#include "launch.cuh"
#include "mma_sync.cuh"
#include "select.cuh"
#include "sketch.cuh"

namespace misa {

constexpr int THREADS = 1024, WARPS = THREADS / 32, PAGE = 64;
constexpr int EACH = 8;  // keys that a lane loads at once
constexpr int KEY_BITS = 16, FINE_BITS = KEY_BITS - 11;
using Choice = Select<THREADS>;

struct Candidates {
  const uint16_t* scores;  // [R, room]
  const int32_t* lens;     // [R]
  int32_t* positions;      // [R, candidates] ascending; unwritten past the row's length
  int64_t room;
  int candidates;
};

struct Smem {
  Choice::Histogram histogram;
  uint32_t above[WARPS], ties[WARPS];
};

__device__ __forceinline__ uint32_t key_of(const uint4& eight, int i) {
  const uint32_t pair = i < 2 ? eight.x : i < 4 ? eight.y : i < 6 ? eight.z : eight.w;
  return i % 2 ? pair >> 16 : pair & 0xFFFF;
}

__global__ void __launch_bounds__(THREADS, 1) candidates_kernel(const Candidates in) {
  __shared__ Smem s;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int length = __ldg(in.lens + blockIdx.x);
  int32_t* positions = in.positions + int64_t(blockIdx.x) * in.candidates;
  sm90::launch_wait();  // rows of this step may still be read by the launch before last
  sm90::launch_next();
  if (length <= in.candidates) {
    for (int i = threadIdx.x; i < length; i += THREADS) positions[i] = i;
    return;
  }
  const int scored = sketched_pages(length) * PAGE, wanted = in.candidates - (length - scored);
  for (int i = threadIdx.x; i < length - scored; i += THREADS) positions[wanted + i] = scored + i;

  // A warp has a run of whole pages, so of whole loads.
  const uint16_t* scores = in.scores + blockIdx.x * in.room;
  const int share = (scored / PAGE + WARPS - 1) / WARPS * PAGE, from = warp * share, to = min(from + share, scored);
  const auto each = [&](const auto& visit) {
    for (int base = from + lane * EACH; base < to; base += 32 * EACH) visit(__ldcg(reinterpret_cast<const uint4*>(scores + base)), base);
  };
  Choice::Range cut{0, (1 << KEY_BITS) - 1, uint32_t(wanted), uint32_t(scored)};
#pragma unroll
  for (int shift = FINE_BITS; shift >= 0; shift -= FINE_BITS) {
    Choice::clear(s.histogram);
    __syncthreads();
    each([&](const uint4& eight, int) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const uint32_t key = key_of(eight, i);
        if (key >= cut.lo && key <= cut.hi) Choice::count(s.histogram, key, cut.lo, shift);
      }
    });
    __syncthreads();
    cut = Choice::cut(s.histogram, cut, shift);
  }

  uint32_t above = 0, ties = 0;
  each([&](const uint4& eight, int) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) above += key_of(eight, i) > cut.lo, ties += key_of(eight, i) == cut.lo;
  });
  above = __reduce_add_sync(~0u, above), ties = __reduce_add_sync(~0u, ties);
  if (lane == 0) s.above[warp] = above, s.ties[warp] = ties;
  __syncthreads();
  above = __reduce_add_sync(~0u, lane < warp ? s.above[lane] : 0u), ties = __reduce_add_sync(~0u, lane < warp ? s.ties[lane] : 0u);

  for (int first = from; first < to; first += 32 * EACH) {
    const int base = first + lane * EACH;
    uint4 eight{};
    if (base < to) eight = __ldcg(reinterpret_cast<const uint4*>(scores + base));
    uint32_t own = 0;  // above in the lower half, ties in the upper one
    if (base < to) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) own += (key_of(eight, i) > cut.lo) + (key_of(eight, i) == cut.lo) * 0x10000u;
    }
    const uint32_t upto = warp_sum_up(own, lane), all = __shfl_sync(~0u, upto, 31);
    uint32_t before = above + ((upto - own) & 0xFFFF), equal = ties + ((upto - own) >> 16);
    if (own) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const uint32_t key = key_of(eight, i);
        if (key > cut.lo || (key == cut.lo && equal < cut.need)) positions[before + min(equal, cut.need)] = base + i;
        before += key > cut.lo, equal += key == cut.lo;
      }
    }
    above += all & 0xFFFF, ties += all >> 16;
  }
}

// ---- host

void candidates(Bytes call, int64_t rows, int64_t stream) {
  launch_behind("candidates_kernel", candidates_kernel, int(rows), THREADS, stream_at(stream), unpack<Candidates>(call));
}

}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(candidates, misa::candidates);
