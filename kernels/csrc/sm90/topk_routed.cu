// Exact top k of routed-head scores (scorer.cuh) without a score matrix: (1) score a sample of the keys, (2) take a quantile of
// it, by score and then position, as the row's threshold, (3) score all keys and append what passes to buffers that each thread owns alone,
// (4) take the exact top k of the appended, (5) rows that came out short or overflowed are scored into memory and selected
// there. See plan.py for the statistics.
#include "fallback.cuh"
#include "threshold.cuh"

namespace misa {
namespace {

// What passed: (score, key) in buffers that threads own alone, so that there are no atomics.
struct HitBuffers {
  const Threshold* thresholds;  // [rows]
  uint2* entries;               // of (score bits, key): [rows of a block, buffers, capacity] for each thread block; rows that it scores
                                // later go on where those before them ended
  int2* counts;                 // (first entry, how many) of each row, thread block and buffer; -1 marks an overflow
  int buffers;                  // of a row in a thread block

  // Each run of a row block has a place of its own: from one run to the next the row block goes up, or the thread block, or both.
  __device__ int2& count(int row, int worker, int buffer) const { return counts[(row + worker * ROWS) * buffers + buffer]; }
};

// The private buffers of a thread: those of one number in all rows of its thread block. Threads hand them on in turn, for keys whose
// period shares a factor with the product's 64 keys bring all their hits to a few threads. What is read once an item or turn lies in
// shared memory, for registers are few.
template <int BUFFERS, int OWN>  // of a row and thread block, and queries of a thread
struct OwnBuffers {
  static constexpr int SHARING = 32 / BUFFERS;  // lane rows that divide their queries

  int seat[CONSUMERS];             // the thread that began with what each has now
  uint32_t first[OWN][CONSUMERS];  // entries of the item, by that seat
  uint32_t places[OWN][CONSUMERS];

  struct alignas(8) Extent {
    uint32_t begin, capacity;  // the first query's first entry, and how many a buffer holds
    __device__ uint32_t first(int q) const { return begin + q * (4 * BUFFERS) * capacity; }
    __device__ uint32_t end(int q) const { return first(q) + capacity; }
  };

  static __device__ int number(int seat) { return seat % 128 / 4 / SHARING; }
  // By each thread, with the row of its first query in the row block.
  __device__ Extent init(const Task& task, int row) {
    const int32_t* held = task.division + Division::held(task.blocks(), gridDim.x) + blockIdx.x;
    const uint32_t capacity = held[1] - held[0], begin = (held[0] * ROWS + row * capacity) * BUFFERS + number(threadIdx.x) * capacity;
    seat[threadIdx.x] = threadIdx.x;
    return {begin, capacity};
  }
  __device__ int own_number() const { return number(seat[sm90::thread()]); }
  __device__ uint32_t& own_first(int q) { return first[q][seat[sm90::thread()]]; }
  // Hands the buffers and the places of their next entries on, after a tile behind which `left` come, and takes another thread's, of
  // the same queries.
  __device__ void turn(int left, uint32_t (&place)[OWN], Extent& own) {
    if (left % Item::TURN) return;
    const int thread = sm90::thread(), old = seat[thread], now = old / 128 * 128 + (old + 4 * SHARING) % 128;
#pragma unroll
    for (int q = 0; q < OWN; ++q) places[q][old] = place[q];
    seat[thread] = now;
    own.begin += (number(now) - number(old)) * own.capacity;
    sm90::named_barrier(1 + now / 128, 128);
#pragma unroll
    for (int q = 0; q < OWN; ++q) place[q] = places[q][now];
  }
};

// What is above the row's threshold goes to memory one by one: the cheapest for the scorer, as long as few pass.
struct FewHits : HitBuffers {
  static constexpr Taking TAKING = Taking::BEFORE_NEXT;
  static constexpr bool ALONE = true;  // or it takes 5 % longer than by itself, and why is not known
  static constexpr int BUFFERS = 32;  // 4 warps × 8 lane rows
  static constexpr int BURST = 2 * TILE / KEYS;  // entries that one tile may bring to a buffer
  static constexpr float SIGMAS = 6.5f;

  struct Shared : OwnBuffers<BUFFERS, LANE_QUERIES> {
    Extent extent[CONSUMERS];  // of what each thread has now, for which no registers are left
  };

  struct Lane {
    const HitBuffers& to;
    Shared& shared;
    const int rows;
    Seat seat;
    float threshold[LANE_QUERIES];
    uint32_t place[LANE_QUERIES];  // of the next entry: low half of its address, as all of them have the same high half

