// What a prefill call brings.
#pragma once
#include <cstdint>

namespace misa {
namespace {

// What stands for the heads that are not routed: one more query, with neither ReLU nor gate.
struct ResidualColumn {
  const uint8_t* query;  // [T, 128] e4m3
  const float* scale;    // [T]
};

// Query rows, the keys of all their requests, and the window of them that each row sees.
struct Inputs {
  const uint8_t* index_q;    // [T, index_heads, 128] e4m3
  const float* head_gates;   // [T, index_heads]
  const int32_t* head_ids;   // [T, h], or null: all heads
  const uint8_t* index_k;    // [keys, 128] e4m3
  const float* k_scale;      // [keys]
  const int32_t* ks;         // [T]
  const int32_t* ke;         // [T]
  ResidualColumn residual;   // if one of the columns is one
  int rows, index_heads, keys;
};

}  // namespace
}  // namespace misa
