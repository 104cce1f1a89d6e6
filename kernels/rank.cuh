// Exact top k of listed keys by the scores of all heads: one thread block a row.
//
// Keys are gathered straight into the registers that the tensor cores read them from. The order in which a product sums its
// 128 dimensions is free, so a thread takes 16 contiguous bytes of each half of a key, and the queries are laid out to match.
#pragma once
#include "output.cuh"
#include "select.cuh"
#include "sm90.cuh"

namespace misa {

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
  uint32_t nought;          // 0, which the compiler must not know (see Rescorer::score)

  __device__ int start(int t) const { return max(starts[t], 0); }
  __device__ int length(int t) const { return max(min(ends[t], keys) - start(t), 0); }
};

template <int H>
struct RankSmem {
  // The queries lie where the histograms of a selection do, at the very start: the ones are read before the others are made.
  Ranks::Smem select;
  float gates[H];  // in the order of the product's columns
  int column[H];        // of each head
};

// One row's product with the queries: which heads, in what columns, and the gather. `ROUTED` heads come first, so that the
// running sum after them is their own score.
template <int H, int ROUTED>
struct Rescorer {
  static constexpr int CHUNKS = H * KEY_BYTES / 16 / RANKERS;  // 16-byte pieces of the queries that a thread moves
  static constexpr int OWN = H / 4;                            // columns of a thread
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
        for (int j = 0; j < ROUTED; ++j) {
          const int id = __ldg(in.head_ids + int64_t(t) * ROUTED + j);
          below += id < head, routed |= id == head;
        }
        place = routed ? below : ROUTED + head - below;
      }
      s.gates[place] = __ldg(in.gates + int64_t(t) * H + head);
      s.column[head] = place / 8 * 8 + place % 4 * 2 + place / 4 % 2;
    }
  }

  __device__ void fetch(uint4 (&piece)[CHUNKS]) const {
    const uint4* q = reinterpret_cast<const uint4*>(in.q + int64_t(t) * H * KEY_BYTES);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) piece[i] = __ldg(q + threadIdx.x + i * RANKERS);
  }

  // Rows of 128 bytes, one a column, under the 128-byte swizzle. Within each half of 64 bytes, word w of piece c becomes word
  // c of piece w: step s of the product then reads of lane c what `load` puts into its registers.
  __device__ void stage(const uint4 (&piece)[CHUNKS]) {
    uint32_t* b = s.select.bins;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int at = threadIdx.x + i * RANKERS, column = s.column[at / 8], half = at % 8 / 4, c = at % 4;
      const uint32_t word[4] = {piece[i].x, piece[i].y, piece[i].z, piece[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) b[column * 32 + ((half * 4 + w) ^ (column % 8)) * 4 + c] = word[w];
    }
    sm90::fence_async_shared();
  }

  struct Tile {
    uint4 a[2][2];  // [row + 8·][half of the key]
    float scale;    // of the key whose score this thread stores
  };

  static __device__ uint4 gather(const uint8_t* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
  }

  // Scores keys at(0) … at(n - 1). put(i, all, score) takes each one's sum over all heads and, of routed heads, over those.
  template <class At, class Put>
  __device__ __forceinline__ void score(int n, const At& at, const Put& put) const {
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32, c = lane % 4;
    const int row0 = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const int mine = row0 + (ROUTED > 0 ? c / 2 : c % 2) * 8;  // the row whose score this thread ends up with
    const uint32_t b = __shfl_sync(~0u, sm90::smem_address(s.select.bins), 0);
    const uint8_t* from = in.k + c * 16;
    float weight[OWN];
#pragma unroll
    for (int j = 0; j < OWN; ++j) weight[j] = s.gates[j * 4 + c];
    auto cursor = at.cursor();
    const auto load = [&](Tile& tile, int first) {
      const int key0 = cursor(min(first + row0, n - 1)), key1 = cursor(min(first + row0 + 8, n - 1));
      const uint8_t *p0 = from + int64_t(key0) * KEY_BYTES, *p1 = from + int64_t(key1) * KEY_BYTES;
      tile.a[0][0] = gather(p0), tile.a[0][1] = gather(p0 + 64);
      tile.a[1][0] = gather(p1), tile.a[1][1] = gather(p1 + 64);
      tile.scale = __ldg(in.scale + (mine == row0 ? key0 : key1));
    };
    // The tensor cores want words of two keys side by side in registers, a load brings four words of one. The words are moved
    // when they are used: by a sum that the compiler cannot see through, or it would move (and wait for) them when loaded.
    const auto take = [&](uint32_t word) {
      uint32_t moved;
      asm volatile("add.u32 %0, %1, %2;" : "=r"(moved) : "r"(word), "r"(in.nought));
      return moved;
    };
    const auto step = [&](Tile& tile, int first) {
      float d[H / 2];
      uint32_t a[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint4 u = tile.a[0][k / 2], v = tile.a[1][k / 2];
        a[k][0] = take(k % 2 ? u.z : u.x), a[k][1] = take(k % 2 ? v.z : v.x);
        a[k][2] = take(k % 2 ? u.w : u.y), a[k][3] = take(k % 2 ? v.w : v.y);
      }
      const float scale = __uint_as_float(take(__float_as_uint(tile.scale)));
      sm90::mma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t descriptor = sm90::tile_descriptor(b + k * 32);
        if (k == 0) sm90::mma_registers(d, a[k][0], a[k][1], a[k][2], a[k][3], descriptor);
        else sm90::mma_registers_add(d, a[k][0], a[k][1], a[k][2], a[k][3], descriptor);
      }
      sm90::mma_commit();
      if (first + 2 * RANK_GROUPS * RANK_TILE < n) load(tile, first + 2 * RANK_GROUPS * RANK_TILE);
      sm90::mma_wait<0>();
      sm90::pin(d);
      float sum[2] = {}, routed[2] = {};
#pragma unroll
      for (int j = 0; j < OWN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = d[j / 2 * 4 + half * 2 + j % 2];
          sum[half] = fmaf(fmaxf(x, 0.f), weight[j], sum[half]);
          if (j + 1 == ROUTED / 4) routed[half] = sum[half];
        }
      }
      // The quad's four lanes add up their columns, and each keeps what it stores.
      float keep;
      if constexpr (ROUTED > 0) {
        const bool odd = c % 2, high = c / 2;
        float keep0 = odd ? sum[0] : routed[0], keep1 = odd ? sum[1] : routed[1];
        keep0 += __shfl_xor_sync(~0u, odd ? routed[0] : sum[0], 1);
        keep1 += __shfl_xor_sync(~0u, odd ? routed[1] : sum[1], 1);
        keep = high ? keep1 : keep0;
        keep += __shfl_xor_sync(~0u, high ? keep0 : keep1, 2);
      } else {
        const bool odd = c % 2;
        keep = odd ? sum[1] : sum[0];
        keep += __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
        keep += __shfl_xor_sync(~0u, keep, 2);
      }
      if (first + mine < n && (ROUTED > 0 || c < 2)) put(first + mine, ROUTED == 0 || c % 2, keep * scale);
    };

    Tile tiles[2];
    const int first = group * RANK_TILE, next = RANK_GROUPS * RANK_TILE;
    if (first < n) load(tiles[0], first);
    if (first + next < n) load(tiles[1], first + next);
    for (int at0 = first; at0 < n; at0 += 2 * next) {
      step(tiles[0], at0);
      if (at0 + next < n) step(tiles[1], at0 + next);
    }
  }
};

