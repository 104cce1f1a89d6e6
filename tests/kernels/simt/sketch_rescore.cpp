// The device code of sketch_rescore.cu as a function that returns whether all threads ended.
#include "sketch_rescore.cu"

using namespace misa;

extern "C" bool rescore_rows(const uint8_t* index_q, const float* head_gates, const uint8_t* index_k_pages, const int32_t* pages,
                             const int32_t* lens, const int32_t* positions, float* logits, int64_t pitch, int candidates, int topk, int span,
                             int blocks, int rows) {
  const Rescore in{index_q, head_gates, index_k_pages, pages, lens, positions, logits, pitch, candidates, topk, span, blocks};
  return simt::launch(rows * blocks, THREADS, [&] { rescore_kernel(in); }, 1, {{positions, int64_t(rows) * candidates * 4}}) && !sm90::misused;
}
