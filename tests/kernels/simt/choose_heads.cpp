// The device code of choose_heads.cu as a function that returns whether all threads ended.
#include "choose_heads.cu"

using namespace misa;

extern "C" bool choose(const uint8_t* q, const float* gates, const int32_t* row_len, const Normal* products, const float* direction,
                       int32_t* head_ids, uint32_t* query, float* scale, int rows, int max_blocks, int block_size, int heads) {
  const ChooseHeads in{q, gates, row_len, products, direction, head_ids, query, scale, rows, max_blocks, block_size, heads};
  return simt::launch((rows + ROWS - 1) / ROWS, ROW_THREADS, [&] { choose_kernel(in); }, 1,
                      {{direction, int64_t(rows) * DIM * 4}});
}
