// The order in which the scorer's thread blocks visit tiles of keys, and which of them are whose.
#pragma once
#include "task.cuh"

namespace misa {
namespace {

// A run of key tiles of one row block. They are visited in interleaved sweeps over the rows' keys, so that hits which lie
// close together are shared out among the thread blocks that have runs of these rows.
struct Item {
  static constexpr int TURN = 4;  // tiles, after which what threads own alone changes hands (topk_routed.cu)
  int first_row;                  // its place in the task
  int sweeps, first, tile, left;  // first: of the sweep
  int high, end;                  // where the row block's tiles end, and what any row sees

  // Tiles [from, from + count) of the row block's `tiles`, in the order of visits.
  __device__ Item(const Task& task, int block, int from, int count, int tiles)
      : first_row(block * ROWS), sweeps(sweeps_of(tiles)), left(count) {
    const Extent extent(task, first_row, ROWS);
    const int low = extent.first_tile();
    high = low + tiles;
    end = extent.end_tile();
    const int length = tiles / sweeps, longer = tiles % sweeps;  // that many sweeps have one tile more
    const int beyond = from - longer * (length + 1);
    const int sweep = beyond < 0 ? from / (length + 1) : longer + beyond / length;
    const int done = beyond < 0 ? from % (length + 1) : beyond % length;
    first = low + sweep, tile = first + done * sweeps;
  }
  // A prime, so that no period of the keys falls into step with it. Hits that lie close together come at the beginning of every sweep,
  // and to each eighth thread where keys repeat: the prime is that for which a sweep begins by some three or five turns of eight further
  // than the last one.
  static __device__ int sweeps_of(int tiles) {
    int found = 0, least = INT_MAX;
    for (const int sweeps : {13, 17, 19, 23}) {
      const int turns = tiles * 16 / (sweeps * TURN) % 128;  // of a sweep, beyond whole rounds of eight, in sixteenths
      const int off = min(abs(turns - 3 * 16), abs(turns - 5 * 16));
      if (off < least) least = off, found = sweeps;
    }
    return found;
  }
  __device__ bool more() const { return left > 0; }
  __device__ bool seen() const { return tile < end; }
  __device__ void advance() {
    --left;
    tile += sweeps;
    if (tile >= high) tile = ++first;
  }
};

// How the tiles of a task are divided, in a table in memory (scheduler.cuh makes it): all row blocks' tiles, one's after another's, are
// cut into equal shares, one a thread block. So none waits for rows that see more keys, nor for a last wave. Where is what:
struct Division {
  static constexpr int SHARE = 0;                                        // tiles of each
  static __device__ int before(int block) { return 1 + block; }          // tiles before a row block, or the end
  static __device__ int first(int blocks) { return before(blocks) + 1; }  // of each thread block, the row block of its first tile
  // What the private buffers of the thread blocks before each, and before the end, hold.
  static __device__ int held(int blocks, int workers) { return first(blocks) + workers; }
};

// The items of a thread block: by the task's division or, without one, as if every row block had a tile for all keys. Then no share
// is of two row blocks if that makes it longer by no more than it takes to begin with another, for all would wait for those that do.
struct Items {
  static constexpr int BEGINNING = 2;  // tiles that take as long
  const Task& task;
  const int32_t* table;
  int blocks, alike, share, pitch, at, last;

  __device__ Items(const Task& task)
      : task(task), table(task.division), blocks(task.blocks()), alike((task.scored() + TILE - 1) / TILE), pitch(alike) {
    if (table) {
      share = table[Division::SHARE];
    } else {
      const int workers = gridDim.x, runs = workers / blocks, whole = runs ? (alike + runs - 1) / runs : INT_MAX;
      share = (blocks * alike + workers - 1) / workers;
      if (whole <= share + BEGINNING) share = whole, pitch = (alike + share - 1) / share * share;
    }
    at = blockIdx.x * share, last = min(at + share, before(blocks));
  }
  __device__ int before(int block) const { return table ? table[Division::before(block)] : block * pitch; }
  // The thread blocks that have runs of row i's block: the first, and how many.
  static __device__ int2 workers(const Task& task, int i) {
    const int32_t* before = task.division + Division::before(i / ROWS);
    if (before[1] == before[0]) return {0, 0};
    const int share = task.division[Division::SHARE], first = before[0] / share;
    return {first, (before[1] - 1) / share - first + 1};
  }
  __device__ bool more() const { return at < last; }
  __device__ Item next() {
    int block = table ? table[Division::first(blocks) + blockIdx.x] : at / pitch;
    while (before(block + 1) <= at) ++block;
    const int from = before(block), to = before(block + 1), tiles = table ? to - from : alike, first = at;
    at = min(last, to);
    return Item(task, block, first - from, min(at, from + tiles) - first, tiles);
  }
};

}  // namespace
}  // namespace misa
