// A warp's matrix products on a CPU.
#pragma once
#include "ptx.cuh"

namespace sm90 {

inline float bf16(uint32_t bits) { return __uint_as_float(bits << 16); }

// A lane's four sums over WIDTH dimensions; left(register, i) is the i-th number of those that a lane brings to a row, and right of
// those that it brings to a column.
template <int WIDTH, class Sum, class Left, class Right>
void multiply_warp(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Left& left, const Right& right) {
  struct Operands { uint32_t a[4], b[2]; };
  constexpr int OWN = WIDTH / 8;  // of a lane in each half of the dimensions
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  simt::together(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [&](auto& all, int) {
    for (int odd = 0; odd < 2; ++odd)
      for (int e = 0; e < 2; ++e)
        for (int half = 0; half < 2; ++half)
          for (int from = 0; from < 4; ++from)
            for (int i = 0; i < OWN; ++i)
              d[odd * 2 + e] += left(all[r * 4 + from].a[half * 2 + odd], i) * right(all[(c * 2 + e) * 4 + from].b[half], i);
    return 0;
  });
}
inline void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&start)[4]) {
  std::copy(start, start + 4, d);
  const auto code = [](uint32_t four, int i) { return int(uint8_t(four >> i * 8)); };
  const auto number = [](uint32_t four, int i) { return int(int8_t(four >> i * 8)); };
  multiply_warp<32>(d, a, b, code, number);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto number = [](uint32_t pair, int i) { return bf16(pair >> i * 16 & 0xFFFF); };
  multiply_warp<16>(d, a, b, number, number);
}
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a[i]);
  for (int i = 0; i < 2; ++i) right[i] = __float_as_uint(b[i]);
  const auto number = [](uint32_t bits, int) { return __uint_as_float(bits & ~0x1FFFu); };
  multiply_warp<8>(d, left, right, number, number);
}
inline uint2 bf16_of_int8(uint32_t four) {
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(float(int8_t(four >> i * 8))) >> 16;
  return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}
template <uint32_t NUMBERS>
uint32_t pick_bytes(uint32_t low, uint32_t high) {
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const int number = NUMBERS >> i * 4;
    const uint8_t byte = (uint64_t(high) << 32 | low) >> number % 8 * 8;
    picked |= uint32_t(uint8_t(number & 8 ? int8_t(byte) >> 7 : byte)) << i * 8;
  }
  return picked;
}
inline void prefetch(const void*) {}
inline uint4 load_once(const void* global) { return *static_cast<const uint4*>(global); }

}  // namespace sm90
