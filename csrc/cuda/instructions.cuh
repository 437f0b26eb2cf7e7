// Instructions without a name in CUDA C++. tests/ops/emulated_cuda implements them for a CPU.
#pragma once

namespace dpk {

// 1 / v and 1 / sqrt(v) to some 20 bits; the low word is 0.
__device__ __forceinline__ double reciprocal_seed(double v) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(v));
  return y;
}

__device__ __forceinline__ double root_seed(double v) {
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(v));
  return y;
}

// The same in float, to a unit or two in the last place.
__device__ __forceinline__ float reciprocal_seed(float v) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

__device__ __forceinline__ float root_seed(float v) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

}  // namespace dpk
