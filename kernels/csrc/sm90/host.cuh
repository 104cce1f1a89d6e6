// The host's side of a launch.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace misa {
namespace {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

using tvm::ffi::Bytes;

// The struct that structs.py has under this name.
template <class T>
T unpack(const Bytes& bytes) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (bytes.size() != sizeof(T)) TVM_FFI_THROW(RuntimeError) << "struct: expected " << sizeof(T) << " bytes, got " << bytes.size();
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  return value;
}

inline cudaStream_t stream_at(int64_t address) { return reinterpret_cast<cudaStream_t>(address); }

template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

inline int multiprocessors() {
  int device, count;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Thread blocks of a kernel without dynamic shared memory that run at once.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads) {
  int blocks;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks * multiprocessors();
}

// Boxes of 128 bytes × `box` rows, under the 128-byte swizzle, of a matrix [rows, 128] whose rows lie `stride` rows apart.
inline CUtensorMap tensor_map(const void* address, CUtensorMapDataType type, int element, int64_t rows, int box, int stride = 1) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), "cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const cuuint64_t extent[2] = {128, cuuint64_t(rows)}, pitch[1] = {cuuint64_t(stride) * 128 * element};
  const cuuint32_t shape[2] = {cuuint32_t(128 / element), cuuint32_t(box)}, step[2] = {1, 1};
  CUtensorMap map;
  const CUresult status = encode(&map, type, 2, const_cast<void*>(address), extent, pitch, shape, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) TVM_FFI_THROW(RuntimeError) << "cuTensorMapEncodeTiled: CUDA driver error " << int(status);
  return map;
}

}  // namespace
}  // namespace misa
