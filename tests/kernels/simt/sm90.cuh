// Hopper's building blocks as far as a CPU has them: named barriers, and bulk copies that complete an mbarrier.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

namespace sm90 {

// "Shared memory" is the library's static memory, addressed from here.
inline char origin;
inline uint32_t smem_address(const void* p) { return uint32_t(static_cast<const char*>(p) - &origin); }
inline char* smem(uint32_t address) { return &origin + int32_t(address); }

struct Barrier {
  int threads, missing;
  int64_t bytes = 0;
  uint32_t phase = 0;
  void settle() {
    if (missing == 0 && bytes == 0) missing = threads, phase ^= 1, simt::moved = true;
  }
};
inline std::map<uint32_t, Barrier> barriers;
inline bool misused;  // a copy that hardware refuses

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { barriers[barrier] = {int(arrivals), int(arrivals)}; }
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  Barrier& b = barriers.at(barrier);
  b.bytes += bytes, --b.missing;
  b.settle();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (barriers.at(barrier).phase == parity) simt::yield();
}
inline void copy_run(uint32_t to, const void* global, uint32_t bytes, uint32_t barrier) {
  misused |= bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16 || reinterpret_cast<uintptr_t>(smem(to)) % 16;
  std::memcpy(smem(to), global, bytes);
  Barrier& b = barriers.at(barrier);
  b.bytes -= bytes;
  b.settle();
}
inline int thread() { return threadIdx.x; }
template <int THREADS>
void barrier_of() { simt::barriers[0].wait(THREADS); }
inline void named_barrier(int id, int threads) { simt::barriers[id].wait(threads); }

// Named by the scorer, which needs tensor cores and is not run.
void barrier_arrive(uint32_t);
void barrier_arrive_copies(uint32_t);
void copy4(uint32_t, const void*, bool);
void copy_box(uint32_t, const CUtensorMap*, uint32_t, int, int);
uint2 load8(uint32_t);
void store8(uint32_t, uint2);
void fence_async_shared();
uint64_t tile_descriptor(uint32_t);
void mma_fence();
void mma_commit();
template <int>
void mma_wait();
template <class D>
void mma(D&, uint64_t, uint64_t);
template <class D>
void mma_add(D&, uint64_t, uint64_t);
template <class D>
void pin(D&);
template <int>
void fewer_registers();
template <int>
void more_registers();

}  // namespace sm90
