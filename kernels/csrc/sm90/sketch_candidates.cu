// The candidates of decode rows: the C tokens of the highest score keys, the newest tokens always among them. One cluster a row.
//
// Two histograms, summed over the cluster, find the key that the cut falls on, its upper 11 bits first. Then each warp counts what it
// has above the cut and on it, and lists that in the order of positions, so that among equal keys the earlier tokens are in. (Keys staged
// in shared memory took as long: reading them again from L2 is not what binds.)
#include "cluster.cuh"
#include "launch.cuh"
#include "mma_sync.cuh"
#include "sketch.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int BLOCKS = 8, THREADS = 512, WARPS = THREADS / 32, PAGE = 64;  // of a cluster, and of each of its blocks
constexpr int EACH = 8;                                                   // keys that a lane loads at once
constexpr int KEY_BITS = 16, COARSE_BITS = 11, FINE_BITS = KEY_BITS - COARSE_BITS;
constexpr int BINS = 1 << COARSE_BITS, OWN_BINS = BINS / BLOCKS;
static_assert(OWN_BINS <= THREADS && OWN_BINS % 32 == 0);

struct Candidates {
  const uint16_t* scores;  // [R, room]
  const int32_t* lens;     // [R]
  int32_t* positions;      // [R, candidates] ascending; unwritten past the row's length
  int64_t room;
  int candidates;
};

struct Count {
  uint32_t above, ties;
};

struct Smem {
  uint32_t bins[BINS];      // of this block's keys
  uint32_t scan[WARPS];
  uint32_t totals[BLOCKS];  // keys in the part of the bins that each block sums up
  uint32_t bin, above;      // where the cut is, and keys in higher bins
  Count warps[WARPS], blocks[BLOCKS];
};

// Keys from `lo` on, `need` of which are wanted beside all above them.
struct Cut {
  uint32_t lo, need;
};

__device__ __forceinline__ uint32_t key_of(const uint4& eight, int i) {
  const uint32_t pair = i < 2 ? eight.x : i < 4 ? eight.y : i < 6 ? eight.z : eight.w;
  return i % 2 ? pair >> 16 : pair & 0xFFFF;
}

// The bin of the cluster's histogram in which the `need`-th largest key lies. Each block sums up a part of the bins, the first one the
// highest; whose part holds the cut tells the others.
__device__ Cut narrow(Smem& s, Cut cut, int shift) {
  const int rank = sm90::cluster_rank(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int bin = BINS - 1 - rank * OWN_BINS - int(threadIdx.x);
  sm90::cluster_sync();
  uint32_t own = 0;
  if (threadIdx.x < OWN_BINS) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) own += sm90::shared_of<Smem>(b).bins[bin];
  }
  const uint32_t in_warp = warp_sum_up(own, lane);
  if (lane == 31) s.scan[warp] = in_warp;
  __syncthreads();
  const uint32_t upto = __reduce_add_sync(~0u, lane < warp ? s.scan[lane] : 0u) + in_warp;
  if (threadIdx.x == OWN_BINS - 1) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) sm90::shared_of<Smem>(b).totals[rank] = upto;
  }
  sm90::cluster_sync();
  uint32_t before = upto - own;
  for (int b = 0; b < rank; ++b) before += s.totals[b];
  if (threadIdx.x < OWN_BINS && before < cut.need && before + own >= cut.need) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Smem& other = sm90::shared_of<Smem>(b);
      other.bin = bin, other.above = before;
    }
  }
  sm90::cluster_sync();
  return {cut.lo + (s.bin << shift), cut.need - s.above};
}

__global__ void __launch_bounds__(THREADS) candidates_kernel(const Candidates in) {
  Smem& s = sm90::shared<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = sm90::cluster_rank();
  const int row = blockIdx.x / BLOCKS, thread = rank * THREADS + threadIdx.x;  // of the cluster
  const int length = __ldg(in.lens + row);
  int32_t* positions = in.positions + int64_t(row) * in.candidates;
  sm90::launch_wait();  // rows of this step may still be read by the launch before last
  sm90::launch_next();
  if (length <= in.candidates) {
    for (int i = thread; i < length; i += BLOCKS * THREADS) positions[i] = i;
    return;
  }
  const int scored = sketched_pages(length) * PAGE, wanted = in.candidates - (length - scored);
  for (int i = thread; i < length - scored; i += BLOCKS * THREADS) positions[wanted + i] = scored + i;

  // A warp has a run of whole pages, so of whole loads.
  const uint16_t* scores = in.scores + row * in.room;
  const int share = (scored / PAGE + BLOCKS * WARPS - 1) / (BLOCKS * WARPS) * PAGE;
  const int from = min((rank * WARPS + warp) * share, scored), to = min(from + share, scored);
  const auto each = [&](const auto& visit) {
    for (int base = from + lane * EACH; base < to; base += 32 * EACH) visit(__ldcg(reinterpret_cast<const uint4*>(scores + base)));
  };
  Cut cut{0, uint32_t(wanted)};
#pragma unroll
  for (int shift = FINE_BITS; shift >= 0; shift -= FINE_BITS) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    __syncthreads();
    each([&](const uint4& eight) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const uint32_t key = key_of(eight, i);
        if (shift > 0 || key >> FINE_BITS == cut.lo >> FINE_BITS) atomicAdd(&s.bins[(key - cut.lo) >> shift], 1u);
      }
    });
    cut = narrow(s, cut, shift);
  }

  Count count{};
  each([&](const uint4& eight) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) count.above += key_of(eight, i) > cut.lo, count.ties += key_of(eight, i) == cut.lo;
  });
  count = {__reduce_add_sync(~0u, count.above), __reduce_add_sync(~0u, count.ties)};
  if (lane == 0) s.warps[warp] = count;
  __syncthreads();
  const auto sum = [&](const Count* counts, int n) {  // of the first n
    const Count own = lane < n ? counts[lane] : Count{};
    return Count{__reduce_add_sync(~0u, own.above), __reduce_add_sync(~0u, own.ties)};
  };
  if (warp == 0) {
    const Count all = sum(s.warps, WARPS);
    if (lane < BLOCKS) sm90::shared_of<Smem>(lane).blocks[rank] = all;
  }
  sm90::cluster_sync();
  const Count blocks = sum(s.blocks, rank), warps = sum(s.warps, warp);
  uint32_t above = blocks.above + warps.above, ties = blocks.ties + warps.ties;

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
  launch_behind("candidates_kernel", candidates_kernel, int(rows) * BLOCKS, THREADS, stream_at(stream), unpack<Candidates>(call), BLOCKS);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(candidates, misa::candidates);
