// The device code of sketch_candidates.cu as a function that returns whether all threads ended.
#include "sketch_candidates.cu"

using namespace misa;

extern "C" bool list_rows(const uint16_t* scores, const int32_t* lens, int32_t* positions, int64_t room, int candidates, int rows, int blocks) {
  const Candidates in{scores, lens, positions, room, candidates};
  return simt::launch(rows * blocks, THREADS, [&] { candidates_kernel(in); }, blocks, {{scores, rows * room * 2}});
}