// Rows of at most k keys take them all.
__device__ __forceinline__ bool take_all(const Keys& in, const Output& output, int t) {
  const int length = in.length(t);
  if (length > output.k) return false;
  for (int j = threadIdx.x; j < output.k; j += RANKERS)
    output.out[int64_t(t) * output.k + j] = j < length ? output.place(t, j) : -1;
  return true;
}

// Order of an all-head score among listed keys: below every one of them is OUT, which is for keys that are no more chosen.
constexpr uint32_t OUT = 0;
__device__ __forceinline__ uint32_t full_key(float score) { return max(rank_key(score), OUT + 1); }

// Writes row t's top k of n listed keys, of which `kept` are not OUT; least and most are a thread's own extremes of the kept.
template <class At>
__device__ __forceinline__ void write_top(Ranks::Smem& s, const Output& output, const Keys& in, int t, const uint32_t* full, int n,
                                          int kept, uint32_t least, uint32_t most, const At& at) {
  int32_t* out = output.out + int64_t(t) * output.k;
  const int start = in.start(t);
  const auto all = Ranks::range(s, least, most, output.k, kept);
  Ranks::top(s, all, [&](int j) { return full[j]; }, [&](int j) { return at.find(j); }, n,
             [&](int place, int j) { out[place] = output.place(t, at.find(j) - start); });
}

}  // namespace misa
