// MISA†: the best C keys of a row by its routed heads, and of those the exact top k by all heads.
//
// (1) Sample and threshold as in topk_routed.cu, for C. (2) The scorer marks what passes: one bit a row and key. (3) One block
// a row lists the marked keys, scores them with all heads, routed heads first, so that both scores fall out of one product, cuts
// the list to the best C by the one and takes the top k by the other. (4) Rows with fewer marks than C, or more than a block
// holds, are scored into memory, marked again with exactly their best C, and go through (3) once more.
#include "fallback.cuh"
#include "rescorer.cuh"
#include "shape.cuh"
#include "threshold.cuh"

namespace misa {
namespace {

constexpr int SEGMENT = 1 << 16, SEGMENTS = 64;  // keys are listed by 16 bits, segment by segment
constexpr int WORD_KEYS = 32;                    // neighbouring keys whose marks lie in 16 bytes
constexpr int BATCH_WORDS = 8;                   // a thread's, of a segment
static_assert(BATCH_WORDS * WORD_KEYS * RANKERS == SEGMENT && BATCH_WORDS * RANKERS <= Ranks::BINS);

// One bit a row and key, as the scorer's ballots make them: [tile of 64 keys][warp][half] words of four rows, in which bit 4·key + row
// stands for key warp · 16 + half · 8 + key of the tile. A group of four has words for all keys of the call, `pitch` tiles behind those
// of the group before it, and only the ones around its windows are used: rows ascend with their requests' keys, so where `pitch` tiles
// hold the longest window, no two groups use the same.
struct Marks {
  uint32_t* words;
  int first;  // row of the first bit
  int rows;
  int pitch;
  __device__ uint32_t* group(int i) const { return words + int64_t(i / 4) * pitch * 8; }
};

struct Mark {
  const Threshold* thresholds;
  Marks marks;

  static constexpr Taking TAKING = Taking::DURING_NEXT;
  static constexpr bool ALONE = false;

  struct Shared {};

  struct Lane {
    const Mark& sink;
    const Task& task;
    Seat seat;
    bool splits, apart;           // whether some scores tie at their thresholds, and whether the row block's windows start apart
    float threshold[LANE_QUERIES];
    uint32_t mine[LANE_QUERIES];  // all bits for the query whose words this lane stores: to compare would take a predicate each
    uint2* to;                    // of its row group, or null

    __device__ Lane(const Mark& sink, Shared&, const Task& task) : sink(sink), task(task) {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        mine[q] = threadIdx.x % 32 == q ? ~0u : 0;
        asm volatile("" : "+r"(mine[q]));  // or the compiler would compare each time
      }
    }
    __device__ bool begin(const Seat& at) {
      seat = at;
      splits = false;
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        const bool live = seat.query(q) < task.rows;
        threshold[q] = live ? sink.thresholds[seat.query(q)].above : INFINITY;
        splits |= live && sink.thresholds[seat.query(q)].splits();
      }
      splits = __any_sync(~0u, splits);
      const Extent block(task, seat.first / ROWS * ROWS, ROWS);
      apart = block.lo < block.all_lo;
      to = group(seat);
      return splits || apart;
    }
    // The words of four queries that this lane stores.
    __device__ uint2* group(const Seat& at) const {
      const int lane = at.lane(), i = at.first + lane * 4;
      return lane < LANE_QUERIES && i < task.rows ? reinterpret_cast<uint2*>(sink.marks.group(i)) + at.warp : nullptr;
    }
    __device__ void refuse(float (&score)[LANE_QUERIES][2], int key0, const int2* windows) {
      if (splits) drop_refused(score, seat, key0, windows, sink.thresholds);
      else drop_outside(score, seat, key0, windows);
      if (!apart) return;
      // Where the group sees nothing, words of others lie.
      const Seat at = seat.anew();
      bool seen = false;
      if (at.lane() < LANE_QUERIES) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int2 w = windows[at.lane() * 4 + j];
          seen |= key0 < w.y && key0 + KEYS > w.x;
        }
      }
      to = seen ? group(at) : nullptr;
    }
    __device__ void take(const float (&score)[LANE_QUERIES][2], int key0, const int2*) {
      uint2 own{};
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        own.x |= __ballot_sync(~0u, score[q][0] > threshold[q]) & mine[q];
        own.y |= __ballot_sync(~0u, score[q][1] > threshold[q]) & mine[q];
      }
      if (to) to[key0 / KEYS * 4] = own;
    }
    __device__ void finish() {}
  };
};

