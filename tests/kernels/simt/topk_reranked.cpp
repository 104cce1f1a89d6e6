// The device code of topk_reranked.cu, but for what is redone; a function that returns whether all threads ended.
#include "topk_reranked.cu"
#include "run.h"

using namespace misa;

extern "C" {

// All rows in one pass. Scratch: sample [rows, ld], spans and threshold of each row, table, marks.
bool rerank_rows(const uint8_t* q, const float* gates, int all_heads, const int32_t* head_ids, const uint8_t* query,
               const float* weight, const uint8_t* k, const float* scale,
                 const int32_t* starts, const int32_t* ends, int rows, int keys, int stride, int rank, int candidates, int topk,
                 int workers, int room, float* sample, int64_t ld, uint32_t* spans, int32_t* table, Threshold* thresholds, uint8_t* sample_keys,
                 float* sample_scale, uint32_t* words, int32_t* out, int32_t* failed) {
  Task task = rows_of(starts, ends, rows, keys, 1, nullptr);
  task.q = q, task.gates = gates, task.head_ids = head_ids, task.scale = scale, task.all_heads = all_heads;
  task.residual = {query, weight};
  const Sample sampled{sample_keys, sample_scale, stride};
  const Logits logits{sample, ld, true};
  const Marks marks{words, 0, rows, (keys + TILE - 1) / TILE * (TILE / KEYS)};
  const Span* span = reinterpret_cast<Span*>(spans);
  if (!score_sample(task, k, sampled, logits, workers)) return false;
  if (!simt::launch(1 + rows, CUT_THREADS, [&] {
        threshold_kernel(sampled.of(task), logits, rank, candidates, thresholds, const_cast<Span*>(span), {table, workers, INT_MAX, {}}, failed);
      }))
    return false;
  task.division = table;
  if (!score(task, k, Mark{thresholds, marks}, workers)) return false;
  const Keys all{q, gates, head_ids, k, scale, starts, ends, keys, 0, {query, weight}};
  const Output output{out, topk, nullptr, nullptr, 0, nullptr};
  return simt::launch(rows, RANKERS, [&] { rerank_kernel({all, output, marks, span, nullptr, nullptr, candidates, room, Failed{failed}}); });
}
}
