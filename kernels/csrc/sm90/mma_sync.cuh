// Matrix products of one warp, and the loads that feed them.
//
// In all of them lane 4·r + c holds d[0], d[1] of row r and d[2], d[3] of row r + 8, at columns 2·c and 2·c + 1.
#pragma once
#include "ptx.cuh"

namespace sm90 {

// d (16 × 8, int32) = a (16 × 32, unsigned bytes) · b (8 × 32, signed bytes)ᵀ + start. Bytes 4·c … 4·c + 3 of row r are a[0], of row
// r + 8 a[1], both 16 bytes on a[2] and a[3]; of column r they are b[0], and 16 bytes on b[1]. (Hopper multiplies bytes as they are, but
// takes e4m3 from registers as two products of fp16, unpacked first.)
__device__ __forceinline__ void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&start)[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
}

// d (16 × 8, fp32) += a (16 × 16, bf16) · b (8 × 16, bf16)ᵀ: two numbers at 2·c and 2·c + 1, and 8 dimensions on.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 × 8, fp32) += a (16 × 8) · b (8 × 8)ᵀ of fp32 numbers whose last 13 bits are left out: one at c, and 4 dimensions on.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                 "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Four signed bytes as bf16, which holds them exactly.
__device__ __forceinline__ uint2 bf16_of_int8(uint32_t four) {
  const auto number = [&](int i) { return float(int8_t(four >> i * 8)); };
  const auto pair = [&](int i) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(number(i + 1)), "f"(number(i)));
    return both;
  };
  return {pair(0), pair(2)};
}

// Four bytes, the lowest first, by their numbers 0 … 7 in both words; 8 more makes eight copies of that byte's highest bit.
template <uint32_t NUMBERS>
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high) {
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "n"(NUMBERS));
  return picked;
}

// Brings a line to L2.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
  return v;
}

}  // namespace sm90
