// The host's side of a launch that may begin while the one before it drains (programmatic dependent launch), maybe in clusters of blocks.
#pragma once
#include "host.cuh"

namespace misa {
namespace {

// ---- host

template <class Arguments>
void launch_behind(const char* name, void (*kernel)(Arguments), int blocks, int threads, cudaStream_t stream, const Arguments& arguments,
                   int cluster = 1) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, arguments), name);
}

}  // namespace
}  // namespace misa
