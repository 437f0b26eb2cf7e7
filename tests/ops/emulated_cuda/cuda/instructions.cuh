// csrc/cuda/instructions.cuh for a CPU. Seeds are off by a unit of their last place to either side, as drawn,
// for what follows from them must not depend on which approximation a GPU makes; each thread draws its own.
#pragma once

#include "cuda_runtime.h"

namespace dpk {

inline thread_local uint32_t jitter_state;
inline int jitter() {
  jitter_state = jitter_state * 1664525u + 1013904223u;
  return static_cast<int>((jitter_state >> 16) % 3) - 1;
}

// The upper word of a double is what its seed has.
inline double near(double v) { return __hiloint2double(__double2hiint(v) + jitter(), 0); }
inline double reciprocal_seed(double v) { return near(1.0 / v); }
inline double root_seed(double v) { return near(1.0 / std::sqrt(v)); }

// Subnormal numbers count as 0.
inline float near(float v) {
  return std::isfinite(v) && v != 0 ? same_bits<float>(__float_as_uint(v) + static_cast<uint32_t>(jitter()))
                                    : v;
}
inline float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline float reciprocal_seed(float v) { return near(1.0f / flushed(v)); }
// Not off: with some seeds a unit off, five roots of 50 million round wrongly. bench.gpu.optim tries all on a
// GPU.
inline float root_seed(float v) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(flushed(v))));
}

}  // namespace dpk
