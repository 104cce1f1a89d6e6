// The shape that a module is built for. `build` defines what its source needs; without that it does not compile.
// A module is one .cu file with all that it includes. Nothing of it is seen outside but what it exports: processes load many.
#pragma once

namespace misa {
namespace {

#ifdef MISA_INDEX_HEADS
constexpr int INDEX_HEADS = MISA_INDEX_HEADS;  // H of the model: 32 or 64
#endif
#ifdef MISA_COLUMNS
constexpr int COLUMNS = MISA_COLUMNS;  // that score a row: its routed heads, and their residual if there is one; 4, 8, 16, 32 or 64
#endif
#ifdef MISA_RESIDUAL
constexpr bool RESIDUAL = MISA_RESIDUAL;  // whether the last column stands for the heads that are not routed
#endif
#ifdef MISA_SKETCH_BITS
constexpr int SKETCH_BITS = MISA_SKETCH_BITS;  // of a coordinate: 1 or 2
#endif

}  // namespace
}  // namespace misa
