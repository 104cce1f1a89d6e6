// What the top-k kernels share: the places of chosen keys in the caller's output, and the host's side of a launch.
#pragma once
#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

namespace misa {

// Where a chosen key goes: its position in the row's window, shifted by the row's offset, or looked up in a page table.
struct Output {
  int32_t* out;               // [T, k]
  int k;
  const int32_t* page_table;  // [B, page_width] physical slot of each position, or null
  const int32_t* row_batch;   // [T]
  int64_t page_pitch;         // between the rows of page_table
  const int32_t* offsets;     // [T] added to positions, or null

  __device__ int place(int t, int position) const {
    if (page_table) return page_table[row_batch[t] * page_pitch + position];
    return offsets ? position + offsets[t] : position;
  }
};

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

template <class T>
T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

inline Output output_of(tvm::ffi::Array<int64_t> output) {
  return {pointer<int32_t>(output[0]), int(output[1]), pointer<int32_t>(output[2]), pointer<int32_t>(output[3]), output[4], pointer<int32_t>(output[5])};
}

}  // namespace misa