struct RerankSmem : RankSmem<INDEX_HEADS> {
  int ends[SEGMENTS];  // of each segment in the list
  int counted;
};

// The listed keys of a row, by their places in segments; the last has no end.
struct Listed {
  const uint16_t* low;
  const int* ends;
  int base;  // of the first segment: the first key of a word of marks

  struct Cursor {
    const uint16_t* low;
    const int* next;
    int base, end;
    __device__ int segment(int i) {
      while (i >= end) base += SEGMENT, end = *next++;
      return base;
    }
    __device__ int2 operator()(int i) {
      const ushort2 two = *reinterpret_cast<const ushort2*>(low + i);
      int2 keys{base, base};
      if (i + 1 >= end) {  // hardly ever
        keys.x = segment(i);
        keys.y = Cursor(*this).segment(i + 1);
      }
      return {keys.x + two.x, keys.y + two.y};
    }
  };
  __device__ Cursor cursor() const { return {low, ends + 1, base, ends[0]}; }
  __device__ int find(int i) const { return cursor().segment(i) + low[i]; }
};

// Some of them, in any order.
struct Some {
  const Listed& list;
  const int* from;
  struct Cursor {
    const Some& some;
    __device__ int2 operator()(int i) const { return {some.list.find(some.from[i]), some.list.find(some.from[i + 1])}; }
  };
  __device__ Cursor cursor() const { return {*this}; }
};

// Lists the marked keys of row i in [base, end), of which `base` begins a word; returns how many there are, more than `room` if they do not
// fit.
__device__ __forceinline__ int list_marked(RerankSmem& s, const Marks& marks, int i, int base, int end, int room, uint16_t* low) {
  const uint4* from = reinterpret_cast<const uint4*>(marks.group(i)) + base / WORD_KEYS;
  const int seen = end - base, last = (seen - 1) / SEGMENT, bit = i % 4;
  int listed = 0;
  for (int segment = 0; segment <= last && listed <= room; ++segment) {
    uint4 raw[BATCH_WORDS];
#pragma unroll
    for (int j = 0; j < BATCH_WORDS; ++j) {
      const int word = (segment * BATCH_WORDS + j) * RANKERS + threadIdx.x;
      // What lies outside the window's tiles was never written, or is another row's.
      raw[j] = word <= (seen - 1) / WORD_KEYS ? __ldcg(from + word) : uint4{0, 0, 0, 0};
    }
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < BATCH_WORDS; ++j) {
      constexpr uint32_t ROW = 0x11111111u;
      const auto of_row = [&](uint32_t word) { return word >> bit & ROW; };
      const uint32_t marked = of_row(raw[j].x) | of_row(raw[j].y) << 1 | of_row(raw[j].z) << 2 | of_row(raw[j].w) << 3;
      s.select.bins[j * RANKERS + threadIdx.x] = marked;
      own += __popc(marked);
    }
    const int after = listed + Ranks::scan(s.select, own);
    if (threadIdx.x == RANKERS - 1) s.counted = after;
    // One loop over all of a thread's marks: word by word, a warp would wait for the fullest lane of each.
    const int stop = min(after, room);
    int word = threadIdx.x;
    uint32_t rest = s.select.bins[word];
    for (int at = after - int(own); at < stop;) {
      if (rest == 0) {
        word += RANKERS, rest = s.select.bins[word];
      } else {
        const int b = 31 - __clz(rest);
        rest ^= 1u << b;
        low[at++] = uint16_t(word * WORD_KEYS + b % 4 * 8 + b / 4);
      }
    }
    __syncthreads();
    listed = s.counted;
    if (threadIdx.x == 0) s.ends[segment] = segment < last ? listed : INT_MAX;
  }
  return listed;
}