    __device__ Lane(const FewHits& sink, Shared& shared, const Task& task)
        : to(sink), shared(shared), rows(task.rows) {
      const auto own = this->own() = shared.init(task, threadIdx.x / 128 * QUERIES + threadIdx.x % 4);
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) place[q] = address(own.first(q));
    }
    __device__ uint32_t address(uint32_t entry) const { return uint32_t(reinterpret_cast<uintptr_t>(to.entries)) + entry * sizeof(uint2); }
    __device__ Shared::Extent& own() const { return shared.extent[sm90::thread()]; }
    // The last place from which a whole burst still fits.
    __device__ uint32_t limit(const Shared::Extent& own, int q) const { return address(own.end(q) - BURST); }

    __device__ bool begin(const Seat& at) {
      seat = at;
      bool splits = false;
      const auto own = this->own();
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        place[q] = (place[q] + 15) / 16 * 16;  // entries are read in pairs
        shared.own_first(q) = place[q];
        const bool open = seat.query(q) < rows && place[q] <= limit(own, q);
        threshold[q] = open ? to.thresholds[seat.query(q)].above : INFINITY;
        splits |= open && to.thresholds[seat.query(q)].splits();
      }
      return __reduce_max_sync(~0u, int(splits)) > 0;
    }
    __device__ void refuse(float (&score)[LANE_QUERIES][2], int key0, const int2* windows) {
      drop_refused(score, seat, key0, windows, to.thresholds);
    }
    __device__ void take(const float (&score)[LANE_QUERIES][2], int key0, const int2*) {
      // Halves apart, since the address of a store is not to be changed before the store has read it.
      const uint32_t high = reinterpret_cast<uintptr_t>(to.entries) >> 32;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int q = 0; q < LANE_QUERIES; ++q) sm90::append_above(place[q], high, score[q][half], threshold[q], key0 + seat.key(half));
    }
    // Ends collecting where a buffer might not hold the next burst.
    __device__ void settle(int left) {
      shared.turn(left, place, own());
      const auto own = this->own();
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) threshold[q] = place[q] > limit(own, q) ? INFINITY : threshold[q];
    }
    __device__ void finish() {
      const Seat at = seat.anew();
      const auto own = this->own();
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        const uint32_t first = shared.own_first(q);
        if (at.query(q) < rows) to.count(at.query(q), blockIdx.x, shared.own_number()) =
              {int((first - address(0)) / sizeof(uint2)), place[q] > limit(own, q) ? -1 : int((place[q] - first) / sizeof(uint2))};
      }
    }
  };
};

// The same, gathered in shared memory and written by sectors: scattered appends of 8 bytes are what
// limits the scorer where many pass. Neighbouring lanes divide their queries, for there is no room for a sector of each.
struct ManyHits : HitBuffers {
  static constexpr Taking TAKING = Taking::ANY_TIME;
  static constexpr bool ALONE = false;
  static constexpr int OWNERS = LANE_QUERIES > 1 ? 2 : 1;
  static constexpr int OWN = LANE_QUERIES / OWNERS;  // queries of which a thread appends the hits
  static constexpr int BUFFERS = 32 / OWNERS;
  static constexpr int BURST = 2 * OWNERS;           // entries that one product may bring to a buffer
  static constexpr float SIGMAS = 8.f;               // hits of neighbours come together
  static_assert(BURST <= SECTOR);

  struct Shared : OwnBuffers<BUFFERS, OWN> {
    uint2 waiting[OWN][2 * SECTOR][CONSUMERS];  // less than a sector, and a burst
  };

  struct Lane {
    const HitBuffers& to;
    Shared& shared;
    const int rows;
    const bool upper;        // which half of the pair's queries is this lane's
    const uint32_t waiting;  // shared-memory address of the first waiting entry
    Seat seat;
    typename Shared::Extent own;
    float threshold[OWN];
    uint32_t slot[OWN];      // shared-memory address of the next entry
    uint32_t place[OWN];     // of the next sector; FULL: no room is left

    static constexpr uint32_t STEP = sizeof(uint2) * CONSUMERS, ROW = 2 * SECTOR * STEP, FULL = ~0u;

    __device__ Lane(const ManyHits& sink, Shared& shared, const Task& task)
        : to(sink), shared(shared), rows(task.rows), upper(OWNERS == 2 && threadIdx.x / 4 % 2),
          waiting(sm90::smem_address(&shared.waiting[0][0][threadIdx.x])) {
      own = shared.init(task, threadIdx.x / 128 * QUERIES + threadIdx.x % 4 + (upper ? 4 * OWN : 0));
#pragma unroll
      for (int q = 0; q < OWN; ++q) slot[q] = waiting + q * ROW, place[q] = own.first(q);
    }
    __device__ int query(const Seat& at, int q) const { return at.query(q + (upper ? OWN : 0)); }

