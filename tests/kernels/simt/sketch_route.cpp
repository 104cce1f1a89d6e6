// The device code of sketch_route.cu as a function that returns whether all threads ended.
#include "sketch_route.cu"

using namespace misa;

extern "C" bool route_rows(const uint8_t* index_q, const float* head_gates, const uint8_t* means, const int32_t* pages, const int32_t* lens,
                           uint32_t* queries, float* gates, int64_t pitch, int heads, int router, int residual, int candidates,
                           int rows) {
  const PageRoute in{index_q, head_gates, means, pages, lens, queries, gates, pitch, heads, router, residual, candidates};
  return simt::launch(rows * BLOCKS, THREADS, [&] { route_kernel(in); }, BLOCKS) && !sm90::misused;
}
