// The shared memory of a cluster's blocks on a CPU.
#pragma once
#include "ptx.cuh"

namespace sm90 {

constexpr int BLOCKS_AT_MOST = 8;
inline int cluster_rank() { return simt::cluster_rank(); }
inline int cluster_blocks() { return simt::cluster; }
inline simt::Meeting all_blocks;
inline std::map<int, long> entered;  // the round that each thread has arrived for
inline void cluster_arrive() {
  entered[simt::current] = all_blocks.rounds;
  all_blocks.arrive(simt::cluster * blockDim.x);
}
inline void cluster_wait() {
  while (all_blocks.rounds == entered[simt::current]) simt::yield();
}
inline void cluster_sync() { all_blocks.wait(simt::cluster * blockDim.x); }
inline void send(float* to, float2 two, uint64_t* barrier) {
  counted(smem_address(barrier), sizeof two, [=] { to[0] = two.x, to[1] = two.y; });
}
template <class T>
T& shared_of(int rank) {
  static T blocks[BLOCKS_AT_MOST];
  return blocks[rank];
}
template <class T>
T& shared() { return shared_of<T>(cluster_rank()); }

}  // namespace sm90
