// The device code of topk_routed.cu and what it includes, as functions that return whether all threads ended.
#include "topk_routed.cu"
#include "run.h"

namespace misa {
namespace {
alignas(16) uint2 entries[1 << 14];
}
}  // namespace misa

using namespace misa;

extern "C" {

int block_rows() { return ROWS; }

// The keys that stand for all.
void sampled_keys(int keys, int stride, int32_t* found) {
  Task task{};
  task.keys = keys, task.stride = stride;
  for (int i = 0; i < task.scored(); ++i) found[i] = task.key(i);
}

bool divide_rows(const int32_t* starts, const int32_t* ends, int rows, int keys, int k, int32_t* table, int workers, int runs, float hits,
                 float sigmas, float rank, int spare, int room) {
  const Task task = rows_of(starts, ends, rows, keys, 1, nullptr);
  return simt::launch(1, CUT_THREADS, [&] { divide(task, k, {table, workers, runs, {hits, sigmas, rank, spare, room}}); });
}

int sweeps_of(int tiles) { return Item::sweeps_of(tiles); }

// visits [workers, most, 2] of (row block, tile), of which counts [workers] are filled.
bool walk(const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, const int32_t* division, int workers, int most,
          int32_t* visits, int32_t* counts) {
  const Task task = rows_of(starts, ends, rows, keys, stride, division);
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
                Threshold* found, uint32_t* spans, int32_t* table, int32_t* failed) {
  const Task task = rows_of(starts, ends, rows, keys, stride, nullptr);
  int32_t meeting;
  return simt::launch(1 + rows, CUT_THREADS, [&] {
    threshold_kernel(task, {sample, ld, true}, rank, k, found, reinterpret_cast<Span*>(spans), {table, 4, 4, {}}, {failed, &meeting});
  }, 1, {{sample, rows * ld * 4}});
}

bool select_rows(const int32_t* starts, const int32_t* ends, int rows, int keys, const int32_t* division,
                 const Threshold* thresholds, uint2* hits, int2* counts, int buffers, int32_t* out, int k, const int32_t* pages,
                 const int32_t* row_batch, int64_t pitch, const int32_t* offsets, int room, int32_t* failed) {
  const Task task = rows_of(starts, ends, rows, keys, 1, division);
  const HitBuffers held{thresholds, hits, counts, buffers};
  const Output output{out, k, pages, row_batch, pitch, offsets};
  const Failed list{failed};
  sm90::misused = false;
  return simt::launch(rows, SELECT_THREADS, [&] {
    if (pages) select_kernel<true>(task, held, output, room, list);
    else select_kernel<false>(task, held, output, room, list);
  }) && !sm90::misused;
}

// Sample, thresholds, collection and selection of all rows in one pass, then of those that `failed` gets. Scratch: sample [rows, ld], hits
// of `room_of_all` entries a buffer, counts [rows + block_rows · workers, buffers], table, threshold [rows], scores of `at_once` failed
// rows `ld_scores` apart.
bool topk_rows(const uint8_t* q, const float* gates, int all_heads, const int32_t* head_ids, const uint8_t* query,
               const float* weight, const uint8_t* k, const float* scale,
               const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, int rank, int topk, int workers, int runs,
               int buffers, int spare, int room_of_all, int room, float* sample, int64_t ld, uint2* hits, int2* counts, int32_t* table,
               Threshold* thresholds, uint8_t* sample_keys, float* sample_scale, float* scores, int64_t ld_scores, int at_once, int64_t* ever,
               int32_t* out, int32_t* failed) {
  Task task = rows_of(starts, ends, rows, keys, 1, nullptr);
  task.q = q, task.gates = gates, task.head_ids = head_ids, task.scale = scale, task.all_heads = all_heads;
  task.residual = {query, weight};
  const Sample sampled{sample_keys, sample_scale, stride};
  const Logits logits{sample, ld, true};
  const bool few = buffers == FewHits::BUFFERS;
  const Buffers own{float(rank) * stride / buffers, few ? FewHits::SIGMAS : ManyHits::SIGMAS, float(rank), spare, room_of_all};
  const HitBuffers held{thresholds, hits, counts, buffers};
  const Output output{out, topk, nullptr, nullptr, 0, nullptr};
  int32_t meeting;
  const Failed list{failed, &meeting, ever, at_once};
  if (!score_sample(task, k, sampled, logits, workers)) return false;
  if (!simt::launch(1 + rows, CUT_THREADS, [&] {
        threshold_kernel(sampled.of(task), logits, rank, topk, thresholds, nullptr, {table, workers, runs, own}, list);
      }, 1, {{sample, rows * ld * 4}}))
    return false;
  task.division = table;
  const simt::Late passing{thresholds, rows * int64_t(sizeof(Threshold))}, counted{counts, int64_t(rows + ROWS * workers) * buffers * 8};
  if (!(few ? score(task, k, FewHits{held}, workers, {passing}) : score(task, k, ManyHits{held}, workers, {passing}))) return false;
  sm90::misused = false;
  if (!simt::launch(rows, SELECT_THREADS, [&] { select_kernel<false>(task, held, output, room, list); }, 1, {counted}) || sm90::misused)
    return false;
  // One block: those of a cooperative grid would run at once.
  task.division = nullptr;
  const CUtensorMap map{reinterpret_cast<const char*>(k), keys, DIM, TILE};
  return simt::launch(1, THREADS, [&] { redo_kernel(task, {scores, ld_scores, true}, map, output, list); });
}
}
