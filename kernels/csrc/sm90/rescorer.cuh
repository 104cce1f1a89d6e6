// Exact top k of listed keys by the scores of all heads: one thread block a row.
//
// Keys are gathered straight into the registers that the tensor cores read them from. The order in which a product sums its
// 128 dimensions is free, so a thread takes 16 contiguous bytes of each half of a key, and the queries are laid out to match.
#pragma once
#include "inputs.cuh"
#include "output.cuh"
#include "ptx.cuh"
#include "select.cuh"

namespace misa {
namespace {

constexpr int RANKERS = 256;    // threads of a block: two warpgroups, each with its own tiles
constexpr int RANK_BLOCKS = 2;  // on a multiprocessor: one gathers while the other selects
constexpr int RANK_GROUPS = RANKERS / 128;
constexpr int RANK_TILE = 64;   // keys of a product
constexpr int KEY_BYTES = 128;

using Ranks = Select<RANKERS>;

// What all rows of a launch share.
struct Keys {
  const uint8_t* q;         // [T, H, 128] e4m3
  const float* gates;       // [T, H]
  const int32_t* head_ids;  // [T, h] ascending, or null
  const uint8_t* k;         // [keys, 128] e4m3
  const float* scale;       // [keys]
  const int32_t* starts;    // [T]
  const int32_t* ends;      // [T]
  int keys;
  uint32_t nought;          // 0, which the compiler must not know (see Rescorer::take)
  ResidualColumn residual;  // if the routed columns have one

  __device__ int start(int t) const { return max(starts[t], 0); }
  __device__ int length(int t) const { return max(min(ends[t], keys) - start(t), 0); }
};

template <int H>
struct RankSmem {
  // The queries lie where the histograms of a selection do, at the very start: the ones are read before the others are made.
  // With a residual they reach into the list of what is ranked, but not to its indices.
  Ranks::Smem select;
  float4 gates[4][H / 16];  // [lane of a quad]: those of its columns, in order
  float last_gate;          // of the first lane's column beyond those
  int column[H];            // of each head
  static_assert(sizeof(Ranks::Smem) - 2 * sizeof(Ranks::Smem::index) >= (H + 8) * KEY_BYTES);
};

// One row's product with the queries: which heads, in what columns, and the gather. `ROUTED` columns come first, so that the
// running sum after them is their own score. With `RESIDUAL` the last of them is no head: it has no ReLU, and no part in the sum
// over all heads. The head whose place it takes is then the first of eight columns more.
template <int H, int ROUTED, bool RESIDUAL = false>
struct Rescorer {
  static constexpr int CHUNKS = H * KEY_BYTES / 16 / RANKERS;  // 16-byte pieces of the queries that a thread moves
  static constexpr int OWN = H / 4;                            // columns of a thread, but for the eight more
  static constexpr int SUMS = (H + 8 * RESIDUAL) / 2;          // of a thread in a product
  static constexpr int HEADS_FIRST = ROUTED - RESIDUAL;        // routed heads
  static_assert(ROUTED % 4 == 0 && (!RESIDUAL || ROUTED > 0));
  RankSmem<H>& s;
  const Keys& in;
  int t;

  // Heads in the order of columns: place p is summed p/4-th by lane p%4 of its quad.
  __device__ void order() {
    const int head = threadIdx.x;
    if (head < H) {
      int place = head;
      if constexpr (ROUTED > 0) {
        int below = 0;
        bool routed = false;
#pragma unroll
        for (int j = 0; j < HEADS_FIRST; ++j) {
          const int id = __ldg(in.head_ids + int64_t(t) * HEADS_FIRST + j);
          below += id < head, routed |= id == head;
        }
        place = routed ? below : ROUTED + head - below;
      }
      (place < H ? reinterpret_cast<float*>(s.gates[place % 4])[place / 4] : s.last_gate) = __ldg(in.gates + int64_t(t) * H + head);
      s.column[head] = column_of(place);
    } else if (RESIDUAL && head == H) {
      reinterpret_cast<float*>(s.gates[3])[ROUTED / 4 - 1] = __ldg(in.residual.scale + t);
    }
  }
  static __device__ int column_of(int place) { return place / 8 * 8 + place % 4 * 2 + place / 4 % 2; }

  // A thread's pieces of the queries; of the residual and of the empty columns the first 64 threads have one each.
  struct Pieces {
    uint4 head[CHUNKS], more;
  };
  __device__ void fetch(Pieces& piece) const {
    const uint4* q = reinterpret_cast<const uint4*>(in.q + int64_t(t) * H * KEY_BYTES);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) piece.head[i] = __ldg(q + threadIdx.x + i * RANKERS);
    if constexpr (RESIDUAL) {
      const uint4* more = reinterpret_cast<const uint4*>(in.residual.query + int64_t(t) * KEY_BYTES);
      piece.more = threadIdx.x < KEY_BYTES / 16 ? __ldg(more + threadIdx.x) : uint4{0, 0, 0, 0};
    }
  }

