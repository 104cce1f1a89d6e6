// The device code of sketch_scan.cu as a function that returns whether all threads ended.
#include "sketch_scan.cu"

using namespace misa;

extern "C" bool scan_rows(const int8_t* queries, const float* gates, const uint8_t* means, const uint8_t* sketches, const int32_t* pages,
                          const int32_t* lens, uint16_t* scores, int64_t pitch, int64_t room, int columns, int residual, int candidates,
                          int span, int blocks, int rows) {
  const Scan in{queries, gates, means, sketches, pages, lens, scores, pitch, room, columns, residual, candidates, span, blocks};
  return simt::launch(rows * blocks, WARPS * 32, [&] { scan_kernel(in); }, 1,
                      {{queries, int64_t(rows) * columns * DIM}, {gates, int64_t(rows) * columns * 4}});
}
