// The shared memory of a cluster's blocks on a CPU.
#pragma once
#include <cuda_runtime.h>

namespace sm90 {

constexpr int BLOCKS_AT_MOST = 8;
inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_sync() {
  static simt::Meeting all;
  all.wait(simt::cluster * blockDim.x);
}
template <class T>
T& shared_of(int rank) {
  static T blocks[BLOCKS_AT_MOST];
  return blocks[rank];
}
template <class T>
T& shared() { return shared_of<T>(cluster_rank()); }

}  // namespace sm90
