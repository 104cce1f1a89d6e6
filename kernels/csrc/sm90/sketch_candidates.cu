// The candidates of decode rows: the C tokens of the highest score keys, the newest tokens always among them. One cluster a row.
//
// Few keys reach a bound from a sample, which the cut hardly lies below: a lane marks them in a word and looks at these alone. A histogram
// of them, summed over the cluster, finds the cut; where the bound was too high, or the cut far above it, a histogram of all keys gives
// another bound. Then each warp counts what it has above the cut and on it, and lists that in the order of positions, so that among equal
// keys the earlier tokens are in.
#include "cluster.cuh"
#include "launch.cuh"
#include "mma_sync.cuh"
#include "sketch.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int BLOCKS = 8, THREADS = 256, WARPS = THREADS / 32, PAGE = 64;  // of a cluster, and of each of its blocks
constexpr int RESIDENT = 5;               // blocks of a multiprocessor: at 4, 64 clusters miss one wave by two
constexpr int EACH = 8, LOADS = 4;        // keys that a lane loads at once, and loads of a chunk
constexpr int CHUNK = 32 * EACH * LOADS;  // keys of a warp, one bit of a word each
constexpr int HELD = 2;                   // chunks of a warp that a block keeps
constexpr int COARSE_SHIFT = 5, BINS = 2048, OWN_BINS = BINS / THREADS;  // the coarse bins take keys of 16 bits
static_assert(EACH * LOADS == 32 && BINS == BLOCKS * THREADS && OWN_BINS == 8 && BINS << COARSE_SHIFT == 1 << 16);

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

struct Marks {  // of a lane's keys of a chunk: bit 8·i + j is key j of load i
  uint32_t above, ties;
};

struct Smem {
  uint4 keys[WARPS][HELD][CHUNK / EACH];
  uint32_t bins[BINS];          // of this block's keys; before, a sample of the cluster's
  uint32_t part[THREADS];       // those of the cluster's bins that this block sums up, from the highest
  uint32_t totals[BLOCKS];      // keys in the part of each block
  uint32_t scan[WARPS];
  uint32_t bin, above, inside;  // where the wanted key is, and keys in higher bins and in that one
  Count warps[WARPS], blocks[BLOCKS];
  uint64_t landed[WARPS];       // of the keys
};

__device__ __forceinline__ uint32_t key_of(const uint4& eight, int i) {
  const uint32_t pair = i < 2 ? eight.x : i < 4 ? eight.y : i < 6 ? eight.z : eight.w;
  return i % 2 ? pair >> 16 : pair & 0xFFFF;
}

// Where the marks of a warp's chunk come: load by load, and in a load lane by lane.
class Ordered {
  uint32_t lower, last, before_last;  // marks of each load, in a byte: of the lanes before this one, at most 31 · 8, and of the last lane

 public:
  __device__ __forceinline__ Ordered(uint32_t marks, int lane) {
    uint32_t own = marks - (marks >> 1 & 0x55555555u);  // of two bits, then of four and of eight
    own = (own & 0x33333333u) + (own >> 2 & 0x33333333u);
    own = (own + (own >> 4)) & 0x0F0F0F0Fu;
    lower = warp_sum_up(own, lane) - own;  // a byte of the sum may run over, not of the difference
    last = __shfl_sync(~0u, own, 31), before_last = __shfl_sync(~0u, lower, 31);
  }
  __device__ __forceinline__ uint32_t before(int load) const { return lower >> load * EACH & 0xFF; }
  __device__ __forceinline__ uint32_t all(int load) const { return (before_last >> load * EACH & 0xFF) + (last >> load * EACH & 0xFF); }
};

// Sum over the threads of a block up to this one.
__device__ uint32_t block_sum_up(Smem& s, uint32_t own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t in_warp = warp_sum_up(own, lane);
  if (lane == 31) s.scan[warp] = in_warp;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? s.scan[lane] : 0u) + in_warp;
}

// A key that `need` of the sampled keys reach, but for the bits of a coarse bin. The sample is in the place of the bins, of every block.
__device__ __noinline__ uint32_t sampled_bound(uint32_t need) {
  Smem& s = sm90::shared<Smem>();
  uint32_t sample[OWN_BINS];
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) {
    uint32_t& bin = s.bins[i * THREADS + threadIdx.x];
    sample[i] = bin, bin = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) atomicAdd(&s.bins[sample[i] >> COARSE_SHIFT], 1u);
  __syncthreads();
  const int last = BINS - int(threadIdx.x) * OWN_BINS;  // the first thread has the highest bins
  uint32_t own[OWN_BINS], all = 0;