    __device__ bool begin(const Seat& at) {
      seat = at;
      bool splits = false;
#pragma unroll
      for (int q = 0; q < OWN; ++q) {
        shared.own_first(q) = place[q];
        const bool open = query(at, q) < rows && place[q] != FULL;
        threshold[q] = open ? to.thresholds[query(at, q)].above : INFINITY;
        splits |= open && to.thresholds[query(at, q)].splits();
      }
      return __reduce_max_sync(~0u, int(splits)) > 0;
    }
    __device__ void append(float score, int key, int q) { sm90::stage_above<STEP>(slot[q], score, threshold[q], key); }
    __device__ void refuse(float (&score)[LANE_QUERIES][2], int key0, const int2* windows) {
      drop_refused(score, seat, key0, windows, to.thresholds);
    }
    __device__ void take(const float (&score)[LANE_QUERIES][2], int key0, const int2*) {
#pragma unroll
      for (int q = 0; q < OWN; ++q)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = key0 + seat.key(half);
          if constexpr (OWNERS == 2) {
            const float low = score[q][half], high = score[q + OWN][half];
            append(upper ? high : low, key, q);
            append(__shfl_xor_sync(~0u, upper ? low : high, 4), key ^ 1, q);  // lane ^ 4 has the key before or behind
          } else {
            append(score[q][half], key, q);
          }
        }
#pragma unroll
      for (int q = 0; q < OWN; ++q) {
        const bool full = slot[q] >= waiting + q * ROW + SECTOR * STEP;
        if (__any_sync(~0u, full)) flush(q, full);
      }
    }
    __device__ void settle(int left) { shared.turn(left, place, own); }
    __device__ void flush(int q, bool full) {
      const uint32_t from = waiting + q * ROW;
      uint4 out[SECTOR / 2];
      uint2 rest[SECTOR - 1];
      read(from, out);
#pragma unroll
      for (int i = 0; i < SECTOR - 1; ++i) rest[i] = sm90::load8(from + (SECTOR + i) * STEP);
      if (!full) return;
      write(q, out);
      slot[q] -= SECTOR * STEP;
#pragma unroll
      for (int i = 0; i < SECTOR - 1; ++i) sm90::store8(from + i * STEP, rest[i]);
    }
    static __device__ void read(uint32_t from, uint4 (&out)[SECTOR / 2]) {
#pragma unroll
      for (int i = 0; i < SECTOR / 2; ++i) {
        const uint2 a = sm90::load8(from + 2 * i * STEP), b = sm90::load8(from + (2 * i + 1) * STEP);
        out[i] = uint4{a.x, a.y, b.x, b.y};
      }
    }
    // Writes a sector; without room the row ends here.
    __device__ void write(int q, const uint4 (&out)[SECTOR / 2]) {
      if (place[q] == FULL || place[q] + SECTOR > own.end(q)) {
        threshold[q] = INFINITY;
        place[q] = FULL;
        return;
      }
#pragma unroll
      for (int i = 0; i < SECTOR / 2; ++i) *reinterpret_cast<uint4*>(to.entries + place[q] + 2 * i) = out[i];
      place[q] += SECTOR;
    }
    __device__ void finish() {
      const Seat at = seat.anew();
#pragma unroll
      for (int q = 0; q < OWN; ++q) {
        const int left = (slot[q] - waiting - q * ROW) / STEP;
        uint4 out[SECTOR / 2];
        read(waiting + q * ROW, out);
        if (left > 0) write(q, out);
        slot[q] = waiting + q * ROW;
        const uint32_t first = shared.own_first(q);
        if (query(at, q) < rows)
          to.count(query(at, q), blockIdx.x, shared.own_number()) = {
              int(first), place[q] == FULL ? -1 : int(place[q] - first) - (left > 0 ? SECTOR - left : 0)};
      }
    }
  };
};

constexpr int SELECT_THREADS = 256;  // fewer, and more blocks: much of the work is a warp's, whatever it has to choose from
constexpr int SELECT_BLOCKS = 5;     // on a multiprocessor, as far as registers go
using Selection = Select<SELECT_THREADS>;

