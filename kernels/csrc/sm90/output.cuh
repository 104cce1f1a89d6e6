// The places of chosen keys in the caller's output.
#pragma once
#include "host.cuh"

namespace misa {
namespace {

constexpr int PAGE = 64;

// One row of the output: what stands for a chosen key is its position in the row's window, shifted by the row's offset, or its
// slot by the row's page table.
struct OutputRow {
  int32_t* out;          // [k]
  const int32_t* pages;  // of the row's positions, or null
  int offset;

  __device__ int slot(uint32_t position) const { return __ldg(pages + position / PAGE) * PAGE + position % PAGE; }
  __device__ int shifted(int position) const { return position + offset; }
  __device__ int place(int position) const { return pages ? slot(position) : shifted(position); }
};

struct Output {
  int32_t* out;               // [T, k]
  int k;
  const int32_t* page_table;  // [B, page_width] physical pages, or null
  const int32_t* row_batch;   // [T]
  int64_t page_pitch;         // between the rows of page_table
  const int32_t* offsets;     // [T] added to positions, or null

  __device__ OutputRow row(int t) const {
    int32_t* to = out + int64_t(t) * k;
    asm("" : "+l"(to));  // or the compiler multiplies anew for every key
    __builtin_assume(__isGlobal(to));
    return {to, page_table ? page_table + row_batch[t] * page_pitch : nullptr, offsets ? offsets[t] : 0};
  }
};

}  // namespace
}  // namespace misa
