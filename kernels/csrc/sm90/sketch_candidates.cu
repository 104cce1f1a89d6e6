// The candidates of decode rows: the C tokens of the highest score keys, the newest tokens always among them. One cluster a row.
//
// A histogram of one key in eight gives a bound that the cut hardly lies below; a second one, of the few keys above it, finds the cut.
// (Counting all keys was what bound this: they crowd in few bins.) Where the bound was too high, or the cut far above it, a histogram of
// all keys gives another. Histograms are summed over the cluster. Then each warp counts what it has above the cut and on it, and lists
// that in the order of positions, so that among equal keys the earlier tokens are in.
#include "cluster.cuh"
#include "launch.cuh"
#include "mma_sync.cuh"
#include "sketch.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int BLOCKS = 8, THREADS = 512, WARPS = THREADS / 32, PAGE = 64;  // of a cluster, and of each of its blocks
constexpr int RESIDENT = 4;                                               // blocks of a multiprocessor: 64 clusters run at once
constexpr int EACH = 8;                                                   // keys that a lane loads at once
constexpr int LOADS = 4;                                                  // whose keys a block keeps
constexpr int COARSE_SHIFT = 5, BINS = 2048, OWN_BINS = BINS / BLOCKS;     // the coarse bins take keys of 16 bits
static_assert(OWN_BINS <= THREADS && OWN_BINS % 32 == 0 && BINS << COARSE_SHIFT == 1 << 16);

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
  uint4 keys[LOADS][THREADS];
  uint32_t bins[BINS];      // of this block's keys
  uint32_t scan[WARPS];
  uint32_t totals[BLOCKS];  // keys in the part of the bins that each block sums up
  uint32_t bin, above, inside;  // where the wanted key is, and keys in higher bins and in that one
  Count warps[WARPS], blocks[BLOCKS];
};

__device__ __forceinline__ uint32_t key_of(const uint4& eight, int i) {
  const uint32_t pair = i < 2 ? eight.x : i < 4 ? eight.y : i < 6 ? eight.z : eight.w;
  return i % 2 ? pair >> 16 : pair & 0xFFFF;
}

// Finds the bin of the cluster's histogram in which the `need`-th largest key lies (s.bin, s.above, s.inside); the lowest one if there are fewer.
// Each block sums up a part of the bins, the first one the highest; whose part holds the key tells the others.
__device__ void find_bin(Smem& s, uint32_t need) {
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
  if (threadIdx.x < OWN_BINS && before < need && (before + own >= need || bin == 0)) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Smem& other = sm90::shared_of<Smem>(b);
      other.bin = bin, other.above = before, other.inside = own;
    }
  }
  sm90::cluster_sync();
}

__global__ void __launch_bounds__(THREADS, RESIDENT) candidates_kernel(const Candidates in) {
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
  const int scored = sketched_pages(length) * PAGE;
  const uint32_t wanted = in.candidates - (length - scored);
  for (int i = thread; i < length - scored; i += BLOCKS * THREADS) positions[wanted + i] = scored + i;

  // A warp has a run of whole pages, so of whole loads.
  const uint16_t* scores = in.scores + row * in.room;
  const int share = (scored / PAGE + BLOCKS * WARPS - 1) / (BLOCKS * WARPS) * PAGE;
  const int from = min((rank * WARPS + warp) * share, scored), to = min(from + share, scored);
  const auto load = [&](int base) { return __ldcg(reinterpret_cast<const uint4*>(scores + base)); };
  uint4 first[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; ++i) first[i] = load(min(from + (i * 32 + lane) * EACH, scored - EACH));
#pragma unroll
  for (int i = 0; i < LOADS; ++i) s.keys[i][threadIdx.x] = first[i];
  const auto keys_at = [&](int i, int base) { return i < LOADS ? s.keys[i][threadIdx.x] : load(base); };
  const auto each = [&](const auto& visit) {
    for (int i = 0, base = from + lane * EACH; base < to; ++i, base += 32 * EACH) visit(keys_at(i, base));
  };
  const auto clear = [&] {
    for (int i = threadIdx.x; i < BINS; i += THREADS) s.bins[i] = 0;
    __syncthreads();
  };
  // A key that `need` of every `step`-th one reach, but for the bits of a coarse bin.
  const auto bound = [&](int step, uint32_t need) {
    clear();
    each([&](const uint4& eight) {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (i % step == 0) atomicAdd(&s.bins[key_of(eight, i) >> COARSE_SHIFT], 1u);
    });
    find_bin(s, need);
    return s.bin << COARSE_SHIFT;
  };
  // Whether the cut lies less than BINS above `lo`: in s.bin then.
  const auto cut_above = [&](uint32_t lo) {
    clear();
    each([&](const uint4& eight) {
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        if (key_of(eight, i) >= lo) atomicAdd(&s.bins[min(key_of(eight, i) - lo, BINS - 1u)], 1u);
    });
    find_bin(s, wanted);
    return s.above + s.inside >= wanted && s.bin < BINS - 1;
  };
  const uint32_t expected = wanted / EACH;  // in a sample of every eighth key
  uint32_t lo = bound(EACH, expected + 4 * uint32_t(sqrtf(expected)));
  if (!cut_above(lo)) lo = bound(1, wanted), cut_above(lo);
  const uint32_t cut = lo + s.bin, need = wanted - s.above;  // `need` keys equal to the cut, and all above it

  Count count{};
  each([&](const uint4& eight) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) count.above += key_of(eight, i) > cut, count.ties += key_of(eight, i) == cut;
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

  for (int i = 0, base = from + lane * EACH; base - lane * EACH < to; ++i, base += 32 * EACH) {
    uint4 eight{};
    if (base < to) eight = keys_at(i, base);
    uint32_t own = 0;  // above in the lower half, ties in the upper one
    if (base < to) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) own += (key_of(eight, i) > cut) + (key_of(eight, i) == cut) * 0x10000u;
    }
    const uint32_t upto = warp_sum_up(own, lane), all = __shfl_sync(~0u, upto, 31);
    uint32_t before = above + ((upto - own) & 0xFFFF), equal = ties + ((upto - own) >> 16);
    if (own) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const uint32_t key = key_of(eight, i);
        if (key > cut || (key == cut && equal < need)) positions[before + min(equal, need)] = base + i;
        before += key > cut, equal += key == cut;
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