#pragma unroll
  for (int i = 0; i < OWN_BINS; ++i) all += own[i] = s.bins[last - OWN_BINS + i];
  uint32_t upto = block_sum_up(s, all);
  if (upto >= need && upto - all < need) {
    int bin = last - OWN_BINS;
#pragma unroll
    for (int i = 0; i < OWN_BINS - 1; ++i) bin += (upto -= own[i]) >= need;
    s.bin = bin;
  }
  __syncthreads();
  return s.bin << COARSE_SHIFT;
}

// Finds the bin of the cluster's histogram in which the `need`-th largest key lies (s.bin, s.above, s.inside); the lowest one if there are fewer.
// Each block sums up a part of the bins, the first one the highest, and tells the others its total; they look into the part that has the key.
__device__ void find_bin(Smem& s, uint32_t need) {
  const int rank = sm90::cluster_rank(), place = threadIdx.x;
  sm90::cluster_sync();
  uint32_t own = 0;
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) own += sm90::shared_of<Smem>(b).bins[BINS - 1 - rank * THREADS - place];
  s.part[place] = own;
  const uint32_t all = block_sum_up(s, own);
  if (place == THREADS - 1) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) sm90::shared_of<Smem>(b).totals[rank] = all;
  }
  sm90::cluster_sync();
  int part = 0;
  uint32_t before = 0;
  while (part < BLOCKS - 1 && before + s.totals[part] < need) before += s.totals[part++];
  own = sm90::shared_of<Smem>(part).part[place];
  before += block_sum_up(s, own) - own;
  const int bin = BINS - 1 - part * THREADS - place;
  if (before < need && (before + own >= need || bin == 0)) s.bin = bin, s.above = before, s.inside = own;
  __syncthreads();
}

