// The host's side of a launch that may begin while the one before it drains (programmatic dependent launch).
#pragma once
#include "host.cuh"

namespace misa {

// ---- host

template <class Arguments>
void launch_behind(const char* name, void (*kernel)(Arguments), int blocks, int threads, cudaStream_t stream, const Arguments& arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments), name);
}

}  // namespace misa