// Brings row i's entries together in shared memory, in any order: what makes whole 16 bytes of each buffer by a copy, then the odd
// ones. Behind an odd number of them stands `filler`. Returns how many lie there with it; 0 where they cannot answer for the top k.
__device__ __forceinline__ int gather(Selection::Smem& s, uint64_t& landed, const HitBuffers& hits, int i, int2 workers, uint2 filler, int k,
                                      int room, uint2* entries) {
  const uint32_t barrier = sm90::smem_address(&landed);
  if (threadIdx.x == 0) {
    s.listed = 0;
    sm90::barrier_init(barrier, 1);
    sm90::barrier_init_fence();
  }
  // Lanes issue their copies one after the other, so buffers are dealt out to the warps in turn.
  const int buffers = workers.y * hits.buffers, mine = threadIdx.x % 32 * Selection::WARPS + threadIdx.x / 32;
  const auto held = [&](int buffer) { return hits.count(i, workers.x + buffer / hits.buffers, buffer % hits.buffers); };
  uint32_t own = 0, odd = 0, even;
#pragma unroll 1
  for (int first = 0; first < buffers; first += SELECT_THREADS) {
    const int count = first + mine < buffers ? held(first + mine).y : 0;
    own += count < 0 ? room + 1 : count & ~1;
    odd += __syncthreads_count(count & 1);
  }
  uint32_t at = Selection::scan(s, own, &even) - own;
  const uint32_t all = even + odd, n = all + (all & 1);
  if (n > room || all < k) return 0;
  if (threadIdx.x == 0) {
    sm90::barrier_arrive_expect(barrier, even * sizeof(uint2));
    if (all & 1) entries[all] = filler;
  }
#pragma unroll 1
  for (int buffer = mine; buffer < buffers; buffer += SELECT_THREADS) {
    const int2 run = held(buffer);
    const uint32_t whole = run.y & ~1;
    const uint2* from = hits.entries + uint32_t(run.x);
    if (whole) sm90::copy_run(sm90::smem_address(entries + at), from, whole * sizeof(uint2), barrier);
    if (run.y & 1) entries[even + atomicAdd(&s.listed, 1u)] = __ldcg(from + whole);
    at += whole;
  }
  sm90::barrier_wait(barrier, 0);
  Selection::sync();
  return n;
}

// Exact top k of each row's appended entries; a row that cannot be answered from them goes on the failed list.
template <bool PAGED>  // slots of a page table are wanted
__global__ void __launch_bounds__(SELECT_THREADS, SELECT_BLOCKS)
    select_kernel(const __grid_constant__ Task task, const __grid_constant__ HitBuffers hits, const __grid_constant__ Output output,
                  int room, const __grid_constant__ Failed failed) {
  extern __shared__ __align__(16) uint2 entries[];
  __shared__ Selection::Smem smem;
  __shared__ uint64_t landed;
  const int i = blockIdx.x, t = task.first + i, k = output.k;
  const int start = max(task.starts[t], 0), length = max(min(task.ends[t], task.keys) - start, 0);
  const OutputRow row = output.row(t);
  sm90::launch_wait();
  if (length <= k) {
    for (int j = threadIdx.x; j < k; j += SELECT_THREADS) row.out[j] = j < length ? row.place(j) : -1;
    return;
  }
  // The threshold is below every entry, and the cut not far above it as a rule: bins go two octaves up, or over all keys
  // where the threshold is not positive.
  const float threshold = hits.thresholds[i].above;
  const uint32_t lowest = rank_key(threshold), highest = rank_key(INFINITY);
  const int shift = threshold > 0.f ? 24 - Selection::LOG_BINS : Selection::shift_over(highest - lowest);
  Selection::clear(smem);
  const int n = gather(smem, landed, hits, i, Items::workers(task, i), {__float_as_uint(threshold), 0}, k, room, entries);
  if (n == 0) {
    if (threadIdx.x == 0) failed.add(t);
    return;
  }
  // Scores, none of them NaN, become keys where they lie.
  uint4* pairs = reinterpret_cast<uint4*>(entries);
  Selection::each<4>([&](int j) { return pairs[j]; }, n / 2, [&](uint4 two, int j) {
    two.x = number_key(__uint_as_float(two.x)), two.z = number_key(__uint_as_float(two.z));
    pairs[j] = two;
    Selection::count(smem, two.x, lowest, shift);
    Selection::count(smem, two.z, lowest, shift);
  });
  Selection::sync();
  const auto cut = Selection::cut(smem, {lowest, highest, uint32_t(k), uint32_t(n)}, shift);
  Selection::top<8>(smem, cut, [&](int j) { return entries[j].x; }, [&](int j) { return entries[j].y; }, n,
                    [&](int j) { return PAGED ? row.slot(entries[j].y - start) : row.shifted(entries[j].y - start); },
                    [&](int place, int slot) { row.out[place] = slot; });
}

