// The host's side of a launch that may begin while the one before it drains (programmatic dependent launch), maybe in clusters of blocks,
// maybe with dynamic shared memory.
#pragma once
#include "host.cuh"

namespace misa {
namespace {

// ---- host

template <class Arguments>
void launch_behind(const char* name, void (*kernel)(Arguments), int blocks, int threads, cudaStream_t stream, const Arguments& arguments,
                   int cluster = 1, int bytes = 0) {
  if (bytes) allow_shared(kernel, bytes);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, arguments), name);
}

// Clusters of a kernel that run at once.
template <class Kernel>
int resident_clusters(Kernel kernel, int cluster, int threads, int bytes) {
  allow_shared(kernel, bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return clusters;
}

}  // namespace
}  // namespace misa
