// The device code of topk_reranked.cu; a function that returns whether all threads ended.
#include "topk_reranked.cu"
#include "run.h"

using namespace misa;

extern "C" {

// All rows in one pass, then those that failed. Scratch: sample [rows, ld], spans and threshold of each row, table, marks, scores of
// `at_once` failed rows `ld_scores` apart.
bool rerank_rows(const uint8_t* q, const float* gates, int all_heads, const int32_t* head_ids, const uint8_t* query,
               const float* weight, const uint8_t* k, const float* scale,
                 const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, int rank, int candidates, int topk,
                 int workers, int room, int pitch, float* sample, int64_t ld, uint32_t* spans, int32_t* table, Threshold* thresholds, uint8_t* sample_keys,
                 float* sample_scale, uint32_t* words, float* scores, int64_t ld_scores, int at_once, int64_t* ever, int32_t* out, int32_t* failed) {
  Task task = rows_of(starts, ends, rows, keys, 1, nullptr);
  task.q = q, task.gates = gates, task.head_ids = head_ids, task.scale = scale, task.all_heads = all_heads;
  task.residual = {query, weight};
  const Sample sampled{sample_keys, sample_scale, stride};
  const Logits logits{sample, ld, true};
  const Marks marks{words, 0, rows, pitch};
  const Span* span = reinterpret_cast<Span*>(spans);
  int32_t meeting = 0;
  const Failed list{failed, &meeting, ever, at_once};
  if (!score_sample(task, k, sampled, logits, workers)) return false;
  if (!simt::launch(1 + rows, CUT_THREADS, [&] {
        threshold_kernel(sampled.of(task), logits, rank, candidates, thresholds, const_cast<Span*>(span), {table, workers, INT_MAX, {}}, list);
      }, 1, {{sample, rows * ld * 4}}))
    return false;
  task.division = table;
  if (!score(task, k, Mark{thresholds, marks}, workers, {{thresholds, rows * int64_t(sizeof(Threshold))}})) return false;
  const Keys all{q, gates, head_ids, k, scale, starts, ends, keys, 0, {query, weight}};
  const Output output{out, topk, nullptr, nullptr, 0, nullptr};
  Rerank job{all, output, marks, span, nullptr, nullptr, candidates, room, list};
  const simt::Late marked{words, int64_t(rows + 3) / 4 * pitch * 32};
  if (!simt::launch(rows, RANKERS, [&] { rerank_kernel(job); }, 1, {marked})) return false;
  // One block: those of a cooperative grid would run at once.
  task.division = nullptr;
  const CUtensorMap map{reinterpret_cast<const char*>(k), keys, DIM, TILE};
  if (!simt::launch(1, THREADS, [&] { mark_exactly_kernel(task, map, {scores, ld_scores, true}, marks, candidates, list); })) return false;
  job.row_list = failed + 1, job.listed = failed;
  return simt::launch(1, RANKERS, [&] { rerank_kernel(job); }, 1, {marked});
}
}
