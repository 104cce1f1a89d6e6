// Exact top k of routed-head scores (score.cuh) without a score matrix: (1) score every `stride`-th key, (2) take a quantile of
// that sample as the row's threshold, (3) score all keys and append what passes to buffers that each thread owns alone,
// (4) take the exact top k of the appended, (5) rows that came out short or overflowed are scored into memory and selected
// there. See score_ragged.py for the statistics.
#include "redo.cuh"
#include "threshold.cuh"

namespace misa {

// What passed: (score, key) in buffers that threads own alone, so that there are no atomics.
struct HitBuffers {
  const float* threshold;  // [rows]
  uint2* entries;          // [rows, splits, buffers, capacity] of (score bits, key)
  int32_t* counts;         // [rows, splits, buffers]; -1 marks an overflow
  int capacity;            // a multiple of SECTOR
  int buffers;             // of a row in each split
};

constexpr int SECTOR = 4;  // entries that L2 takes as fast as one: it writes whole sectors

// What is above the row's threshold goes to memory one by one: the cheapest for the scorer, as long as few pass.
struct FewHits : HitBuffers {
  static constexpr int BUFFERS = 32;  // 4 warps × 8 lane rows
  static constexpr int BURST = 2;     // entries that one product may bring to a buffer

  struct Shared {};

  struct Lane {
    const HitBuffers& to;
    const Seat seat;
    const int rows, splits;
    const uint32_t pitch, begin;  // entries between this thread's buffers, and the first buffer's first
    float threshold[LANE_QUERIES];
    uint32_t place[LANE_QUERIES];  // of the next entry

    __device__ Lane(const FewHits& sink, Shared&, const Task& task, const Seat& seat)
        : to(sink), seat(seat), rows(task.rows), splits(task.splits), pitch(4u * task.splits * BUFFERS * sink.capacity),
          begin(((uint32_t(seat.query(0)) * task.splits + seat.split) * BUFFERS + seat.warp * 8 + seat.lane_row) * sink.capacity) {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) {
        threshold[q] = seat.query(q) < rows ? to.threshold[seat.query(q)] : INFINITY;
        place[q] = begin + q * pitch;
      }
    }
    // The last place from which a whole burst still fits.
    __device__ uint32_t limit(int q) const { return begin + q * pitch + to.capacity - BURST; }

    __device__ void take(float (&score)[LANE_QUERIES][2], int key0, bool inside, const int2* windows) {
      if (!inside) drop_outside(score, seat, key0, windows);
      // A predicated store and no branch; the volatile asm keeps the compiler from making one.
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          asm volatile(
              "{\n"
              ".reg .pred hit;\n"
              ".reg .u64 place;\n"
              "setp.gt.f32 hit, %1, %2;\n"
              "mad.wide.u32 place, %0, 8, %4;\n"
              "@hit st.global.v2.b32 [place], {%1, %3};\n"
              "@hit add.u32 %0, %0, 1;\n"
              "}\n"
              : "+r"(place[q])
              : "f"(score[q][half]), "f"(threshold[q]), "r"(key0 + seat.key(half)), "l"(to.entries)
              : "memory");
      // Ends collecting where a buffer might not hold the next burst.
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q) threshold[q] = place[q] > limit(q) ? INFINITY : threshold[q];
    }
    __device__ void finish() {
#pragma unroll
      for (int q = 0; q < LANE_QUERIES; ++q)
        if (seat.query(q) < rows)
          to.counts[(int64_t(seat.query(q)) * splits + seat.split) * BUFFERS + seat.warp * 8 + seat.lane_row] =
              place[q] > limit(q) ? -1 : int(place[q] - begin - q * pitch);
    }
  };
};

