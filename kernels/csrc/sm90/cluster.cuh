// Thread blocks of a cluster, which run at once and can read and write each other's shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sm90 {

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// What all threads of the cluster wrote before is there for all of them afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A block's own T in shared memory, and that of another block of the cluster.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ T own;
  return own;
}
template <class T>
__device__ __forceinline__ T& shared_of(int rank) {
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(&shared<T>()), "r"(rank));
  return *other;
}

}  // namespace sm90
