// Enough of CUDA to run the kernels of csrc/cuda on a CPU, a warp at a time, its 32 lanes as threads: what
// they compute and where they write is tested without a GPU. Time, memory order and registers are not.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <barrier>
#include <cmath>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__
#define __launch_bounds__(threads)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

struct Index {
  unsigned int x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

inline std::barrier<>* warp;
inline void __syncwarp() { warp->arrive_and_wait(); }

using std::max;
using std::min;

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __double2hiint(double v) { return static_cast<int>(same_bits<int64_t>(v) >> 32); }
inline int __double2loint(double v) { return static_cast<int>(same_bits<int64_t>(v)); }
inline double __hiloint2double(int high, int low) {
  return same_bits<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                           static_cast<uint32_t>(low));
}
inline uint32_t __float_as_uint(float v) { return same_bits<uint32_t>(v); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
