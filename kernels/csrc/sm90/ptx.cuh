// Hopper building blocks in plain PTX: mbarriers, the tensor copy engine, fp8 warpgroup matrix products.
#pragma once
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sm90 {

__device__ __forceinline__ uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once this thread's earlier cp.async copies have landed; the barrier's count must include the arrival.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Four bytes, or zeros where `valid` is false.
__device__ __forceinline__ void copy4(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// 16 bytes past L1, or zeros.
__device__ __forceinline__ void copy16(uint32_t smem, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies, and waits for all groups but the PENDING youngest.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint2 load8(uint32_t smem) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
  return v;
}
__device__ __forceinline__ float4 load16(uint32_t smem) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(smem) : "memory");
  return v;
}
__device__ __forceinline__ void store8(uint32_t smem, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem), "r"(v.x), "r"(v.y) : "memory");
}

// Stores to shared memory without a branch, into which the compiler would move what makes the value.
__device__ __forceinline__ void store_if(bool wanted, uint32_t* to, uint32_t value) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %0, 0;\n@wanted st.shared.b32 [%1], %2;\n}\n" ::"r"(int(wanted)),
               "r"(smem_address(to)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, uint16_t* to, uint16_t value) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %0, 0;\n@wanted st.shared.b16 [%1], %2;\n}\n" ::"r"(int(wanted)),
               "r"(smem_address(to)), "h"(value)
               : "memory");
}

// Stores (score, key) at the address of these halves if the score is above the threshold, and goes on to the next. A predicated
// store and no branch: the volatile asm keeps the compiler from making one.
__device__ __forceinline__ void append_above(uint32_t& low, uint32_t high, float score, float threshold, int key) {
  asm volatile(
      "{\n"
      ".reg .pred above;\n"
      ".reg .u64 address;\n"
      "setp.gt.f32 above, %1, %2;\n"
      "mov.b64 address, {%0, %4};\n"
      "@above st.global.v2.b32 [address], {%1, %3};\n"
      "@above add.u32 %0, %0, 8;\n"
      "}\n"
      : "+r"(low)
      : "f"(score), "f"(threshold), "r"(key), "r"(high)
      : "memory");
}

// The same in shared memory, STEP bytes on.
template <uint32_t STEP>
__device__ __forceinline__ void stage_above(uint32_t& smem, float score, float threshold, int key) {
  asm volatile(
      "{\n"
      ".reg .pred above;\n"
      "setp.gt.f32 above, %1, %2;\n"
      "@above st.shared.v2.b32 [%0], {%1, %3};\n"
      "@above add.u32 %0, %0, %4;\n"
      "}\n"
      : "+r"(smem)
      : "f"(score), "f"(threshold), "r"(key), "n"(STEP)
      : "memory");
}

// For what is read again and again while other things stream through L2.
__device__ __forceinline__ uint64_t evict_last() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes that L1 need not keep.
__device__ __forceinline__ uint4 load_through(const void* global, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global), "l"(policy));
  return v;
}

__device__ __forceinline__ void copy_box(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// `bytes` of contiguous memory; they and both addresses are multiples of 16.
__device__ __forceinline__ void copy_run(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem), "l"(global), "r"(bytes),
               "r"(barrier)
               : "memory");
}

// The same of what is read once: L2 gives it up before all else.
__device__ __forceinline__ void copy_run_once(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(smem),
               "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

// Gives up a line of 128 bytes, which nobody reads before it is written anew: L2 need not write it to memory.
__device__ __forceinline__ void discard(const void* line) { asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory"); }

// Orders this thread's ordinary shared-memory stores before later reads by the tensor cores.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// threadIdx.x, which the compiler neither keeps nor sees through.
__device__ __forceinline__ int thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// `word`, by a sum with a 0 that the compiler cannot see through.
__device__ __forceinline__ uint32_t moved(uint32_t word, uint32_t nought) {
  uint32_t sum;
  asm volatile("add.u32 %0, %1, %2;" : "=r"(sum) : "r"(word), "r"(nought));
  return sum;
}

// Two e4m3 numbers, the first in the low byte, and back; two bf16 numbers, the first in the low half. They round to nearest even.
__device__ __forceinline__ float2 of_e4m3(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return __half22float2(reinterpret_cast<const __half2&>(halves));
}
__device__ __forceinline__ uint16_t to_e4m3(float2 pair) {
  uint16_t bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(pair.y), "f"(pair.x));
  return bits;
}
__device__ __forceinline__ uint32_t to_bf16(float2 pair) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(pair.y), "f"(pair.x));
  return bits;
}

