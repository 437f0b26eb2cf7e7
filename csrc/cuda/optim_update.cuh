// The optimizer's update on the GPU, of one entry and of the eight that a lane holds.
#pragma once

#include "common/optim.h"
#include "cuda/instructions.cuh"

namespace dpk {
namespace {

constexpr int kHeld = kNormalsPerBlock;

// What a lane holds of its entries.
struct Held {
  float gradient[kHeld], parameter[kHeld], first[kHeld], second[kHeld];
};

__device__ __forceinline__ bool keeps_first(const AdamPlan&) { return true; }
__device__ __forceinline__ bool keeps_first(const SgdPlan& plan) { return plan.buffered; }
__device__ __forceinline__ bool keeps_second(const AdamPlan&) { return true; }
__device__ __forceinline__ bool keeps_second(const SgdPlan&) { return false; }

// `first` and `second` become the new ones; returns the parameter.
template <bool kCouples>
__device__ __forceinline__ float update(float gradient, float parameter, float* first, float* second,
                                        const AdamPlan& plan) {
  return adam_update<kCouples>(gradient, parameter, first, second, plan);
}

template <bool kCouples>
__device__ __forceinline__ float update(float gradient, float parameter, float* first, float*,
                                        const SgdPlan& plan) {
  return plan.buffered ? sgd_update<kCouples, true>(gradient, parameter, first, plan)
                       : sgd_update<kCouples, false>(gradient, parameter, nullptr, plan);
}

// What nvcc makes of sqrtf(v) and a / b, without the branches for what is out of its range: `within` the
// limits of short_adam_step the results are correctly rounded.
__device__ __forceinline__ float short_root(float v) {
  const float y = root_seed(v), g = v * y;
  return __fmaf_rn(__fmaf_rn(-g, g, v), 0.5f * y, g);
}

__device__ __forceinline__ float short_quotient(float a, float b) {
  float y = reciprocal_seed(b);
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  const float q = a * y;
  return __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
}

__device__ __forceinline__ bool within(float value, float least, float most) {
  const uint32_t low = __float_as_uint(least), high = __float_as_uint(most);
  return __float_as_uint(value) - low <= high - low;
}

// adam_step by these; `fine` becomes false where they do not hold.
__device__ __forceinline__ float short_adam_step(float parameter, float first, float second,
                                                 const AdamPlan& plan, bool* fine) {
  const float denominator = short_root(second) * plan.root + plan.eps;
  *fine &= within(second, 0x1p-100f, 0x1p100f) & within(denominator, 0x1p-40f, 0x1p40f) &
           within(fabsf(first), 0x1p-80f, 0x1p80f);
  return parameter - plan.size * short_quotient(first, denominator);
}

// Without branches, so that the entries are computed side by side; a lane that is not `fine` does it again.
template <bool kCouples>
__device__ __forceinline__ void update(Held& held, const AdamPlan& plan) {
  float decayed[kHeld];
  bool fine = true;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    decayed[i] =
        adam_moments<kCouples>(held.gradient[i], held.parameter[i], &held.first[i], &held.second[i], plan);
    held.parameter[i] = short_adam_step(decayed[i], held.first[i], held.second[i], plan, &fine);
  }
  if (fine) return;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    held.parameter[i] = adam_step(decayed[i], held.first[i], held.second[i], plan);
}

template <bool kCouples>
__device__ __forceinline__ void update(Held& held, const SgdPlan& plan) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    held.parameter[i] = update<kCouples>(held.gradient[i], held.parameter[i], &held.first[i], nullptr, plan);
}

}  // namespace
}  // namespace dpk
