// The device code of topk_kept.cu as functions that return whether all threads ended.
#include "topk_kept.cu"

using namespace misa;

namespace {

template <class Tokens>
bool rows_of(const Rows<Tokens>& row, int rows) {
  return simt::launch(rows, THREADS, [&] {
    if (row.tokens.room <= 4 * THREADS) topk_kernel<Tokens, 1>(row);
    else topk_kernel<Tokens, 2>(row);
  }, 1, {{row.scores, int64_t(rows) * row.tokens.room * 4}});
}

}  // namespace

extern "C" {

bool kept_rows(const float* scores, const int32_t* lens, const int32_t* pages, const int32_t* blocks, int room, int block, int32_t* slots,
               int32_t* positions, int k, int rows) {
  return rows_of(Rows<Kept>{{scores, lens, slots, positions, k}, {pages, blocks, room, block}}, rows);
}

bool listed_rows(const float* scores, const int32_t* lens, const int32_t* listed, const int32_t* table, int64_t pitch, int room,
                 int32_t* slots, int32_t* positions, int k, int rows) {
  return rows_of(Rows<Listed>{{scores, lens, slots, positions, k}, {listed, table, pitch, room}}, rows);
}
}
