// The residual of a row, as route.cu makes it and the scorers read it.
#pragma once
#include <cstdint>

namespace misa {

// What stands for the heads that are not routed: one more query, with neither ReLU nor gate.
struct Residual {
  const uint8_t* query;  // [T, 128] e4m3
  const float* scale;    // [T]
};

}  // namespace misa
