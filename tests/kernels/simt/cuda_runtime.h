// CUDA's threads on a CPU, for tests of kernels that need no tensor cores: every thread of a block is a fiber, blocks run one after
// another (those of a cluster at once), and the order of threads is random but repeatable. Barriers, warp collectives and atomics are what they are on a GPU;
// launch() returns false when no thread can go on.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__ inline
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(x)

using std::max, std::min;
inline uint32_t min(uint32_t a, int b) { return std::min(a, uint32_t(b)); }

struct int2 { int x, y; };
struct float2 { float x, y; };
struct uint2 { uint32_t x, y; };
struct ushort2 { uint16_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int STACK = 1 << 16, WARP = 32;

using Copy = std::function<void()>;

// Begun by its context, and then left and taken up by _longjmp: swapcontext asks the operating system twice each time.
struct Fiber {
  ucontext_t context;
  jmp_buf left;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool begun, done;
  std::vector<std::vector<Copy>> groups;  // of its own copies; the last one is open
};
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mt19937 order{1};
inline int current;
inline bool moved;  // whether a thread has got on since the scheduler last looked
inline std::vector<Copy> copies;  // under way: they land in any order, before their block ends

inline void yield() {
  if (_setjmp(fibers[current].left) == 0) _longjmp(scheduler, 1);
}
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.left, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

struct Meeting {
  int arrived = 0;
  long rounds = 0;
  void wait(int threads) {
    const long round = rounds;
    if (++arrived == threads) arrived = 0, ++rounds, moved = true;
    while (rounds == round) yield();
  }
  void arrive(int threads) {
    if (++arrived == threads) arrived = 0, ++rounds;
    moved = true;
  }
};
inline std::map<int, Meeting> barriers;  // by number, of each block of a cluster; those of warps are negative
constexpr int BARRIERS = 16;
inline int cluster = 1;  // blocks that run at once
inline int cluster_rank() { return blockIdx.x % cluster; }
inline Meeting& barrier(int id) { return barriers[cluster_rank() * BARRIERS + id]; }

inline void run() {
  body();
  fibers[current].done = moved = true;
  yield();
}

// What the launch before writes: not there until all threads wait for it (programmatic dependent launch).
struct Late {
  const void* to;
  int64_t bytes;
  std::vector<char> written{};
  char* begin() const { return static_cast<char*>(const_cast<void*>(to)); }
};
inline std::vector<Late> late;
inline int running, waiting;  // threads at once, and those of them that wait for the launch before

inline void launch_wait() {
  if (++waiting == running) {
    for (const Late& each : late) std::copy(each.written.begin(), each.written.end(), each.begin());
    moved = true;
  }
  while (waiting < running) yield();
}

inline bool launch(int blocks, int threads, const std::function<void()>& kernel, int blocks_at_once = 1, std::vector<Late> behind = {}) {
  body = kernel, cluster = blocks_at_once, late = std::move(behind), running = cluster * threads;
  if (int(fibers.size()) < running) fibers.resize(running);
  gridDim.x = blocks, blockDim.x = threads;
  std::vector<int> turns(running);
  std::iota(turns.begin(), turns.end(), 0);
  for (int first = 0; first < blocks; first += cluster) {
    barriers.clear(), copies.clear(), waiting = 0;
    for (Late& each : late) {
      each.written.assign(each.begin(), each.begin() + each.bytes);
      std::fill_n(each.begin(), each.bytes, char(0xFF));
    }
    for (int i = 0; i < running; ++i) {
      Fiber& fiber = fibers[i];
      fiber.begun = fiber.done = false, fiber.groups.assign(1, {});
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK, fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run, 0);
    }
    for (bool any = true; any;) {
      any = moved = false;
      std::shuffle(turns.begin(), turns.end(), order);
      for (const int i : turns) {
        if (fibers[i].done) continue;
        any = true, current = i, threadIdx.x = i % threads, blockIdx.x = first + i / threads;
        resume(fibers[i]);
      }
      if (any && !moved) return false;
    }
    if (!copies.empty() || (!late.empty() && waiting < running)) return false;
  }
  return true;
}

// What all lanes of a warp hand over, to each of them.
template <class T, class Use>
auto together(T value, const Use& use) {
  static std::map<int, std::array<T, WARP>> given;
  const int warp = current / WARP, lane = current % WARP;
  std::array<T, WARP>& values = given[warp];
  values[lane] = value;
  Meeting& all = barriers[-1 - warp];
  all.wait(WARP);
  const auto result = use(values, lane);
  all.wait(WARP);
  return result;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier(0).wait(blockDim.x); }
inline void __syncwarp() { simt::barriers[-1 - simt::current / simt::WARP].wait(simt::WARP); }
inline int __syncthreads_count(int value) {
  static int count, waiting;
  if (waiting++ == 0) count = 0;
  count += value != 0;
  __syncthreads();
  const int all = count;
  waiting = 0;
  __syncthreads();
  return all;
}

template <class T>
T __shfl_sync(unsigned, T value, int from) { return simt::together(value, [&](auto& all, int) { return all[from % simt::WARP]; }); }
template <class T>
T __shfl_up_sync(unsigned, T value, int by) { return simt::together(value, [&](auto& all, int lane) { return all[lane < by ? lane : lane - by]; }); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return simt::together(value, [&](auto& all, int lane) { return all[lane ^ mask]; }); }
inline uint32_t __ballot_sync(unsigned, bool vote) {
  return simt::together(uint32_t(vote), [](auto& all, int) {
    uint32_t votes = 0;
    for (int i = 0; i < simt::WARP; ++i) votes |= all[i] << i;
    return votes;
  });
}
inline bool __any_sync(unsigned, bool vote) { return __ballot_sync(~0u, vote) != 0; }
inline uint32_t __reduce_add_sync(unsigned, uint32_t v) { return simt::together(v, [](auto& all, int) { return std::accumulate(all.begin(), all.end(), 0u); }); }
template <class T>
T __reduce_min_sync(unsigned, T v) { return simt::together(v, [](auto& all, int) { return *std::min_element(all.begin(), all.end()); }); }
template <class T>
T __reduce_max_sync(unsigned, T v) { return simt::together(v, [](auto& all, int) { return *std::max_element(all.begin(), all.end()); }); }

template <class T, class U>
T atomicAdd(T* to, U value) {
  if (simt::order() % 64 == 0) simt::moved = true, simt::yield();
  const T before = *to;
  *to += value;
  return before;
}
inline void atomicAnd(uint32_t* to, uint32_t value) { *to &= value; }
inline void atomicOr(uint32_t* to, uint32_t value) { *to |= value; }
template <class T>
void atomicMin(T* to, T value) { *to = std::min(*to, value); }
template <class T>
void atomicMax(T* to, T value) { *to = std::max(*to, value); }

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
inline int __clz(uint32_t v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(uint64_t v) { return v ? __builtin_clzll(v) : 64; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(v); }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int i) { float f; std::memcpy(&f, &i, 4); return f; }
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float normcdff(float x) { return float(std::erfc(-double(x) / std::sqrt(2.)) / 2); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { simt::yield(); }