// Scores the listed keys once more with all heads into `full`, and sets `kept` where a key is among the best C by the routed heads' full
// scores, of equal ones the first: for rows where more keys than can be ranked against each other share the cut's 16 bits.
template <class Scorer>
__device__ __forceinline__ void keep_best(Scorer& scorer, const Listed& list, int n, int candidates, uint32_t* full, uint16_t* kept) {
  typename Scorer::Pieces piece;
  for (int j = threadIdx.x; j < n; j += RANKERS) kept[j] = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool routed = pass == 0;
    __syncthreads();
    scorer.fetch(piece);
    scorer.stage(piece);
    __syncthreads();
    scorer.score(n, list, [&](int j, bool all, bool of_routed, float score) {
      sm90::store_if(routed ? of_routed : all, full + j, full_key(rank_key(score)));
    });
    __syncthreads();
    if (routed) Ranks::top(scorer.s.select, {1, ~0u - 1, uint32_t(candidates), uint32_t(n)}, [&](int j) { return full[j]; },
                           [&](int j) { return list.find(j); }, n, [&](int, int j) { kept[j] = 1; });
  }
}

struct Rerank {
  Keys in;
  Output output;
  Marks marks;
  const Span* spans;        // [rows of the pass]
  const int32_t* row_list;  // or null: all rows of the pass
  const int32_t* listed;    // their number
  int candidates, room;     // C, and what a block can list
  Failed failed;
};

// Shared memory of a block, and for each key that it can list.
constexpr int FIXED_BYTES = 12288, LISTED_BYTES = 8;  // as topk_reranked.py counts them
static_assert(sizeof(RerankSmem) <= FIXED_BYTES);

