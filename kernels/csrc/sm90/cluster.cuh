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
__device__ __forceinline__ int cluster_blocks() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return blocks;
}
// Meets all threads of the cluster in two steps, between which a thread may do other things. Barriers that were initialised and fenced
// before the first are there for all of them after the second.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// What all threads of the cluster wrote before is there for all of them afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A block's own T, which is all of its dynamic shared memory, and that of another block of the cluster.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  return *reinterpret_cast<T*>(dynamic);
}
template <class T>
__device__ __forceinline__ T& shared_of(int rank) {
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(&shared<T>()), "r"(rank));
  return *other;
}

// Stores two numbers in a block of the cluster, whose barrier there counts their bytes as a copy's.
__device__ __forceinline__ void send(float* to, float2 two, uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .u64 place, meeting;\n"
      ".reg .u32 to, barrier;\n"
      "cvta.to.shared::cluster.u64 place, %0;\n"
      "cvta.to.shared::cluster.u64 meeting, %3;\n"
      "cvt.u32.u64 to, place;\n"
      "cvt.u32.u64 barrier, meeting;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%1, %2}, [barrier];\n"
      "}\n" ::"l"(to),
      "f"(two.x), "f"(two.y), "l"(barrier)
      : "memory");
}

}  // namespace sm90
