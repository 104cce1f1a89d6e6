// The host's side of a launch that may begin while the one before it drains (programmatic dependent launch), maybe in clusters of blocks.
#pragma once
#include "host.cuh"

namespace misa {
namespace {

// ---- host

// What a launch has of the GPU.
struct Grid {
  int blocks, threads;
  int bytes = 0;       // dynamic shared memory of a block
  int cluster = 1;     // blocks
  bool alone = false;  // it begins when the launch before it has ended
  bool meets = false;  // its blocks all run at once
};

template <class... Parameters, class... Arguments>
void launch_behind(const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  if (grid.bytes) allow_shared(kernel, grid.bytes);
  cudaLaunchAttribute attributes[3]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = !grid.alone;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(grid.cluster), 1, 1};
  attributes[2].id = cudaLaunchAttributeCooperative;
  attributes[2].val.cooperative = grid.meets;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 3;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// Clusters of a kernel that run at once.
template <class Kernel>
int resident_clusters(Kernel kernel, const Grid& grid) {
  allow_shared(kernel, grid.bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.cluster);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return clusters;
}

}  // namespace
}  // namespace misa