__global__ void __launch_bounds__(RANKERS, RANK_BLOCKS) rerank_kernel(const __grid_constant__ Rerank job) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Scorer = Rescorer<INDEX_HEADS, COLUMNS, RESIDUAL>;
  RerankSmem& s = *reinterpret_cast<RerankSmem*>(raw);
  uint32_t* full = reinterpret_cast<uint32_t*>(raw + FIXED_BYTES);
  uint16_t* low = reinterpret_cast<uint16_t*>(full + job.room);
  uint16_t* routed = low + job.room;

  sm90::launch_wait();
  const int count = job.row_list ? *job.listed : job.marks.rows, candidates = job.candidates;
  for (int row = blockIdx.x; row < count; row += gridDim.x) {
    __syncthreads();  // the last row's list has been read
    const int t = job.row_list ? job.row_list[row] : job.marks.first + row, i = t - job.marks.first;
    if (take_all(job.in, job.output, t)) continue;
    Scorer scorer{s, job.in, t};
    Scorer::Pieces piece;
    scorer.fetch(piece);
    scorer.order();

    const int start = job.in.start(t), length = job.in.length(t);
    const Listed list{low, s.ends, start / WORD_KEYS * WORD_KEYS};
    int n = length;
    if (length <= candidates) {
      for (int j = threadIdx.x; j < n; j += RANKERS) low[j] = uint16_t(start - list.base + j);
      if (threadIdx.x < SEGMENTS) {
        const int after = list.base - start + (int(threadIdx.x) + 1) * SEGMENT;
        s.ends[threadIdx.x] = after < n ? after : INT_MAX;
      }
    } else {
      n = list_marked(s, job.marks, i, list.base, start + length, job.room, low);
    }
    const auto fail = [&] {
      if (threadIdx.x == 0) job.failed.add(t);
    };
    if (n < min(candidates, length) || n > job.room) {
      fail();
      continue;
    }
    __syncthreads();
    scorer.stage(piece);
    if (threadIdx.x == 0 && n % 2) low[n] = 0;  // of any segment, a key
    __syncthreads();
    const Span span = job.spans[i];
    scorer.score(n, list, [&](int j, bool all, bool of_routed, float score) {
      const uint32_t key = rank_key(score);
      sm90::store_if(all, full + j, full_key(key));
      sm90::store_if(of_routed, routed + j, uint16_t(span.place(key)));
    });
    __syncthreads();

    // The cut: all keys above it stay, and `need` of those at it, in 16 bits of their routed scores.
    uint32_t least = ~0u, most = 0;
    if (n > candidates) {
      const Ranks::Range all{0, Span::LAST, uint32_t(candidates), uint32_t(n)};
      const auto cut = Ranks::narrow(s.select, all, [&](int j) { return uint32_t(routed[j]); }, n, 0, 0);
      const bool tied = cut.inside > cut.need;
      if (tied && cut.inside > Ranks::LIST) {
        keep_best(scorer, list, n, candidates, full, routed);
        Ranks::each([&](int j) { return full[j]; }, n, [&](uint32_t key, int j) {
          if (routed[j]) least = min(least, key), most = max(most, key);
          else full[j] = OUT;
        });
        __syncthreads();
        write_top(s.select, job.output, job.in, t, full, n, candidates, least, most, list, routed);
        continue;
      }
      if (threadIdx.x == 0) s.select.listed = 0;
      __syncthreads();
      Ranks::each([&](int j) { return full[j]; }, n, [&](uint32_t key, int j) {
        const uint32_t at = routed[j];
        if (at < cut.lo) {
          full[j] = OUT;
          return;
        }
        least = min(least, key), most = max(most, key);
        if (tied && at == cut.lo) s.select.from[atomicAdd(&s.select.listed, 1u)] = j;
      });
      __syncthreads();
      if (tied) {  // the same heads once more, now in full precision
        scorer.fetch(piece);
        scorer.stage(piece);
        if (threadIdx.x == 0 && cut.inside % 2) s.select.from[cut.inside] = s.select.from[0];
        __syncthreads();
        const Some some{list, s.select.from};
        scorer.score(cut.inside, some, [&](int j, bool, bool of_routed, float score) {
          if (of_routed) s.select.index[j] = rank_key(score);  // where no query lies
        });
        __syncthreads();
        if (threadIdx.x < cut.inside) s.select.keys[threadIdx.x] = list.find(s.select.from[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x < cut.inside) {
          const uint32_t score = s.select.index[threadIdx.x], key = s.select.keys[threadIdx.x];
          uint32_t before = 0;
          for (int j = 0; j < cut.inside; ++j) before += s.select.index[j] > score || (s.select.index[j] == score && s.select.keys[j] < key);
          if (before >= cut.need) full[s.select.from[threadIdx.x]] = OUT;
        }
        __syncthreads();
      }
      write_top(s.select, job.output, job.in, t, full, n, candidates, least, most, list, routed);
    } else {
      Ranks::each([&](int j) { return full[j]; }, n, [&](uint32_t key, int) { least = min(least, key), most = max(most, key); });
      write_top(s.select, job.output, job.in, t, full, n, n, least, most, list, routed);
    }
  }
}

