// Launching a kernel, and reporting a launch that failed.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "common/status.h"

namespace dpk {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  kernel<<<static_cast<unsigned int>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

// Names the op, its size and the device.
inline void check_launch(const char* op, int64_t size, const char* unit) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  int device = -1;
  cudaGetDevice(&device);
  throw Error(DPK_CUDA_ERROR, std::string(op) + ": " + std::to_string(size) + " " + unit +
                                  " on CUDA device " + std::to_string(device) + ": " +
                                  cudaGetErrorString(error));
}

}  // namespace dpk
