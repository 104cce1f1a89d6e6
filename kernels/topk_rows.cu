// Exact top k of rows of scores that lie in memory, each with its id: the last step of re-ranking and of block selection.
#include "output.cuh"
#include "select.cuh"

namespace misa {

constexpr int THREADS = 512;

__global__ void __launch_bounds__(THREADS)
    rows_kernel(const float* scores, int64_t score_pitch, const int32_t* ids, int64_t id_pitch, const int32_t* counts,
                int columns, const __grid_constant__ Output output) {
  using Block = Select<THREADS>;
  extern __shared__ __align__(16) uint32_t staged[];
  __shared__ Block::Smem smem;
  const int t = blockIdx.x, k = output.k, n = max(0, min(counts[t], columns));
  const int32_t* id = ids + t * id_pitch;
  int32_t* out = output.out + int64_t(t) * k;
  if (n <= k) {
    for (int j = threadIdx.x; j < k; j += THREADS) out[j] = j < n ? output.place(t, id[j]) : -1;
    return;
  }
  const float* row = scores + t * score_pitch;
  uint32_t least = ~0u, most = 0;
  Block::each([&](int j) { return rank_key(__ldg(row + j)); }, n, [&](uint32_t key, int j) {
    staged[j] = key;
    least = min(least, key), most = max(most, key);
  });
  const auto all = Block::range(smem, least, most, k, n);
  Block::top(smem, all, [&](int j) { return staged[j]; }, [&](int j) { return id[j]; }, n,
             [&](int place, int j) { out[place] = output.place(t, id[j]); });
}

void topk_rows(int64_t scores, int64_t score_pitch, int64_t ids, int64_t id_pitch, int64_t counts, int64_t rows,
               int64_t columns, tvm::ffi::Array<int64_t> output, int64_t stream) {
  const int bytes = int(columns) * 4;
  allow_shared(rows_kernel, bytes);
  rows_kernel<<<rows, THREADS, bytes, pointer<CUstream_st>(stream)>>>(
      pointer<float>(scores), score_pitch, pointer<int32_t>(ids), id_pitch, pointer<int32_t>(counts), int(columns),
      output_of(output));
  check(cudaGetLastError(), "rows_kernel");
}

}  // namespace misa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_rows, misa::topk_rows);
