// Matrix products of one warp, and the loads that feed them.
//
// In all of them lane 4·r + c holds d[0], d[1] of row r and d[2], d[3] of row r + 8, at columns 2·c and 2·c + 1.
#pragma once
#include "ptx.cuh"

namespace sm90 {

// d (16 × 8, fp32) += a (16 × 32, e4m3) · b (8 × 32, e4m3)ᵀ. Bytes 4·c … 4·c + 3 of row r are a[0], of row r + 8 a[1], both 16 bytes on
// a[2] and a[3]; of column r they are b[0], and 16 bytes on b[1].
__device__ __forceinline__ void mma_fp8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of bf16 with 16 dimensions: two numbers at 2·c and 2·c + 1, and 8 dimensions on.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four e4m3 numbers as bf16, which holds them exactly.
__device__ __forceinline__ uint2 bf16_of_e4m3(uint32_t four) {
  uint2 pairs;
  asm("{\n"
      ".reg .b16 low, high, h0, h1, h2, h3;\n"
      ".reg .b32 halves;\n"
      ".reg .f32 f0, f1, f2, f3;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 halves, low;\n"
      "mov.b32 {h0, h1}, halves;\n"
      "cvt.rn.f16x2.e4m3x2 halves, high;\n"
      "mov.b32 {h2, h3}, halves;\n"
      "cvt.f32.f16 f0, h0;\n"
      "cvt.f32.f16 f1, h1;\n"
      "cvt.f32.f16 f2, h2;\n"
      "cvt.f32.f16 f3, h3;\n"
      "cvt.rn.bf16x2.f32 %0, f1, f0;\n"
      "cvt.rn.bf16x2.f32 %1, f3, f2;\n"
      "}\n"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(four));
  return pairs;
}

// The larger one, NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
  return v;
}

}  // namespace sm90