// Failed rows: all their scores into memory, then the exact top k.
__global__ void __launch_bounds__(THREADS, 1)
    redo_kernel(const __grid_constant__ Task whole, const __grid_constant__ Logits scores, const __grid_constant__ CUtensorMap map,
                const __grid_constant__ Output output, const __grid_constant__ Failed failed) {
  __shared__ Redoers::Smem smem;
  redo(whole, map, scores, failed, [&](const Task& task, int row) {
    const int t = task.row(row);
    const int2 w = task.window(row);
    const OutputRow out = output.row(t);
    best_of(smem, scores.out + row * scores.ld, w.y - w.x, output.k, [&](int place, int j) { out.out[place] = out.place(j); });
  });
}

// Division of a call's work, as topk_routed.py makes it, and where its scratch is.
struct RoutedPlan {
  int rows;                // of a pass
  int workers, runs;       // thread blocks that collect, and into how many runs a row block's tiles are cut at most
  int buffers;             // of a row in a thread block
  int rank;                // of the threshold in the sample
  int spare, entries;      // of a buffer: beyond what is expected, and in all, summed over thread blocks
  int room;                // entries of a row that can be selected from
  int sampled, ld;         // columns of the sampled scores, and of those of failed rows
  Failed failed;
  Sample sample;
  Threshold* thresholds;
  int32_t* division;
  int2* counts;
  void* bulk;              // sampled scores, then entries; at last the scores of failed rows
};

// ---- host -----------------------------------------------------------------------------------------------------------

// Scores of rows [first, first + rows) into out [rows, ld] fp32, at the keys' columns.
void logits(Bytes inputs, int64_t first, int64_t rows, int64_t out, int64_t ld, int64_t stream) {
  const auto in = unpack<Inputs>(inputs);
  const Logits logits{reinterpret_cast<float*>(out), ld, false};
  launch_score(task_of(in, int(first), int(rows)), in.index_k, logits, multiprocessors(), stream_at(stream));
}

enum Stage { SAMPLE = 1, THRESHOLD = 2, COLLECT = 4, SELECT = 8, REDO = 16 };

// All launches of one call; `stages` leaves some out.
void topk(Bytes inputs, Bytes output, Bytes division, int64_t stages, int64_t stream_address) {
  const auto in = unpack<Inputs>(inputs);
  const auto out = unpack<Output>(output);
  const auto plan = unpack<RoutedPlan>(division);
  const int processors = multiprocessors();
  const cudaStream_t stream = stream_at(stream_address);
  const Task whole = task_of(in, 0, in.rows);
  const Logits sampled{static_cast<float*>(plan.bulk), plan.sampled, true};
  const HitBuffers hits{plan.thresholds, static_cast<uint2*>(plan.bulk), plan.counts, plan.buffers};
  const bool few = plan.buffers == FewHits::BUFFERS;
  const float expected = float(plan.rank) * plan.sample.stride / plan.buffers, sigmas = few ? FewHits::SIGMAS : ManyHits::SIGMAS;
  const Divide next{plan.division, plan.workers, plan.runs, {expected, sigmas, float(plan.rank), plan.spare, plan.entries}};
  if (stages & SAMPLE) launch_gather(whole, in.index_k, plan.sample, stream);
  for (int first = 0; first < in.rows; first += plan.rows) {
    Task task = task_of(in, first, std::min(plan.rows, in.rows - first));
    const Task sampling = plan.sample.of(task);
    task.division = plan.division;
    if (stages & SAMPLE) launch_score(sampling, plan.sample.keys, sampled, processors, stream);
    if (stages & THRESHOLD) {
      launch_threshold(sampling, sampled, plan.rank, out.k, plan.thresholds, nullptr, next, first == 0 ? plan.failed : Failed{}, stream);
    }
    if (stages & COLLECT) {
      if (few) launch_score(task, in.index_k, FewHits{hits}, plan.workers, stream);
      else launch_score(task, in.index_k, ManyHits{hits}, plan.workers, stream);
    }
    if (stages & SELECT) {
      const auto kernel = out.page_table ? select_kernel<true> : select_kernel<false>;
      launch_behind("select_kernel", kernel, {task.rows, SELECT_THREADS, plan.room * 8}, stream, task, hits, out, plan.room, plan.failed);
    }
  }
  if (stages & REDO) {
    const Logits scores{static_cast<float*>(plan.bulk), plan.ld, true};
    const Grid grid{processors, THREADS, sizeof(Shared<Logits>), 1, false, true};
    launch_behind("redo_kernel", redo_kernel, grid, stream, whole, scores, key_map(in.index_k, in.keys), out, plan.failed);
  }
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(logits, misa::logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk, misa::topk);
