// Nothing is launched from here.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
