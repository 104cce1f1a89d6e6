// Nothing is launched from here.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace misa {

using Numbers = std::vector<int64_t>;

template <class T>
T* pointer(int64_t address) { return reinterpret_cast<T*>(address); }

}  // namespace misa