// The same, gathered in shared memory and written by sectors: appends of 8 bytes stop at 25 G/s on an H100, which is what
// limits the scorer where many pass. Neighbouring lanes divide their queries, for there is no room for a sector of each.
struct ManyHits : HitBuffers {
  static constexpr int OWNERS = LANE_QUERIES > 1 ? 2 : 1;
  static constexpr int OWN = LANE_QUERIES / OWNERS;  // queries of which a thread appends the hits
  static constexpr int BUFFERS = 32 / OWNERS;
  static constexpr int BURST = 2 * OWNERS;           // entries that one product may bring to a buffer
  static_assert(BURST <= SECTOR);

  struct Shared {
    uint2 waiting[OWN][2 * SECTOR][CONSUMERS];  // less than a sector, and a burst
  };

  struct Lane {
    const HitBuffers& to;
    const Seat seat;
    const int rows, splits;
    const bool upper;             // which half of the pair's queries is this lane's
    const uint32_t pitch, begin;  // entries between this thread's buffers, and the first buffer's first
    const uint32_t waiting;       // shared-memory address of the first waiting entry
    float threshold[OWN];
    uint32_t slot[OWN];           // shared-memory address of the next entry
    uint32_t place[OWN];          // of the next sector; FULL: no room is left

    static constexpr uint32_t STEP = sizeof(uint2) * CONSUMERS, ROW = 2 * SECTOR * STEP, FULL = ~0u;

    __device__ Lane(const ManyHits& sink, Shared& shared, const Task& task, const Seat& seat)
        : to(sink), seat(seat), rows(task.rows), splits(task.splits), upper(OWNERS == 2 && seat.lane_row % 2),
          pitch(4u * task.splits * BUFFERS * sink.capacity),
          begin(((uint32_t(query(0)) * task.splits + seat.split) * BUFFERS + buffer()) * sink.capacity),
          waiting(sm90::smem_address(&shared.waiting[0][0][threadIdx.x])) {
#pragma unroll
      for (int q = 0; q < OWN; ++q) {
        threshold[q] = query(q) < rows ? to.threshold[query(q)] : INFINITY;
        slot[q] = waiting + q * ROW;
        place[q] = begin + q * pitch;
      }
    }
    __device__ int query(int q) const { return seat.query(q + (upper ? OWN : 0)); }
    __device__ int buffer() const { return (seat.warp * 8 + seat.lane_row) / OWNERS; }

    __device__ void append(float score, int key, int q) {
      asm volatile(
          "{\n"
          ".reg .pred hit;\n"
          "setp.gt.f32 hit, %1, %2;\n"
          "@hit st.shared.v2.b32 [%0], {%1, %3};\n"
          "@hit add.u32 %0, %0, %4;\n"
          "}\n"
          : "+r"(slot[q])
          : "f"(score), "f"(threshold[q]), "r"(key), "n"(STEP)
          : "memory");
    }
    __device__ void take(float (&score)[LANE_QUERIES][2], int key0, bool inside, const int2* windows) {
      if (!inside) drop_outside(score, seat, key0, windows);
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
      if (place[q] == FULL || place[q] + SECTOR > begin + q * pitch + to.capacity) {
        threshold[q] = INFINITY;
        place[q] = FULL;
        return;
      }
#pragma unroll
      for (int i = 0; i < SECTOR / 2; ++i) *reinterpret_cast<uint4*>(to.entries + place[q] + 2 * i) = out[i];
      place[q] += SECTOR;
    }
    __device__ void finish() {
#pragma unroll
      for (int q = 0; q < OWN; ++q) {
        const int left = (slot[q] - waiting - q * ROW) / STEP;
        uint4 out[SECTOR / 2];
        read(waiting + q * ROW, out);
        if (left > 0) write(q, out);
        if (query(q) < rows)
          to.counts[(int64_t(query(q)) * splits + seat.split) * BUFFERS + buffer()] =
              place[q] == FULL ? -1 : int(place[q] - begin - q * pitch) - (left > 0 ? SECTOR - left : 0);
      }
    }
  };
};

constexpr int SELECT_THREADS = 512;

