// HISA: the tokens of a row's best blocks, and of those the exact top k by all heads. One thread block a row.
#include <cfloat>

#include "launch.cuh"
#include "rescorer.cuh"
#include "shape.cuh"

namespace misa {
namespace {

struct BlockChoice {
  const float* scores;  // [T, pitch] of complete blocks
  int64_t pitch;
  int size, kept, room;  // tokens of a block, blocks to keep, tokens that can be listed
};

struct Blocks {
  Keys in;
  Output output;
  BlockChoice choice;
};

// Listed tokens: the first key of each page of them. All pages are whole but the last.
struct Pages {
  const int* first;
  int last;  // of all keys
  __device__ int find(int i) const { return first[i / PAGE] + i % PAGE; }
  struct Cursor {
    const Pages& pages;
    __device__ int2 operator()(int i) const {
      const int key = pages.find(i);
      return {key, min(key + 1, pages.last)};
    }
  };
  __device__ Cursor cursor() const { return {*this}; }
};

// Shared memory of a block that lists `room` tokens and chooses k.
constexpr int blocks_bytes(int room, int k) { return int(sizeof(RankSmem<INDEX_HEADS>)) + room * 4 + (room + PAGE - 1) / PAGE * 4 + k * 2; }

__global__ void __launch_bounds__(RANKERS, RANK_BLOCKS) blocks_kernel(const __grid_constant__ Blocks job) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Scorer = Rescorer<INDEX_HEADS, 0>;
  RankSmem<INDEX_HEADS>& s = *reinterpret_cast<RankSmem<INDEX_HEADS>*>(raw);
  uint32_t* full = reinterpret_cast<uint32_t*>(raw + sizeof(s));
  int* pages = reinterpret_cast<int*>(full + job.choice.room);
  uint16_t* chosen = reinterpret_cast<uint16_t*>(pages + (job.choice.room + PAGE - 1) / PAGE);

  const int t = blockIdx.x;
  if (take_all(job.in, job.output, t)) return;
  Scorer scorer{s, job.in, t};
  Scorer::Pieces piece;
  scorer.fetch(piece);
  scorer.order();

  const int start = job.in.start(t), length = job.in.length(t), complete = length / job.choice.size, kept = min(complete, job.choice.kept);
  const int each = job.choice.size / PAGE, tail = length - complete * job.choice.size, n = kept * job.choice.size + tail;
  if (complete > kept) {
    const float* scores = job.choice.scores + t * job.choice.pitch;
    // The first and the newest block stay in any case; NaN and -inf rank as the lowest number.
    constexpr uint32_t ALWAYS = ~0u - 1;
    const auto finite = [&](int b) { return fminf(fmaxf(__ldg(scores + b), -FLT_MAX), FLT_MAX); };
    const auto key = [&](int b) { return b == 0 || b == complete - 1 ? ALWAYS : rank_key(finite(b)); };
    uint32_t least = ALWAYS, most = 0;
    Ranks::each(key, complete, [&](uint32_t k, int) {
      least = min(least, k);
      if (k != ALWAYS) most = max(most, k);
    });
    auto cut = Ranks::range(s.select, least, most, kept, complete);
    if (kept > 2) cut.need -= 2, cut.inside -= 2;
    else cut.hi = ALWAYS;
    Ranks::top(s.select, cut, key, [](int b) { return b; }, complete, [&](int place, int b) {
      for (int p = 0; p < each; ++p) pages[place * each + p] = start + b * job.choice.size + p * PAGE;
    });
  } else {
    for (int p = threadIdx.x; p < complete * each; p += RANKERS) pages[p] = start + p * PAGE;
  }
  for (int p = threadIdx.x; p * PAGE < tail; p += RANKERS) pages[kept * each + p] = start + complete * job.choice.size + p * PAGE;
  __syncthreads();
  scorer.stage(piece);
  __syncthreads();
  const Pages list{pages, job.in.keys - 1};
  scorer.score(n, list, [&](int j, bool all, bool, float score) { sm90::store_if(all, full + j, full_key(rank_key(score))); });
  __syncthreads();
  uint32_t least = ~0u, most = 0;
  Ranks::each([&](int j) { return full[j]; }, n, [&](uint32_t k, int) { least = min(least, k), most = max(most, k); });
  write_top(s.select, job.output, job.in, t, full, n, n, least, most, list, chosen);
}

// ---- host -----------------------------------------------------------------------------------------------------------

void topk(Bytes inputs, Bytes output, Bytes choice, int64_t stream) {
  const auto in = unpack<Inputs>(inputs);
  const Blocks job{keys_of(in), unpack<Output>(output), unpack<BlockChoice>(choice)};
  const Grid grid{in.rows, RANKERS, blocks_bytes(job.choice.room, job.output.k), 1, true};
  launch_behind("blocks_kernel", blocks_kernel, grid, stream_at(stream), job);
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk, misa::topk);
