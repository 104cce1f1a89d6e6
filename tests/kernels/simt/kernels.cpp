// The device code of score_ragged.cu and what it includes, but for the scorer, as functions that return whether all threads ended.
#include "score_ragged.cu"

namespace misa {
alignas(16) uint32_t staged[1 << 14];
alignas(16) uint2 entries[1 << 14];

namespace {

Task task_of(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, const int32_t* division) {
  Task task{};
  task.starts = starts, task.ends = ends, task.rows = rows, task.keys = keys, task.stride = stride, task.phase = stride / 2;
  task.division = division;
  if (stride == 1) task.phase = 0;
  return task;
}

}  // namespace
}  // namespace misa

using namespace misa;

extern "C" {

int block_rows() { return ROWS; }

bool divide_rows(const int32_t* starts, const int32_t* ends, int rows, int keys, int k, int32_t* table, int workers, int runs, float hits,
                 float sigmas, float rank, int spare, int room) {
  const Task task = task_of(starts, ends, rows, keys, 1, nullptr);
  return simt::launch(1, CUT_THREADS, [&] { divide(task, k, {table, workers, runs, {hits, sigmas, rank, spare, room}}); });
}

// visits [workers, most, 2] of (row block, tile), of which counts [workers] are filled.
bool walk(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, const int32_t* division, int workers, int most,
          int32_t* visits, int32_t* counts) {
  const Task task = task_of(starts, ends, rows, keys, stride, division);
  return simt::launch(workers, simt::WARP, [&] {
    int count = 0;
    for (Items items(task); items.more();)
      for (Item item = items.next(); item.more(); item.advance()) {
        if (!item.seen()) continue;
        int32_t* to = visits + (int64_t(blockIdx.x) * most + count) * 2;
        if (threadIdx.x == 0 && count < most) to[0] = item.first_row / ROWS, to[1] = item.tile;
        ++count;
      }
    counts[blockIdx.x] = count;
  });
}

// workers [2]: the first with a run of the row's block, and how many.
void workers_of(const int32_t* division, int row, int32_t* workers) {
  Task task{};
  task.division = division;
  const int2 found = Items::workers(task, row);
  workers[0] = found.x, workers[1] = found.y;
}

bool thresholds(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, float* sample, int64_t ld, int rank, int k,
                float* threshold, uint32_t* spans, int32_t* table, int32_t* failed) {
  const Task task = task_of(starts, ends, rows, keys, stride, nullptr);
  return simt::launch(1 + rows, CUT_THREADS, [&] {
    threshold_kernel(task, {sample, ld, true}, rank, k, threshold, reinterpret_cast<Span*>(spans), {table, 4, 4, {}}, failed);
  });
}

bool select_rows(const int32_t* starts, const int32_t* ends, int rows, int keys, const int32_t* division, const float* threshold,
                 uint2* hits, int2* counts, int buffers, int32_t* out, int k, const int32_t* pages,
                 const int32_t* row_batch, int64_t pitch, const int32_t* offsets, int room, int32_t* failed) {
  const Task task = task_of(starts, ends, rows, keys, 1, division);
  const HitBuffers held{threshold, hits, counts, buffers};
  const Output output{out, k, pages, row_batch, pitch, offsets};
  sm90::misused = false;
  return simt::launch(rows, SELECT_THREADS, [&] {
    if (pages) select_kernel<true>(task, held, output, room, failed);
    else select_kernel<false>(task, held, output, room, failed);
  }) && !sm90::misused;
}
}