// Exact top k of each row's appended entries; a row that cannot be answered from them goes on the failed list.
__global__ void __launch_bounds__(SELECT_THREADS)
    select_kernel(const __grid_constant__ Task task, const __grid_constant__ HitBuffers hits, const __grid_constant__ Output output, int room, int32_t* failed) {
  using Block = Select<SELECT_THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Smem smem;
  __shared__ int begin[SELECT_THREADS + 1];
  uint32_t* keys = staged;
  int32_t* index = reinterpret_cast<int32_t*>(staged + room);

  const int i = blockIdx.x, t = task.first + i, k = output.k;
  const int start = max(task.starts[t], 0), length = max(min(task.ends[t], task.keys) - start, 0);
  int32_t* out = output.out + int64_t(t) * k;
  if (length <= k) {
    for (int j = threadIdx.x; j < k; j += SELECT_THREADS) out[j] = j < length ? output.place(t, j) : -1;
    return;
  }
  const int buffers = task.splits * hits.buffers;
  const int count = threadIdx.x < buffers ? hits.counts[int64_t(i) * buffers + threadIdx.x] : 0;
  const bool overflow = __syncthreads_or(count < 0);
  const int after = Block::scan(smem, count);
  if (threadIdx.x < buffers) begin[threadIdx.x + 1] = after;
  if (threadIdx.x == 0) begin[0] = 0;
  __syncthreads();
  const int total = begin[buffers];
  if (overflow || total < k || total > room) {
    if (threadIdx.x == 0) failed[1 + atomicAdd(failed, 1)] = t;
    return;
  }
  // Half a warp a buffer, two entries (16 bytes) a lane.
  uint32_t least = ~0u, most = 0;
  for (int buffer = threadIdx.x / 16; buffer < buffers; buffer += SELECT_THREADS / 16) {
    const uint4* from = reinterpret_cast<const uint4*>(hits.entries + (int64_t(i) * buffers + buffer) * hits.capacity);
    const int at = begin[buffer], n = begin[buffer + 1] - at;
#pragma unroll 4
    for (int j = threadIdx.x % 16 * 2; j < n; j += 32) {
      const uint4 two = __ldcg(from + j / 2);
      const uint32_t key0 = rank_key(__uint_as_float(two.x));
      keys[at + j] = key0, index[at + j] = two.y;
      least = min(least, key0), most = max(most, key0);
      if (j + 1 < n) {
        const uint32_t key1 = rank_key(__uint_as_float(two.z));
        keys[at + j + 1] = key1, index[at + j + 1] = two.w;
        least = min(least, key1), most = max(most, key1);
      }
    }
  }
  const auto all = Block::range(smem, least, most, k, total);
  Block::top(smem, all, [&](int j) { return keys[j]; }, [&](int j) { return index[j]; }, total,
             [&](int place, int j) { out[place] = output.place(t, index[j] - start); });
}