// Four e4m3 numbers with 0 in the place of NaN, whose seven low bits are all set.
__device__ __forceinline__ uint32_t no_nan(uint32_t four) {
  const uint32_t nan = ((four & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u;
  return four & ~((nan >> 7) * 0xFFu);
}

// Barrier 0, for the first THREADS threads of a block.
template <int THREADS>
__device__ __forceinline__ void barrier_of() {
  asm volatile("bar.sync 0, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Descriptor of rows of 128 bytes under the 128-byte swizzle, 8-row groups 1024 bytes apart (address 1024-aligned).
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t smem) {
  return (uint64_t(smem & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across a wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The accumulators of one product as operands of wgmma: their numbers, and their constraints.
#define SM90_NUMBERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SM90_OPERANDS_16(c) \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), \
  c(d[8]), c(d[9]), c(d[10]), c(d[11]), c(d[12]), c(d[13]), c(d[14]), c(d[15])
#define SM90_NUMBERS_20 SM90_NUMBERS_16 ", %16, %17, %18, %19"
#define SM90_OPERANDS_20(c) SM90_OPERANDS_16(c), c(d[16]), c(d[17]), c(d[18]), c(d[19])
#define SM90_NUMBERS_32 \
  SM90_NUMBERS_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SM90_OPERANDS_32(c) \
  SM90_OPERANDS_16(c), \
  c(d[16]), c(d[17]), c(d[18]), c(d[19]), c(d[20]), c(d[21]), c(d[22]), c(d[23]), \
  c(d[24]), c(d[25]), c(d[26]), c(d[27]), c(d[28]), c(d[29]), c(d[30]), c(d[31])
#define SM90_NUMBERS_36 SM90_NUMBERS_32 ", %32, %33, %34, %35"
#define SM90_OPERANDS_36(c) SM90_OPERANDS_32(c), c(d[32]), c(d[33]), c(d[34]), c(d[35])
#define SM90_NUMBERS_64 \
  SM90_NUMBERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SM90_OPERANDS_64(c) \
  SM90_OPERANDS_32(c), \
  c(d[32]), c(d[33]), c(d[34]), c(d[35]), c(d[36]), c(d[37]), c(d[38]), c(d[39]), \
  c(d[40]), c(d[41]), c(d[42]), c(d[43]), c(d[44]), c(d[45]), c(d[46]), c(d[47]), \
  c(d[48]), c(d[49]), c(d[50]), c(d[51]), c(d[52]), c(d[53]), c(d[54]), c(d[55]), \
  c(d[56]), c(d[57]), c(d[58]), c(d[59]), c(d[60]), c(d[61]), c(d[62]), c(d[63])
#define SM90_NUMBERS_128 \
  SM90_NUMBERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SM90_OPERANDS_128(c) \
  SM90_OPERANDS_64(c), \
  c(d[64]), c(d[65]), c(d[66]), c(d[67]), c(d[68]), c(d[69]), c(d[70]), c(d[71]), \
  c(d[72]), c(d[73]), c(d[74]), c(d[75]), c(d[76]), c(d[77]), c(d[78]), c(d[79]), \
  c(d[80]), c(d[81]), c(d[82]), c(d[83]), c(d[84]), c(d[85]), c(d[86]), c(d[87]), \
  c(d[88]), c(d[89]), c(d[90]), c(d[91]), c(d[92]), c(d[93]), c(d[94]), c(d[95]), \
  c(d[96]), c(d[97]), c(d[98]), c(d[99]), c(d[100]), c(d[101]), c(d[102]), c(d[103]), \
  c(d[104]), c(d[105]), c(d[106]), c(d[107]), c(d[108]), c(d[109]), c(d[110]), c(d[111]), \
  c(d[112]), c(d[113]), c(d[114]), c(d[115]), c(d[116]), c(d[117]), c(d[118]), c(d[119]), \
  c(d[120]), c(d[121]), c(d[122]), c(d[123]), c(d[124]), c(d[125]), c(d[126]), c(d[127])
#define SM90_SET(x) "=f"(x)
#define SM90_ADD(x) "+f"(x)

// One product with n accumulators a thread. `factors` is the text of a, b and what follows, numbered from n on, and the last
// arguments are what those numbers stand for; `accumulate` is the text of 0, of 1 or of a number.
#define SM90_WGMMA(n, shape, constraint, accumulate, factors, ...)                                     \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " accumulate ", 0;\n"               \
               "wgmma.mma_async.sync.aligned." shape " {" SM90_NUMBERS_##n "}, " factors ";\n}\n"      \
               : SM90_OPERANDS_##n(constraint)                                                         \
               : __VA_ARGS__)

// d (64 × N, fp32) = a (64 × 32, e4m3) · b (N × 32, e4m3)ᵀ for N = 32, 64, 128 and 256
__device__ __forceinline__ void mma(float (&d)[16], uint64_t a, uint64_t b) {
  SM90_WGMMA(16, "m64n32k32.f32.e4m3.e4m3", SM90_SET, "0", "%16, %17, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b) {
  SM90_WGMMA(32, "m64n64k32.f32.e4m3.e4m3", SM90_SET, "0", "%32, %33, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b) {
  SM90_WGMMA(64, "m64n128k32.f32.e4m3.e4m3", SM90_SET, "0", "%64, %65, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma(float (&d)[128], uint64_t a, uint64_t b) {
  SM90_WGMMA(128, "m64n256k32.f32.e4m3.e4m3", SM90_SET, "0", "%128, %129, accumulate, 1, 1", "l"(a), "l"(b));
}

// d += a · bᵀ
__device__ __forceinline__ void mma_add(float (&d)[16], uint64_t a, uint64_t b) {
  SM90_WGMMA(16, "m64n32k32.f32.e4m3.e4m3", SM90_ADD, "1", "%16, %17, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma_add(float (&d)[32], uint64_t a, uint64_t b) {
  SM90_WGMMA(32, "m64n64k32.f32.e4m3.e4m3", SM90_ADD, "1", "%32, %33, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma_add(float (&d)[64], uint64_t a, uint64_t b) {
  SM90_WGMMA(64, "m64n128k32.f32.e4m3.e4m3", SM90_ADD, "1", "%64, %65, accumulate, 1, 1", "l"(a), "l"(b));
}
__device__ __forceinline__ void mma_add(float (&d)[128], uint64_t a, uint64_t b) {
  SM90_WGMMA(128, "m64n256k32.f32.e4m3.e4m3", SM90_ADD, "1", "%128, %129, accumulate, 1, 1", "l"(a), "l"(b));
}

// d (64 × 32 or 64 × 128, fp32) = a (64 × 16, bf16, in registers) · b (32 or 128 × 16, bf16)ᵀ, plus d where `accumulate` is set.
__device__ __forceinline__ void mma_bf16(float (&d)[16], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  SM90_WGMMA(16, "m64n32k16.f32.bf16.bf16", SM90_ADD, "%21", "{%16, %17, %18, %19}, %20, accumulate, 1, 1, 0",
             "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}
__device__ __forceinline__ void mma_bf16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  SM90_WGMMA(64, "m64n128k16.f32.bf16.bf16", SM90_ADD, "%69", "{%64, %65, %66, %67}, %68, accumulate, 1, 1, 0",
             "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}

// d (64 × N, fp32) = or += a (64 × 32, e4m3, in registers) · b (N × 32, e4m3)ᵀ for N = 72, 64, 40 and 32: a thread's d are N / 2
// numbers, and its a are four bytes of rows lane/4 and lane/4 + 8 at columns 4·(lane%4), then of both at 16 columns more.
__device__ __forceinline__ void mma_registers(float (&d)[36], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(36, "m64n72k32.f32.e4m3.e4m3", SM90_SET, "0", "{%36, %37, %38, %39}, %40, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(32, "m64n64k32.f32.e4m3.e4m3", SM90_SET, "0", "{%32, %33, %34, %35}, %36, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers(float (&d)[20], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(20, "m64n40k32.f32.e4m3.e4m3", SM90_SET, "0", "{%20, %21, %22, %23}, %24, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers(float (&d)[16], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(16, "m64n32k32.f32.e4m3.e4m3", SM90_SET, "0", "{%16, %17, %18, %19}, %20, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers_add(float (&d)[36], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(36, "m64n72k32.f32.e4m3.e4m3", SM90_ADD, "1", "{%36, %37, %38, %39}, %40, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers_add(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(32, "m64n64k32.f32.e4m3.e4m3", SM90_ADD, "1", "{%32, %33, %34, %35}, %36, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers_add(float (&d)[20], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(20, "m64n40k32.f32.e4m3.e4m3", SM90_ADD, "1", "{%20, %21, %22, %23}, %24, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void mma_registers_add(float (&d)[16], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
  SM90_WGMMA(16, "m64n32k32.f32.e4m3.e4m3", SM90_ADD, "1", "{%16, %17, %18, %19}, %20, accumulate, 1, 1",
             "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// Programmatic dependent launch: what the launch before this one wrote may be read, and the launch behind it may begin.
__device__ __forceinline__ void launch_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace sm90
