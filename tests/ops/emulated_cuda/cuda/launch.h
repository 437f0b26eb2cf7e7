// csrc/cuda/launch.h for a CPU: one warp after the other.
#pragma once

#include <thread>
#include <vector>

#include "common/status.h"
#include "cuda/instructions.cuh"

namespace dpk {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            const Arguments&... arguments) {
  blockDim.x = static_cast<unsigned int>(threads), gridDim.x = static_cast<unsigned int>(blocks);
  for (unsigned int block = 0; block < gridDim.x; ++block)
    for (unsigned int first = 0; first < blockDim.x; first += 32) {
      const unsigned int lanes = std::min(32u, blockDim.x - first);
      std::barrier<> together(lanes);
      warp = &together;
      std::vector<std::thread> pool;
      for (unsigned int lane = 0; lane < lanes; ++lane)
        pool.emplace_back([&, lane] {
          blockIdx.x = block, threadIdx.x = first + lane, jitter_state = block * blockDim.x + first + lane;
          kernel(arguments...);
        });
      for (std::thread& each : pool) each.join();
    }
}

inline void check_launch(const char*, int64_t, const char*) {}

}  // namespace dpk