// Failed rows, `at_once` of them at a time: all their scores into memory, then the exact top k.
__global__ void __launch_bounds__(THREADS, 1)
    redo_kernel(const __grid_constant__ Task whole, const __grid_constant__ Logits scores, const __grid_constant__ CUtensorMap map,
                const __grid_constant__ Output output, int at_once, const int32_t* failed, int32_t* meeting) {
  __shared__ Redoers::Smem smem;
  redo(whole, map, scores, at_once, failed, meeting, [&](const Task& task, int row) {
    const int t = task.row(row);
    const int2 w = task.window(row);
    int32_t* out = output.out + int64_t(t) * output.k;
    best_of(smem, scores.out + row * scores.ld, w.y - w.x, output.k, [&](int place, int j) { out[place] = output.place(t, j); });
  });
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Scores of rows [first, first + rows) into out [rows, ld], at the keys' columns.
void logits(tvm::ffi::Array<int64_t> inputs, int64_t first, int64_t rows, int64_t splits, int64_t out, int64_t ld, int64_t stream) {
  const Inputs call(inputs);
  launch_score(call.rows(int(first), int(rows), int(splits)), call.k, Logits{pointer<float>(out), ld, false}, Shape(), pointer<CUstream_st>(stream));
}

// Division of a call's work, as score_ragged.Plan: numbers, then addresses in scratch.
struct Plan {
  int rows, splits, buffers, stride, rank, capacity, room, sampled, at_once, ld;
  int32_t* failed;   // how many, the rows …, and at [all rows + 1] the meeting counter
  float* threshold;
  int32_t* counts;
  char* bulk;        // sampled scores, then entries; at last the scores of `redo`
  explicit Plan(const tvm::ffi::Array<int64_t>& v)
      : rows(int(v[0])), splits(int(v[1])), buffers(int(v[2])), stride(int(v[3])), rank(int(v[4])), capacity(int(v[5])), room(int(v[6])),
        sampled(int(v[7])), at_once(int(v[8])), ld(int(v[9])), failed(pointer<int32_t>(v[10])), threshold(pointer<float>(v[11])),
        counts(pointer<int32_t>(v[12])), bulk(pointer<char>(v[13])) {}
};

enum Stage { SAMPLE = 1, THRESHOLD = 2, COLLECT = 4, SELECT = 8, REDO = 16 };

// All launches of one call; `stages` leaves some out.
void topk(tvm::ffi::Array<int64_t> inputs, tvm::ffi::Array<int64_t> output, tvm::ffi::Array<int64_t> division, int64_t total, int64_t stages, int64_t stream_address) {
  const Inputs call(inputs);
  const Plan plan(division);
  const Output out = output_of(output);
  const Shape shape;
  const auto stream = pointer<CUstream_st>(stream_address);
  const Logits sample{reinterpret_cast<float*>(plan.bulk), plan.sampled, true};
  const HitBuffers hits{plan.threshold, reinterpret_cast<uint2*>(plan.bulk), plan.counts, plan.capacity, plan.buffers};
  for (int first = 0; first < total; first += plan.rows) {
    const Task task = call.rows(first, std::min(plan.rows, int(total) - first), plan.splits);
    Task sampling = task;
    sampling.stride = plan.stride, sampling.phase = plan.stride / 2;
    if (stages & SAMPLE) launch_score(sampling, call.k, sample, shape, stream);
    if (stages & THRESHOLD) {
      const int bytes = plan.sampled * 4;
      allow_shared(threshold_kernel, bytes);
      threshold_kernel<<<task.rows, CUT_THREADS, bytes, stream>>>(sampling, sample, plan.rank, out.k, plan.threshold, nullptr, first == 0 ? plan.failed : nullptr);
      check(cudaGetLastError(), "threshold_kernel");
    }
    if (stages & COLLECT) {
      if (plan.buffers == FewHits::BUFFERS) launch_score(task, call.k, FewHits{hits}, shape, stream);
      else launch_score(task, call.k, ManyHits{hits}, shape, stream);
    }
    if (stages & SELECT) {
      const int bytes = plan.room * 8;
      allow_shared(select_kernel, bytes);
      select_kernel<<<task.rows, SELECT_THREADS, bytes, stream>>>(task, hits, out, plan.room, plan.failed);
      check(cudaGetLastError(), "select_kernel");
    }
  }
  if (stages & REDO) {
    Task task = call.task;
    Output to = out;
    Logits scores{reinterpret_cast<float*>(plan.bulk), plan.ld, true};
    CUtensorMap map = key_map(call.k, task.keys, 1, 0);
    int at_once = plan.at_once;
    int32_t *list = plan.failed, *meeting = plan.failed + total + 1;
    allow_shared(redo_kernel, sizeof(Shared<Logits>));
    check(cudaMemsetAsync(meeting, 0, sizeof(int32_t), stream), "cudaMemsetAsync");
    void* arguments[] = {&task, &scores, &map, &to, &at_once, &list, &meeting};
    check(cudaLaunchCooperativeKernel(redo_kernel, dim3(shape.multiprocessors), dim3(THREADS), arguments, sizeof(Shared<Logits>), stream), "redo_kernel");
  }
}

}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(logits, misa::logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk, misa::topk);
