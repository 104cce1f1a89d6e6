// The device code of route.cu as functions that return whether all threads ended.
#include "route.cu"

namespace misa {
namespace {

alignas(1024) uint8_t raw[sizeof(Smem<Folded<Statistic::SUM, false>>) + sizeof(Smem<Folded<Statistic::SUM, true>>)];

template <class Fold>
bool launch(const Task& task, const uint8_t* q, const uint16_t* pooled, int requests, int workers) {
  const CUtensorMap q_map{reinterpret_cast<const char*>(q), task.rows * INDEX_HEADS, DIM, LINES};
  const CUtensorMap k_map{reinterpret_cast<const char*>(pooled), requests * task.max_blocks, DIM * 2, TILE, 2};
  return simt::launch(workers, THREADS, [&] { route_kernel<Fold>(task, q_map, k_map); });
}

}  // namespace
}  // namespace misa

using namespace misa;

extern "C" {

// As the host of route.cu chooses; `share` rows at a time go to each of `workers` thread blocks.
bool route_rows(const uint8_t* q, const float* gates, const uint16_t* pooled, const int32_t* row_batch, const int32_t* row_len, int rows,
                int requests, int max_blocks, int block_size, int heads, int router, int share, int workers, int32_t* head_ids,
                float* residual_gates, Normal* products) {
  const Task task{gates, row_batch, row_len, head_ids, residual_gates, rows, share, max_blocks, block_size, heads, router, products};
  if (max_blocks == 0 || (router == WEIGHT && !residual_gates))
    return simt::launch((rows * 32 + ROW_THREADS - 1) / ROW_THREADS, ROW_THREADS, [&] { weight_kernel(task); });
  if (router == WEIGHT) return launch<Folded<Statistic::NONE, true>>(task, q, pooled, requests, workers);
  if (router == PEAK) return residual_gates ? launch<Folded<Statistic::MAXIMUM, true>>(task, q, pooled, requests, workers)
                                            : launch<Folded<Statistic::MAXIMUM, false>>(task, q, pooled, requests, workers);
  return residual_gates ? launch<Folded<Statistic::SUM, true>>(task, q, pooled, requests, workers)
                        : launch<Folded<Statistic::SUM, false>>(task, q, pooled, requests, workers);
}

bool residuals(const uint8_t* q, const float* gates, int rows, uint32_t* query, float* scale) {
  return simt::launch((rows * 32 + ROW_THREADS - 1) / ROW_THREADS, ROW_THREADS, [&] { residual_kernel(q, gates, rows, query, scale); });
}
}