  // Rows of 128 bytes, one a column, under the 128-byte swizzle. Within each half of 64 bytes, word w of piece c becomes word
  // c of piece w: step s of the product then reads of lane c what `load` puts into its registers.
  __device__ void stage(const Pieces& piece) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) put_piece(s.column[(threadIdx.x + i * RANKERS) / 8], piece.head[i]);
    if constexpr (RESIDUAL) {
      const int column = threadIdx.x / 8;
      if (column < 8) put_piece(column == 0 ? column_of(ROUTED - 1) : H + column, piece.more);
    }
    sm90::fence_async_shared();
  }
  __device__ void put_piece(int column, const uint4& piece) {
    const int half = threadIdx.x % 8 / 4, c = threadIdx.x % 4;
    const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) s.select.bins[column * 32 + ((half * 4 + w) ^ (column % 8)) * 4 + c] = word[w];
  }

  // A thread's quarters of two neighbouring keys: of the rows lane/4 and lane/4 + 8 of its warp's product.
  struct Tile {
    uint4 a[2][2];  // [key][half of it]
    float scale;    // of the key whose score this thread stores
  };

  // What a step leaves to the next one: sums that a quad's four lanes have begun to add up.
  struct Sums {
    static constexpr int N = ROUTED > 0 ? 2 : 1;
    float own[N], got[N];
    float scale;
  };

  // Both halves of a key, 64 bytes apart. Every row of a call reads the keys, so they are what L2 shall keep: without the policy
  // half of the gathers miss it, though it could hold the keys three times.
  static __device__ void gather(uint4 (&half)[2], const uint8_t* p) {
    const uint64_t policy = sm90::evict_last();
    half[0] = sm90::load_through(p, policy), half[1] = sm90::load_through(p + 64, policy);
  }

  // The tensor cores want words of two keys side by side in registers, a load brings four words of one. The words are moved when
  // they are used, or the compiler would move (and wait for) them when loaded.
  __device__ uint32_t take(uint32_t word) const { return sm90::moved(word, in.nought); }

  __device__ __forceinline__ void multiply(float (&d)[SUMS], const Tile& tile, uint64_t b) const {
    uint32_t a[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint4 u = tile.a[0][k / 2], v = tile.a[1][k / 2];
      a[k][0] = take(k % 2 ? u.z : u.x), a[k][1] = take(k % 2 ? v.z : v.x);
      a[k][2] = take(k % 2 ? u.w : u.y), a[k][3] = take(k % 2 ? v.w : v.y);
    }
    sm90::mma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k == 0) sm90::mma_registers(d, a[k][0], a[k][1], a[k][2], a[k][3], b);
      else sm90::mma_registers_add(d, a[k][0], a[k][1], a[k][2], a[k][3], b + k * 2);
    }
    sm90::mma_commit();
  }

  // Sums a thread's columns, and gives away to its neighbour what that one stores.
  __device__ __forceinline__ void fold(Sums& sums, const float (&d)[SUMS], const float4 (&gates)[OWN / 4], float last, bool odd,
                                       bool fourth) const {
    float sum[2] = {}, routed[2] = {};
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const float4 four = gates[j / 4];
      const float gate = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = d[j / 2 * 4 + half * 2 + j % 2];
        if (j + 1 != ROUTED / 4) {
          sum[half] = fmaf(fmaxf(x, 0.f), gate, sum[half]);
        } else {
          const bool linear = RESIDUAL && fourth;  // the quad's fourth lane has the residual's column
          routed[half] = fmaf(linear ? x : fmaxf(x, 0.f), gate, sum[half]);
          if (!linear) sum[half] = routed[half];
        }
      }
    }
    if constexpr (RESIDUAL) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[half] = fmaf(fmaxf(d[H / 2 + half * 2], 0.f), last, sum[half]);
    }
    if constexpr (ROUTED > 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums.own[half] = odd ? sum[half] : routed[half];
        sums.got[half] = __shfl_xor_sync(~0u, odd ? routed[half] : sum[half], 1);
      }
    } else {
      sums.own[0] = odd ? sum[1] : sum[0];
      sums.got[0] = __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
    }
  }

  // The score that this thread stores.
  __device__ __forceinline__ float finish(const Sums& sums, bool high) const {
    if constexpr (ROUTED > 0) {
      const float low = sums.own[0] + sums.got[0], up = sums.own[1] + sums.got[1];
      return ((high ? up : low) + __shfl_xor_sync(~0u, high ? low : up, 2)) * sums.scale;
    } else {
      const float sum = sums.own[0] + sums.got[0];
      return (sum + __shfl_xor_sync(~0u, sum, 2)) * sums.scale;
    }
  }

  // Scores the keys at n places. put(i, all, routed, score) takes each one's sum over all heads and, of routed heads, over those; where
  // neither is said, nothing is to be put. It shall not branch: lanes hold either sum, and steps wait for it.
  // at.cursor() gives the keys of an even place and the next one, for ascending places; so of an odd number of keys, the
  // place behind the last must have a key too.
  //
  // In a step, the tile's registers are gathered into again as soon as its words are taken, from keys that were looked up a
  // step before; and the sums of the step before are finished while the tensor cores multiply. So nothing waits for a look-up,
  // nor a shuffle behind gathers. Beyond the list the last keys are gathered again.
  template <class At, class Put>
  __device__ __forceinline__ void score(int n, const At& at, const Put& put) const {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), c = threadIdx.x % 4;
    const bool odd = c % 2, high = c / 2;
    const int pair = threadIdx.x % 128 / 4 * 2;  // a thread's first key in a tile
    const int mine = ROUTED > 0 ? high : odd;    // which of the two it stores the score of
    const uint64_t b = sm90::tile_descriptor(sm90::smem_address(s.select.bins));
    const uint8_t* from = in.k + c * 16;
    asm volatile("" : "+l"(from));  // not to be computed again
    // Held in registers, for which a second tile on its way has none left: reading them from shared memory for each tile costs more
    // than that would bring.
    float4 weight[OWN / 4];