// Marks failed rows with exactly their best C keys by all their scores in memory.
__global__ void __launch_bounds__(THREADS, 1)
    mark_exactly_kernel(const __grid_constant__ Task whole, const __grid_constant__ CUtensorMap map, const __grid_constant__ Logits scores,
                        const __grid_constant__ Marks marks, int candidates, const __grid_constant__ Failed failed) {
  __shared__ Redoers::Smem smem;
  redo(whole, map, scores, failed, [&](const Task& task, int row) {
    const int i = task.row(row) - marks.first;
    const int2 w = task.window(row);
    uint32_t* words = marks.group(i);
    const uint32_t others = ~(0x11111111u << i % 4);  // three more rows have bits in the same words
    for (int word = w.x / 8 + threadIdx.x; word <= (w.y - 1) / 8; word += CONSUMERS) atomicAnd(words + word, others);
    best_of(smem, scores.out + row * scores.ld, w.y - w.x, candidates, [&](int, int j) {
      const int at = w.x + j;
      atomicOr(words + at / 8, 1u << (at % 8 * 4 + i % 4));
    });
  });
}

// Division of a call's work, as topk_reranked.py makes it, and where its scratch is.
struct RerankedPlan {
  int rows;             // of a pass
  int workers;          // thread blocks that mark
  int rank;             // of the threshold in the sample
  int candidates;       // C
  int room;             // keys that a thread block can list
  int pitch;            // tiles of 64 keys from one row group's marks to the next's
  int64_t sampled, ld;  // columns of the sampled scores, and of those of failed rows
  Failed failed;
  Sample sample;
  Threshold* thresholds;
  Span* spans;
  int32_t* division;
  void *marks, *scores;
};

// ---- host -----------------------------------------------------------------------------------------------------------

enum Stage { SAMPLE = 1, THRESHOLD = 2, MARK = 4, RERANK = 8, REDO = 16 };

// The launches of all passes; `stages` chooses among them, for a bench.
void topk(Bytes inputs, Bytes output, Bytes division, int64_t stages, int64_t stream_address) {
  const auto in = unpack<Inputs>(inputs);
  const auto out = unpack<Output>(output);
  const auto plan = unpack<RerankedPlan>(division);
  const int processors = multiprocessors();
  const cudaStream_t stream = stream_at(stream_address);
  const int bytes = FIXED_BYTES + plan.room * LISTED_BYTES;
  if (stages & SAMPLE) launch_gather(task_of(in, 0, in.rows), in.index_k, plan.sample, stream);
  for (int first = 0; first < in.rows; first += plan.rows) {
    const int rows = std::min(plan.rows, in.rows - first);
    const Task task = task_of(in, first, rows);
    const Marks marks{static_cast<uint32_t*>(plan.marks), first, rows, plan.pitch};
    const Task sampling = plan.sample.of(task);
    const Logits sampled{static_cast<float*>(plan.marks), plan.sampled, true};
    if (stages & SAMPLE) launch_score(sampling, plan.sample.keys, sampled, processors, stream);
    if (stages & THRESHOLD) {
      const Divide next{plan.division, plan.workers, INT_MAX, {}};
      launch_threshold(sampling, sampled, plan.rank, plan.candidates, plan.thresholds, plan.spans, next, plan.failed, stream);
    }
    if (stages & MARK) {
      Task scan = task;
      scan.division = plan.division;
      launch_score(scan, in.index_k, Mark{plan.thresholds, marks}, plan.workers, stream);
    }
    Rerank job{keys_of(in), out, marks, plan.spans, nullptr, nullptr, plan.candidates, plan.room, plan.failed};
    if (stages & RERANK) {
      launch_behind("rerank_kernel", rerank_kernel, {rows, RANKERS, bytes}, stream, job);
    }
    if (stages & REDO) {
      const Logits scores{static_cast<float*>(plan.scores), plan.ld, true};
      const Grid grid{processors, THREADS, sizeof(Shared<Logits>), 1, false, true};
      launch_behind("mark_exactly_kernel", mark_exactly_kernel, grid, stream, task, key_map(in.index_k, in.keys), scores, marks, plan.candidates, plan.failed);
      job.row_list = plan.failed.list + 1, job.listed = plan.failed.list;
      launch_behind("rerank_kernel", rerank_kernel, {std::min(rows, RANK_BLOCKS * processors), RANKERS, bytes}, stream, job);
    }
  }
}

}  // namespace
}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk, misa::topk);
