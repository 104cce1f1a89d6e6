// The candidates of decode rows: the C tokens of the highest score keys, the newest tokens always among them. One cluster a row.
//
// A sample of the row's keys gives two bounds between which the cut hardly fails to lie. A lane marks what it has from the lower one on, a
// bit for each of its 32 keys, and counts the marked ones in a histogram; the blocks add up one another's and find the cut. Its bins are
// keys; where the bounds lie too far apart for that, as on both sides of a score of zero, they are wider, and another histogram begins with
// the one that has the cut. Then lanes mark what they have above the cut and on it, and list that in the order of positions, so that among
// equal keys the earlier tokens are in. Where the cut lay elsewhere, a histogram of all keys comes in between. Neighbouring tokens score
// alike, and a warp waits for the lane that has most to count: so a lane counts pieces from all over a chunk. For the list it has
// neighbours alone.
#include <array>

#include "cluster.cuh"
#include "launch.cuh"
#include "mma_sync.cuh"
#include "sketch.cuh"
#include "warp.cuh"

namespace misa {
namespace {

constexpr int MOST_BLOCKS = 8;             // of a cluster
constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int PAGE = 64;
constexpr int EACH = 8, RUN = 4 * EACH;    // keys that a lane loads at once, and all of a lane
constexpr int CHUNK = 32 * RUN, HELD = 4;  // keys of a warp at a time, and how often it has room for so many
constexpr int SPREAD = 32 * EACH;          // from one piece of a lane to the next, where they come from all over a chunk
constexpr int SAMPLE = 1024;
constexpr int COARSE_SHIFT = 5, BINS = 2048, OWN_BINS = BINS / THREADS;  // the coarse bins take keys of 16 bits
static_assert(OWN_BINS == 4 && BINS << COARSE_SHIFT == 1 << 16 && SAMPLE % THREADS == 0 && SAMPLE == 1 << 10);

struct Candidates {
  const uint16_t* scores;  // [R, room], undefined once they are listed
  const int32_t* lens;     // [R]
  int32_t* positions;      // [R, candidates] ascending; unwritten past the row's length
  int64_t room;
  int candidates;
};

struct Cut {  // what is above the cut and what is on it: marks of a lane's keys, or how many
  uint32_t above, ties;
};
struct Found {
  uint32_t bin, above, inside;  // where the wanted key is, and keys in higher bins and in that one
};

struct Smem {
  alignas(16) uint16_t keys[WARPS][HELD][CHUNK];
  uint4 bins[BINS / OWN_BINS];
  uint64_t landed[WARPS][HELD];
  Found found[2];
  uint32_t scan[WARPS];
  Cut warps[WARPS];
};

// Which of a lane's keys, in pieces APART from one another, reach a bound: a bit each, in their order.
template <int APART>
__device__ __forceinline__ uint32_t reaching(const uint16_t* keys, uint32_t bound) {
  constexpr uint32_t HIGHEST = 0x80008000u;  // bits of two keys
  const uint32_t low = (bound & 0x7FFF) * 0x10001u, low_half = bound >> 15 ? 0u : ~0u;
  const auto reach = [&](uint32_t two) {  // in the highest bits
    const uint32_t rest = (two | HIGHEST) - low;
    return (two & rest) | (low_half & (two | rest));
  };
  uint32_t marks = 0;
#pragma unroll
  for (int i = 0; i < RUN / EACH; ++i) {
    const int piece = APART == EACH ? (i + threadIdx.x % 32 / 2) % (RUN / EACH) : i;  // of neighbours lanes differ, and with that banks
    const uint4 eight = *reinterpret_cast<const uint4*>(keys + piece * APART);
    const uint32_t first = sm90::pick_bytes<0x7531>(reach(eight.x), reach(eight.y)), last = sm90::pick_bytes<0x7531>(reach(eight.z), reach(eight.w));
    const uint32_t spread = (first >> 4 & 0x08080808u) | (last & 0x80808080u);
    marks |= (spread * 0x00204081u >> 24) << piece * EACH;  // the product moves all eight into the highest byte
  }
  return marks;
}

// Finds the bins in which the `needs`-th largest keys lie; the lowest one if there are fewer. A thread has four neighbouring bins, the first
// thread the highest ones.
template <int N>
__device__ __forceinline__ void find_bins(Smem& s, const uint32_t (&needs)[N], const uint4& own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t all = own.x + own.y + own.z + own.w, upto = warp_sum_up(all, lane);
  if (lane == 31) s.scan[warp] = upto;
  __syncthreads();
  uint32_t above = __reduce_add_sync(~0u, lane < warp ? s.scan[lane] : 0u) + upto - all;
#pragma unroll
  for (int i = OWN_BINS - 1; i >= 0; --i) {
    const uint32_t bin = BINS - (threadIdx.x + 1) * OWN_BINS + i, inside = word(own, i);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (above < needs[n] && (above + inside >= needs[n] || bin == 0)) s.found[n] = {bin, above, inside};
    above += inside;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(THREADS, 1) candidates_kernel(const Candidates in) {
  Smem& s = sm90::shared<Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = sm90::cluster_rank(), blocks = sm90::cluster_blocks();
  const int row = blockIdx.x / blocks, thread = rank * THREADS + threadIdx.x;  // of the cluster
  const int length = __ldg(in.lens + row);
  int32_t* positions = in.positions + int64_t(row) * in.candidates;
  if (length <= in.candidates) {
    sm90::launch_wait();  // rows of this step may still be read by the launch before last
    sm90::launch_next();
    for (int i = thread; i < length; i += blocks * THREADS) positions[i] = i;
    return;
  }
  const int scored = sketched_pages(length) * PAGE;
  const uint32_t wanted = in.candidates - (length - scored);

  // A warp has a run of chunks. Runs go around the blocks, as much of what a row chooses lies together. Where a warp has room for all of
  // its chunks they come once, otherwise anew each time that all are looked at.
  const uint16_t* scores = in.scores + row * in.room;
  const int chunks = (scored + blocks * WARPS * CHUNK - 1) / (blocks * WARPS * CHUNK);
  const int run = warp * blocks + rank, from = min(run * chunks * CHUNK, scored), to = min(from + chunks * CHUNK, scored);
  const bool held = chunks <= HELD;
  const uint32_t landed = sm90::smem_address(s.landed[warp]);
  const auto fetch = [&](int turn) {
    const int first = from + turn % chunks * CHUNK, bytes = max(min(CHUNK, to - first), 0) * int(sizeof(uint16_t));
    if (lane == 0) {
      sm90::barrier_arrive_expect(landed + turn % HELD * 8, bytes);
      if (bytes) sm90::copy_run(sm90::smem_address(s.keys[warp][turn % HELD]), scores + first, bytes, landed + turn % HELD * 8);
    }
  };
  int turn = 0;  // of the next chunk
  // Hands over the first position of each chunk, its keys, and how many there are from there on. It gives back what came of the keys.
  const auto each = [&](bool is_last, const auto& use) {
    if (held) turn = 0;
    for (int chunk = 0; chunk < chunks; ++chunk, ++turn) {
      sm90::barrier_wait(landed + turn % HELD * 8, turn / HELD % 2);
      const int first = from + chunk * CHUNK;
      const uint32_t marks = use(first, s.keys[warp][turn % HELD], to - first);
      if (is_last && lane < CHUNK / PAGE && lane * PAGE < to - first) sm90::discard(scores + first + lane * PAGE);
      if (!held && (!is_last || chunk + HELD < chunks)) {
        __any_sync(~0u, marks);  // waits for all lanes' loads; a copy would not
        fetch(turn + HELD);
      }
    }
  };
  if (lane < HELD) sm90::barrier_init(landed + lane * 8, 1);
  sm90::barrier_init_fence();
  s.bins[threadIdx.x] = {};
  __syncwarp();
  sm90::launch_wait();
  for (int i = 0; i < min(HELD, chunks); ++i) fetch(i);

  uint32_t* bins = &s.bins[0].x;
  uint4& own_bins = s.bins[THREADS - 1 - threadIdx.x];
  uint32_t sample[SAMPLE / THREADS];
#pragma unroll
  for (int i = 0; i < SAMPLE / THREADS; ++i) {
    const uint32_t number = i * THREADS + threadIdx.x;
    const uint32_t fraction = number << 22 | number * 0x9E3779B1u >> 10;  // of the row: hashed, as keys may repeat with a period
    sample[i] = __ldcg(scores + (uint64_t(fraction) * uint32_t(scored) >> 32));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SAMPLE / THREADS; ++i) atomicAdd(&bins[sample[i] >> COARSE_SHIFT], 1u);
  __syncthreads();
  const uint32_t expected = wanted * uint64_t(SAMPLE) / scored, margin = 4 * uint32_t(sqrtf(expected)) + 1;
  uint4 own = own_bins;
  own_bins = {};
  find_bins<2>(s, {expected + margin, expected > margin ? expected - margin : 1}, own);
  sm90::launch_next();  // not before: what the next launch asks for would come before what is missing here
  uint32_t bound = s.found[0].bin << COARSE_SHIFT;
  int shift = 0;  // bits of a key that a bin of the histogram does not tell apart
  while (shift < COARSE_SHIFT && (s.found[1].bin + 1 << COARSE_SHIFT) - bound > uint32_t(BINS - 1) << shift) ++shift;

  for (;;) {
    each(false, [&](int, const uint16_t* keys, int rest) {
      const uint16_t* own = keys + lane * EACH;
      const int pieces = min(max(rest - lane * EACH + SPREAD - 1, 0) / SPREAD, RUN / EACH);  // that there are: pages end where pieces do
      const uint32_t marks = reaching<SPREAD>(own, bound) & uint32_t((uint64_t(1) << pieces * EACH) - 1);
      const auto bin_of = [&](int key) { return &bins[min((own[key / EACH * SPREAD + key % EACH] - bound) >> shift, BINS - 1u)]; };
      for (uint32_t left = marks; left;) {  // the lowest and the highest at once, so that one's look-up hides the other's
        const int low = __ffs(left) - 1, high = 31 - __clz(left);
        uint32_t *const first = bin_of(low), *const second = bin_of(high);
        atomicAdd(first, 1u);
        if (high > low) atomicAdd(second, 1u);
        left = left & left - 1 & ~(1u << high);
      }
      return marks;
    });
    sm90::cluster_sync();
    uint4 theirs[MOST_BLOCKS];  // asked for at once: each takes a while
#pragma unroll
    for (int b = 0; b < MOST_BLOCKS; ++b) theirs[b] = b < blocks ? sm90::shared_of<Smem>(b).bins[THREADS - 1 - threadIdx.x] : uint4{};
    own = {};
#pragma unroll
    for (int b = 0; b < MOST_BLOCKS; ++b) own.x += theirs[b].x, own.y += theirs[b].y, own.z += theirs[b].z, own.w += theirs[b].w;
    find_bins<1>(s, {wanted}, own);
    const Found found = s.found[0];
    const bool has_cut = found.above + found.inside >= wanted && (found.bin < BINS - 1 || shift == COARSE_SHIFT);
    if (has_cut && shift == 0) break;
    bound = has_cut ? bound + (found.bin << shift) : 0;
    shift = has_cut ? 0 : COARSE_SHIFT;
    sm90::cluster_sync();  // the others have read
    own_bins = {};
    __syncthreads();
  }
  const uint32_t cut = bound + s.found[0].bin, need = wanted - s.found[0].above;  // `need` keys equal to the cut, and all above it

  const auto mark = [&](const uint16_t* own, int rest) {
    const uint32_t above = reaching<EACH>(own, cut + 1), valid = lane * RUN < rest ? ~0u : 0u;
    return Cut{above & valid, reaching<EACH>(own, cut) & ~above & valid};
  };
  // Marks take the place of keys that are done with.
  const auto marks_in = [](const uint16_t* own) { return reinterpret_cast<Cut*>(const_cast<uint16_t*>(own)); };
  Cut count{};
  each(false, [&](int, const uint16_t* keys, int rest) {
    const uint16_t* own = keys + lane * RUN;
    const Cut marks = mark(own, rest);
    if (held) *marks_in(own) = marks;
    count.above += __popc(marks.above), count.ties += __popc(marks.ties);
    return marks.above | marks.ties;
  });
  count = {__reduce_add_sync(~0u, count.above), __reduce_add_sync(~0u, count.ties)};
  if (lane == 0) s.warps[warp] = count;
  sm90::cluster_sync();
  Cut before{};  // in the runs before this one: a lane adds up those that warp `lane` of each block has
#pragma unroll
  for (int b = 0; b < MOST_BLOCKS; ++b) {
    const Cut theirs = lane * blocks + b < run && b < blocks ? sm90::shared_of<Smem>(b).warps[lane] : Cut{};
    before.above += theirs.above, before.ties += theirs.ties;
  }
  uint32_t above = __reduce_add_sync(~0u, before.above), ties = __reduce_add_sync(~0u, before.ties);
  sm90::cluster_arrive();  // no block ends before all have read

  each(true, [&](int first, const uint16_t* keys, int rest) {
    const uint16_t* own = keys + lane * RUN;
    Cut marks = held ? *marks_in(own) : mark(own, rest);
    const uint32_t counts = __popc(marks.above) | __popc(marks.ties) << 16, upto = warp_sum_up(counts, lane);
    const uint32_t tied = min(ties + (upto - counts >> 16), need);
    while (tied + __popc(marks.ties) > need) marks.ties ^= 1u << 31 - __clz(marks.ties);  // the earliest ones are in
    int32_t* next = positions + above + (upto - counts & 0xFFFF) + tied;
    for (uint32_t left = marks.above | marks.ties; left; left &= left - 1) *next++ = first + lane * RUN + __ffs(left) - 1;
    const uint32_t all = __shfl_sync(~0u, upto, 31);
    above += all & 0xFFFF, ties += all >> 16;
    return marks.above | marks.ties;
  });
  for (int i = thread; i < length - scored; i += blocks * THREADS) positions[wanted + i] = scored + i;
  sm90::cluster_wait();
}

// ---- host

// Blocks of a cluster: as many as let all rows run at once.
int blocks_of(int64_t rows) {
  static const std::array<int, 3> most = [] {  // clusters of 2, 4 and 8 blocks that run at once
    std::array<int, 3> clusters;
    for (int i = 0; i < 3; ++i) clusters[i] = resident_clusters(candidates_kernel, {2 << i, THREADS, sizeof(Smem), 2 << i});
    return clusters;
  }();
  int blocks = 1;
  for (const int clusters : most)
    if (rows <= clusters) blocks *= 2;
  return blocks;
}

void candidates(Bytes call, int64_t rows, int64_t stream) {
  const int blocks = blocks_of(rows);
  const Grid grid{int(rows) * blocks, THREADS, sizeof(Smem), blocks};
  launch_behind("candidates_kernel", candidates_kernel, grid, stream_at(stream), unpack<Candidates>(call));
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(candidates, misa::candidates);
