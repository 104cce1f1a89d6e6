// The device code of topk_blocks.cu as a function that returns whether all threads ended.
#include "topk_blocks.cu"

namespace misa {
namespace {
alignas(1024) uint8_t raw[64 << 10];
}
}  // namespace misa

using namespace misa;

extern "C" bool select_rows(const uint8_t* q, const float* gates, const uint8_t* k, const float* scale, const int32_t* starts,
                            const int32_t* ends, int rows, int keys, const float* scores, int64_t pitch, int size, int kept, int room,
                            int32_t* out, int topk, const int32_t* pages, const int32_t* row_batch, int64_t page_pitch) {
  const Keys all{q, gates, nullptr, k, scale, starts, ends, keys, 0};
  const Output output{out, topk, pages, row_batch, page_pitch, nullptr};
  return simt::launch(rows, RANKERS, [&] { blocks_kernel({all, output, {scores, pitch, size, kept, room}}); });
}
