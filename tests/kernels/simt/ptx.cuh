// Hopper's building blocks on a CPU: barriers, copies that land at once or late, and a thread's part of a matrix product.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

namespace sm90 {

// "Shared memory" is the library's static memory, addressed from here.
alignas(1024) inline char origin;
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
inline void land_one() {
  if (simt::copies.empty()) return;
  std::swap(simt::copies[simt::order() % simt::copies.size()], simt::copies.back());
  const simt::Copy copy = std::move(simt::copies.back());
  simt::copies.pop_back();
  copy(), simt::moved = true;
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (barriers.at(barrier).phase == parity) land_one(), simt::yield();
}
// A copy whose bytes a barrier counts.
template <class Move>
void counted(uint32_t barrier, int64_t bytes, const Move& move) {
  simt::copies.push_back([=] {
    move();
    Barrier& b = barriers.at(barrier);
    b.bytes -= bytes;
    b.settle();
  });
  if (simt::order() % 2) land_one();
}
inline void copy_run(uint32_t to, const void* global, uint32_t bytes, uint32_t barrier) {
  misused |= bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16 || reinterpret_cast<uintptr_t>(smem(to)) % 16;
  counted(barrier, bytes, [=] { std::memcpy(smem(to), global, bytes); });
}
inline void copy_run_once(uint32_t to, const void* global, uint32_t bytes, uint32_t barrier) { copy_run(to, global, bytes, barrier); }
inline void discard(const void* line) {
  misused |= reinterpret_cast<uintptr_t>(line) % 128;
  std::memset(const_cast<void*>(line), 0xA5, 128);
}
inline int thread() { return threadIdx.x; }
template <int THREADS>
void barrier_of() { simt::barrier(0).wait(THREADS); }
inline void named_arrive(int id, int threads) { simt::barrier(id).arrive(threads); }
inline void named_barrier(int id, int threads) { simt::barrier(id).wait(threads); }

inline void barrier_arrive(uint32_t barrier) {
  Barrier& b = barriers.at(barrier);
  --b.missing;
  b.settle();
}
inline auto& own_copies() { return simt::fibers[simt::current].groups; }
inline void copy_own(uint32_t to, const void* global, int bytes, bool valid) {
  const simt::Copy copy = [=] {
    if (valid) std::memcpy(smem(to), global, bytes);
    else std::memset(smem(to), 0, bytes);
  };
  if (simt::order() % 2) copy();
  else own_copies().back().push_back(copy);
}
inline void copy4(uint32_t to, const void* global, bool valid) { copy_own(to, global, 4, valid); }
inline void copy16(uint32_t to, const void* global, bool valid) {
  misused |= reinterpret_cast<uintptr_t>(global) % 16 || reinterpret_cast<uintptr_t>(smem(to)) % 16;
  copy_own(to, global, 16, valid);
}
inline void copies_commit() { own_copies().emplace_back(); }
template <int PENDING>
void copies_wait() {
  auto& groups = own_copies();
  for (; groups.size() > PENDING + 1; groups.erase(groups.begin()))
    for (const auto& copy : groups.front()) copy();
}
inline void barrier_arrive_copies(uint32_t barrier) {
  simt::copies.push_back([=, groups = std::move(own_copies())] {
    for (const auto& group : groups)
      for (const auto& copy : group) copy();
    barrier_arrive(barrier);
  });
  own_copies().assign(1, {});
}
inline uint2 load8(uint32_t from) {
  uint2 v;
  std::memcpy(&v, smem(from), 8);
  return v;
}
inline void store8(uint32_t to, uint2 v) { std::memcpy(smem(to), &v, 8); }
template <class T>
void store_if(bool wanted, T* to, T value) {
  if (wanted) *to = value;
}
inline void append_above(uint32_t& low, uint32_t high, float score, float threshold, int key) {
  if (!(score > threshold)) return;
  *reinterpret_cast<uint2*>(uint64_t(high) << 32 | low) = {__float_as_uint(score), uint32_t(key)};
  low += 8;
}
template <uint32_t STEP>
void stage_above(uint32_t& to, float score, float threshold, int key) {
  if (!(score > threshold)) return;
  store8(to, {__float_as_uint(score), uint32_t(key)});
  to += STEP;
}

// The 128-byte swizzle: 16-byte pieces change places within every eight rows.
inline char* swizzled(char* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<char*>(at ^ (at >> 7 & 7) << 4);
}
inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  counted(barrier, map->box * 128, [=, map = *map] {
    for (int row = 0; row < map.box; ++row)
      for (int piece = 0; piece < 128; piece += 16) {
        char* at = swizzled(smem(to) + row * 128 + piece);
        if (y + row < map.rows) std::memcpy(at, map.address + (y + row) * map.pitch + x * map.element + piece, 16);
        else std::memset(at, 0, 16);
      }
  });
}