__global__ void __launch_bounds__(THREADS, RESIDENT) candidates_kernel(const Candidates in) {
  Smem& s = sm90::shared<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = sm90::cluster_rank();
  const int row = blockIdx.x / BLOCKS, thread = rank * THREADS + threadIdx.x;  // of the cluster
  const int length = __ldg(in.lens + row);
  int32_t* positions = in.positions + int64_t(row) * in.candidates;
  sm90::cluster_sync();  // all blocks run, so their memory may be written
  sm90::launch_wait();   // rows of this step may still be read by the launch before last
  sm90::launch_next();
  if (length <= in.candidates) {
    for (int i = thread; i < length; i += BLOCKS * THREADS) positions[i] = i;
    return;
  }
  const int scored = sketched_pages(length) * PAGE;
  const uint32_t wanted = in.candidates - (length - scored);

  // A warp has a run of whole chunks, and samples a key of each part of it for every lane.
  const uint16_t* scores = in.scores + row * in.room;
  const int chunks = (scored + BLOCKS * WARPS * CHUNK - 1) / (BLOCKS * WARPS * CHUNK), part = chunks * (CHUNK / 32);
  const int from = min((rank * WARPS + warp) * chunks * CHUNK, scored), to = min(from + chunks * CHUNK, scored);
  const int sampled = from + lane * part + int((thread * 0x9E3779B1u >> 8) % part);  // hashed: keys may repeat with a period
  const uint32_t sample = sampled < to ? __ldcg(scores + sampled) : 0u;
  const uint32_t landed = sm90::smem_address(&s.landed[warp]);
  if (lane == 0) {
    const int bytes = chunks > HELD ? 0 : (to - from) * int(sizeof(uint16_t));
    sm90::barrier_init(landed, 1);
    sm90::barrier_init_fence();
    sm90::barrier_arrive_expect(landed, bytes);
    if (bytes) sm90::copy_run(sm90::smem_address(s.keys[warp]), scores + from, bytes, landed);
  }
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) sm90::shared_of<Smem>(b).bins[thread] = sample;
  // A lane's keys of a chunk; the lane alone reads them, so where a block cannot keep all chunks, it may bring them again.
  const auto place = [&](int chunk, uint32_t bit) { return from + chunk * CHUNK + int((bit / EACH * 32 + lane) * EACH + bit % EACH); };
  const auto lane_keys = [&](int chunk) { return s.keys[warp][chunk % HELD] + lane; };
  const auto each = [&](int chunk, const auto& use) {
    uint4* keys = lane_keys(chunk);
    if (chunks > HELD) {
#pragma unroll
      for (int i = 0; i < LOADS; ++i) keys[i * 32] = __ldcg(reinterpret_cast<const uint4*>(scores + min(place(chunk, i * EACH), scored - EACH)));
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const uint4 eight = keys[i * 32];
#pragma unroll
      for (int j = 0; j < EACH; ++j) use(i * EACH + j, key_of(eight, j));
    }
  };
  const auto key_at = [&](int chunk, uint32_t bit) { return uint32_t(reinterpret_cast<const uint16_t*>(lane_keys(chunk) + bit / EACH * 32)[bit % EACH]); };
  const auto valid = [&](int chunk) {  // bits of keys before `to`
    const int loads = min(max((to - place(chunk, 0) + 32 * EACH - 1) / (32 * EACH), 0), LOADS);
    return loads ? ~0u >> 32 - loads * EACH : 0u;
  };
  // A histogram of the keys from `lo` on: the last bin takes all that lie further up. Finds the bin of the cut.
  const auto find_cut = [&](uint32_t lo, int shift) {
#pragma unroll
    for (int i = 0; i < OWN_BINS; ++i) s.bins[i * THREADS + threadIdx.x] = 0;
    __syncthreads();
    for (int chunk = 0; from + chunk * CHUNK < to; ++chunk) {
      uint32_t left = 0;
      each(chunk, [&](int bit, uint32_t key) { left |= (key >= lo ? 1u : 0u) << bit; });
      for (left &= valid(chunk); left; left &= left - 1) atomicAdd(&s.bins[min((key_at(chunk, __ffs(left) - 1) - lo) >> shift, BINS - 1u)], 1u);
    }
    find_bin(s, wanted);
  };

  sm90::cluster_sync();
  sm90::barrier_wait(landed, 0);
  const uint32_t expected = wanted / part;  // in the sample
  uint32_t lo = sampled_bound(min(expected + 4 * uint32_t(sqrtf(expected)) + 1, uint32_t(BINS)));
  for (bool is_coarse = false;;) {
    find_cut(lo, is_coarse ? COARSE_SHIFT : 0);
    if (is_coarse) {
      lo = s.bin << COARSE_SHIFT, is_coarse = false;
    } else if (s.above + s.inside < wanted || s.bin == BINS - 1) {
      lo = 0, is_coarse = true;
    } else {
      break;
    }
  }
  const uint32_t cut = lo + s.bin, need = wanted - s.above;  // `need` keys equal to the cut, and all above it

  const auto mark = [&](int chunk) {
    Marks marks{};
    each(chunk, [&](int bit, uint32_t key) { marks.above |= (key > cut ? 1u : 0u) << bit, marks.ties |= (key == cut ? 1u : 0u) << bit; });
    return Marks{marks.above & valid(chunk), marks.ties & valid(chunk)};
  };
  const auto marks_in = [&](int chunk) { return reinterpret_cast<Marks*>(lane_keys(chunk)); };  // the place of keys that are done with
  Count count{};
  for (int chunk = 0; from + chunk * CHUNK < to; ++chunk) {
    const Marks marks = mark(chunk);
    if (chunks <= HELD) *marks_in(chunk) = marks;
    count.above += __popc(marks.above), count.ties += __popc(marks.ties);
  }
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

  for (int chunk = 0; from + chunk * CHUNK < to; ++chunk) {
    const Marks marks = chunks <= HELD ? *marks_in(chunk) : mark(chunk);
    const Ordered of_above(marks.above, lane), of_ties(marks.ties, lane);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const uint32_t tied = ties + of_ties.before(i);
      uint32_t in = marks.ties & 0xFFu << i * EACH;
      while (in && tied + __popc(in) > need) in ^= 1u << 31 - __clz(in);  // the earliest ones are in
      uint32_t next = above + of_above.before(i) + min(tied, need);
      for (in |= marks.above & 0xFFu << i * EACH; in; in &= in - 1) positions[next++] = place(chunk, __ffs(in) - 1);
      above += of_above.all(i), ties += of_ties.all(i);
    }
  }
  for (int i = thread; i < length - scored; i += BLOCKS * THREADS) positions[wanted + i] = scored + i;
}

// ---- host

void candidates(Bytes call, int64_t rows, int64_t stream) {
  launch_behind("candidates_kernel", candidates_kernel, int(rows) * BLOCKS, THREADS, stream_at(stream), unpack<Candidates>(call), BLOCKS);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(candidates, misa::candidates);