#pragma unroll
    for (int i = 0; i < OWN / 4; ++i) weight[i] = sm90::load16(sm90::smem_address(s.gates[c]) + i * 16);
    const float last = RESIDUAL && c == 0 ? s.last_gate : 0.f;

    constexpr int NEXT = RANK_GROUPS * RANK_TILE;
    int place = (group - RANK_GROUPS) * RANK_TILE + pair + mine;  // of the score to store next: none before the list
    auto cursor = at.cursor();
    int2 keys;
    Tile tile;
    const auto look = [&](int ahead) { keys = cursor(min(place + ahead * NEXT, n - 1) & ~1); };
    const auto load = [&] {
      gather(tile.a[0], from + uint64_t(uint32_t(keys.x)) * KEY_BYTES);
      gather(tile.a[1], from + uint64_t(uint32_t(keys.y)) * KEY_BYTES);
      tile.scale = __ldg(in.scale + (mine ? keys.y : keys.x));
    };
    const auto store = [&](float score) {
      const bool live = uint32_t(place) < n && (ROUTED > 0 || !high), all = ROUTED == 0 || odd;
      put(place, live && all, live && !all, score);
      place += NEXT;
    };
    Sums sums{};
    look(1);
    load();
    look(2);
    for (int first = group * RANK_TILE; first < n; first += NEXT) {
      float d[SUMS];
      multiply(d, tile, b);
      const float score = finish(sums, high);
      sums.scale = __uint_as_float(take(__float_as_uint(tile.scale)));
      load();
      look(3);
      store(score);
      sm90::mma_wait<0>();
      sm90::pin(d);
      fold(sums, d, weight, last, odd, c == 3);
    }
    store(finish(sums, high));
  }
};

// Rows of at most k keys take them all.
__device__ __forceinline__ bool take_all(const Keys& in, const Output& output, int t) {
  const int length = in.length(t);
  if (length > output.k) return false;
  const OutputRow row = output.row(t);
  for (int j = threadIdx.x; j < output.k; j += RANKERS) row.out[j] = j < length ? row.place(j) : -1;
  return true;
}

// Order of an all-head score among listed keys: below every one of them is OUT, which is for keys that are no more chosen.
constexpr uint32_t OUT = 0;
__device__ __forceinline__ uint32_t full_key(uint32_t key) { return max(key, OUT + 1); }

// Writes row t's top k of n listed keys, of which `kept` are not OUT; least and most are a thread's own extremes of the kept.
// `chosen` has room for k places: keys are looked up once all are known, and not by the few lanes that find one at a time.
template <class At>
__device__ __forceinline__ void write_top(Ranks::Smem& s, const Output& output, const Keys& in, int t, const uint32_t* full, int n,
                                          int kept, uint32_t least, uint32_t most, const At& at, uint16_t* chosen) {
  const auto all = Ranks::range(s, least, most, output.k, kept);
  Ranks::top(s, all, [&](int j) { return full[j]; }, [&](int j) { return at.find(j); }, n,
             [&](int place, int j) { chosen[place] = uint16_t(j); });
  const OutputRow row = output.row(t);
  const int start = in.start(t);
  for (int place = threadIdx.x; place < output.k; place += RANKERS) row.out[place] = row.place(at.find(chosen[place]) - start);
}

// ---- host -----------------------------------------------------------------------------------------------------------

inline Keys keys_of(const Inputs& in) {
  return {in.index_q, in.head_gates, in.head_ids, in.index_k, in.k_scale, in.ks, in.ke, in.keys, 0, in.residual};
}

}  // namespace
}  // namespace misa