inline uint64_t tile_descriptor(uint32_t address) { return address >> 4; }
inline float e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const float size = exponent ? std::ldexp(1.f + fraction / 8.f, exponent - 7) : std::ldexp(fraction / 8.f, -6);
  return bits & 127 ? (bits >> 7 ? -size : size) : 0.f;
}
inline const std::vector<float> E4M3 = [] {
  std::vector<float> values;
  for (int bits = 0; bits < 256; ++bits) values.push_back(e4m3(bits));
  return values;
}();
inline float2 of_e4m3(uint16_t pair) { return {E4M3[pair & 255], E4M3[pair >> 8]}; }
// The nearest of the finite numbers; of two, the even one.
inline uint8_t to_e4m3(float x) {
  if (x != x) return 127;
  int best = 0;
  const auto off = [&](int bits) { return std::abs(double(E4M3[bits]) - std::abs(double(x))); };
  for (int bits = 1; bits < 127; ++bits)
    if (off(bits) < off(best) || (off(bits) == off(best) && bits % 2 == 0)) best = bits;
  return best | (std::signbit(x) ? 128 : 0);
}
inline uint16_t to_e4m3(float2 pair) { return to_e4m3(pair.x) | to_e4m3(pair.y) << 8; }
inline uint32_t no_nan(uint32_t four) {
  const uint32_t nan = ((four & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u;
  return four & ~((nan >> 7) * 0xFFu);
}
inline float of_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
inline uint32_t to_bf16(float2 pair) {  // of numbers that bf16 has
  return __float_as_uint(pair.x) >> 16 | (__float_as_uint(pair.y) & 0xFFFF0000u);
}
inline void line(float (&values)[32], uint64_t tile, int row) {  // 32 bytes of a row
  char* from = smem(uint32_t(tile << 4)) + row * 128;
  for (int i = 0; i < 32; ++i) values[i] = E4M3[uint8_t(*swizzled(from + i))];
}
// A thread's part of a product of 64 rows × N columns over 32 dimensions, of which it has its own two rows.
template <int COUNT>
void multiply(float (&d)[COUNT], const float (&rows)[2][32], uint64_t b) {
  float column[32];
  for (int n = 0; n < COUNT / 4; ++n)
    for (int bit = 0; bit < 2; ++bit) {
      line(column, b, n * 8 + threadIdx.x % 4 * 2 + bit);
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 32; ++i) d[n * 4 + half * 2 + bit] += rows[half][i] * column[i];
    }
}
template <int COUNT>
void mma_add(float (&d)[COUNT], uint64_t a, uint64_t b) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  float rows[2][32];
  for (int half = 0; half < 2; ++half) line(rows[half], a, row + half * 8);
  multiply(d, rows, b);
}
template <int COUNT>
void mma(float (&d)[COUNT], uint64_t a, uint64_t b) {
  std::fill(d, d + COUNT, 0.f);
  mma_add(d, a, b);
}
// The same, with a quad's four words of each of its two rows in registers.
template <int COUNT>
void mma_registers_add(float (&d)[COUNT], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  const int quad = threadIdx.x % 32 / 4;
  float rows[2][32];
  simt::together(uint4{a0, a1, a2, a3}, [&](auto& all, int) {
    for (int i = 0; i < 32; ++i) {
      const uint4 words = all[quad * 4 + i % 16 / 4];
      rows[0][i] = E4M3[(i < 16 ? words.x : words.z) >> i % 4 * 8 & 255];
      rows[1][i] = E4M3[(i < 16 ? words.y : words.w) >> i % 4 * 8 & 255];
    }
    return 0;
  });
  multiply(d, rows, b);
}
template <int COUNT>
void mma_registers(float (&d)[COUNT], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  std::fill(d, d + COUNT, 0.f);
  mma_registers_add(d, a0, a1, a2, a3, b);
}
// d (64 × N) += a (64 × 16, bf16, two numbers a register) · b (N × 16, bf16)ᵀ
template <int COUNT>
void mma_bf16(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const int quad = threadIdx.x % 32 / 4;
  if (!accumulate) std::fill(d, d + COUNT, 0.f);
  float rows[2][16];
  simt::together(uint4{a[0], a[1], a[2], a[3]}, [&](auto& all, int) {
    for (int i = 0; i < 16; ++i) {
      const uint4 words = all[quad * 4 + i % 8 / 2];
      rows[0][i] = of_bf16((i < 8 ? words.x : words.z) >> i % 2 * 16 & 0xFFFF);
      rows[1][i] = of_bf16((i < 8 ? words.y : words.w) >> i % 2 * 16 & 0xFFFF);
    }
    return 0;
  });
  for (int n = 0; n < COUNT / 4; ++n)
    for (int bit = 0; bit < 2; ++bit) {
      char* from = smem(uint32_t(b << 4)) + (n * 8 + threadIdx.x % 4 * 2 + bit) * 128;
      for (int i = 0; i < 16; ++i) {
        uint16_t number;
        std::memcpy(&number, swizzled(from + i * 2), 2);
        for (int half = 0; half < 2; ++half) d[n * 4 + half * 2 + bit] += rows[half][i] * of_bf16(number);
      }
    }
}
inline uint32_t moved(uint32_t word, uint32_t) { return word; }
inline uint64_t evict_last() { return 0; }
inline uint4 load_through(const void* global, uint64_t) { return *static_cast<const uint4*>(global); }
inline float4 load16(uint32_t from) {
  float4 v;
  std::memcpy(&v, smem(from), 16);
  return v;
}
inline void fence_async_shared() {}
inline void mma_fence() {}
inline void mma_commit() {}
template <int>
void mma_wait() {}
template <class D>
void pin(D&) {}
template <int>
void fewer_registers() {}
template <int>
void more_registers() {}

inline void launch_wait() { simt::launch_wait(); }
inline void launch_next() {}

}  // namespace sm90
