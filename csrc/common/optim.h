// The fused step of one entry, in host and device code: noise, division, and the optimizer's update.
//
// As in chacha20.h, no multiplication is fused with an addition in the files that include this, and every
// operation is correctly rounded: a CPU and a GPU compute the same bits.
#pragma once

#include <math.h>

#include "common/chacha20.h"
#include "dpkernels.h"

namespace dpk {

// Entries of one ChaCha20 block of rounding bits, 16 to an entry.
constexpr int kRoundingsPerBlock = 32;

// gradient = round(sum / grid + z scale / grid) grid / divisor. `grid` is a power of two, so that dividing by
// it and multiplying with it are exact; without a grid nothing is rounded, and it stands for 1.
struct NoisePlan {
  double sum_factor;    // 1 / grid
  double noise_factor;  // scale / grid
  double back;          // grid / divisor
  bool draws, rounds;
};

struct AdamPlan {
  float decay;         // of the parameter, 1 - lr weight_decay, or 1
  float coupled;       // weight_decay where it enters the gradient, or 0
  float keep1, take1;  // beta1, 1 - beta1
  float keep2, take2;  // beta2, 1 - beta2
  float root;          // 1 / sqrt(1 - beta2^step)
  float eps;
  float size;  // lr / (1 - beta1^step)
  float sign;  // -1 to ascend
};

struct SgdPlan {
  float coupled;     // weight_decay
  float keep, take;  // momentum, 1 - dampening (1 where the buffer holds nothing yet)
  float size;        // lr
  float ahead;       // momentum, where nesterov looks ahead
  float sign;        // -1 to ascend
  bool buffered, nesterov;
  bool fresh;  // the buffer holds nothing yet, and what it holds is not read: 0 times infinity is not 0
};

// To the nearest integer, ties to even, in (2^52 and beyond: every double is one).
DPK_SHARED double round_half_even(double v) {
#if defined(__SSE4_1__) || defined(__aarch64__) || defined(__CUDA_ARCH__)
  return rint(v);
#else
  const double magic = copysign(0x1p52, v);
  // the sign of a zero is that of v, as rint has it
  return fabs(v) < 0x1p52 ? copysign((v + magic) - magic, v) : v;
#endif
}

DPK_SHARED double noised(double sum, double z, const NoisePlan& plan) {
  double total = sum * plan.sum_factor;
  if (plan.draws) total += z * plan.noise_factor;
  if (plan.rounds) total = round_half_even(total);
  return total * plan.back;
}

DPK_SHARED float noised_gradient(double sum, double z, const NoisePlan& plan) {
  return static_cast<float>(noised(sum, z, plan));
}

// The moments after this gradient; returns the parameter, decayed. kCouples: weight decay enters the
// gradient. A constant, as 0 times an infinite parameter is not 0.
template <bool kCouples>
DPK_SHARED float adam_moments(float gradient, float parameter, float* first, float* second,
                              const AdamPlan& plan) {
  gradient = plan.sign * gradient;
  if (kCouples) gradient = gradient + plan.coupled * parameter;
  *first = plan.keep1 * *first + plan.take1 * gradient;
  *second = plan.keep2 * *second + (plan.take2 * gradient) * gradient;
  return parameter * plan.decay;
}

DPK_SHARED float adam_step(float parameter, float first, float second, const AdamPlan& plan) {
  const float denominator = sqrtf(second) * plan.root + plan.eps;
  return parameter - plan.size * (first / denominator);
}

template <bool kCouples>
DPK_SHARED float adam_update(float gradient, float parameter, float* first, float* second,
                             const AdamPlan& plan) {
  parameter = adam_moments<kCouples>(gradient, parameter, first, second, plan);
  return adam_step(parameter, *first, *second, plan);
}

template <bool kCouples, bool kBuffered>
DPK_SHARED float sgd_update(float gradient, float parameter, float* buffer, const SgdPlan& plan) {
  gradient = plan.sign * gradient;
  if (kCouples) gradient = gradient + plan.coupled * parameter;
  if (kBuffered) {
    const float kept = plan.fresh ? 0.0f : plan.keep * *buffer;
    *buffer = kept + plan.take * gradient;
    gradient = plan.nesterov ? gradient + plan.ahead * *buffer : *buffer;
  }
  return parameter - plan.size * gradient;
}

DPK_SHARED uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DPK_SHARED float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DPK_SHARED float from_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// To the nearest bfloat16, ties to even; a NaN stays one.
DPK_SHARED uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// To one of the two neighbouring bfloat16, up with the probability that makes the expectation exact: `random`
// has 16 uniform bits. NaN and infinity stay what they are.
DPK_SHARED uint16_t to_bf16_stochastic(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  const bool special = (bits & 0x7f800000u) == 0x7f800000u;
  return special ? to_bf16(value) : static_cast<uint16_t>((bits + random) >> 16);
}

}  // namespace dpk
