// Checks and plans that the CPU and CUDA entry points of the fused step share.
#pragma once

#include <cmath>

#include "common/chacha20_arguments.h"
#include "common/optim.h"
#include "optim_kernels.h"

namespace dpk {

inline void check_finite(const char* name, double value, bool fine) {
  if (!(std::isfinite(value) && fine)) invalid_argument("%s is %g; that is out of range", name, value);
}

inline NoisePlan noise_plan(const dpk_noise& noise) {
  if (noise.key == nullptr) invalid_argument("key is NULL");
  check_finite("noise_scale", noise.noise_scale, noise.noise_scale >= 0);
  check_finite("divisor", noise.divisor, noise.divisor > 0);
  int exponent = 0;
  if (noise.grid != 0 && !(std::isfinite(noise.grid) && std::frexp(noise.grid, &exponent) == 0.5))
    invalid_argument("grid is %g; give a power of two, or 0 for none", noise.grid);
  const double grid = noise.grid != 0 ? noise.grid : 1.0;
  const NoisePlan plan = {1.0 / grid, noise.noise_scale / grid, grid / noise.divisor, noise.noise_scale > 0,
                          noise.grid != 0};
  if (!std::isfinite(plan.sum_factor) || !std::isfinite(plan.noise_factor) || !(plan.back > 0))
    invalid_argument("grid is %g; its inverse, noise_scale / grid or grid / divisor is out of range", grid);
  return plan;
}

// `states`: how many of first and second the optimizer keeps.
inline void check_tensors(const dpk_optim_tensor* tensors, int64_t count, int states) {
  if (count < 0)
    invalid_argument("tensor_count is %lld; it must be 0 or more", static_cast<long long>(count));
  for (int64_t i = 0; i < count; ++i) {
    const dpk_optim_tensor& t = tensors[i];
    const long long n = i;
    if (t.count < 0) invalid_argument("tensor %lld: count is %lld", n, static_cast<long long>(t.count));
    if (t.dtype != DPK_F32 && t.dtype != DPK_BF16)
      invalid_argument("tensor %lld: dtype is %d; a parameter is F32 or BF16", n, static_cast<int>(t.dtype));
    if (t.count > 0 && (t.parameter == nullptr || t.sum == nullptr))
      invalid_argument("tensor %lld: parameter or sum is NULL", n);
    if (t.count > 0 && ((states > 0 && t.first == nullptr) || (states > 1 && t.second == nullptr)))
      invalid_argument("tensor %lld: a state of the optimizer is NULL", n);
    check_finite("step", t.step, t.step >= 1);
    check_blocks(0, normal_blocks(t.count, DPK_F64));
  }
}

inline ChaChaState stream_of(const dpk_noise& noise, const uint8_t* nonce) {
  return chacha20_state(noise.key, 0, nonce, 0);
}

inline void check_adam(const dpk_adam& adam) {
  check_finite("lr", adam.lr, true);
  check_finite("beta1", adam.beta1, adam.beta1 >= 0 && adam.beta1 < 1);
  check_finite("beta2", adam.beta2, adam.beta2 >= 0 && adam.beta2 < 1);
  check_finite("eps", adam.eps, adam.eps >= 0);
  check_finite("weight_decay", adam.weight_decay, true);
}

inline AdamPlan adam_plan(const dpk_adam& adam, const dpk_noise& noise, double step) {
  AdamPlan plan;
  plan.decay = static_cast<float>(adam.decoupled != 0 ? 1.0 - adam.lr * adam.weight_decay : 1.0);
  plan.coupled = static_cast<float>(adam.decoupled != 0 ? 0.0 : adam.weight_decay);
  plan.keep1 = static_cast<float>(adam.beta1);
  plan.take1 = static_cast<float>(1.0 - adam.beta1);
  plan.keep2 = static_cast<float>(adam.beta2);
  plan.take2 = static_cast<float>(1.0 - adam.beta2);
  plan.root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(adam.beta2, step)));
  plan.eps = static_cast<float>(adam.eps);
  plan.size = static_cast<float>(adam.lr / (1.0 - std::pow(adam.beta1, step)));
  plan.sign = noise.maximize != 0 ? -1.0f : 1.0f;
  return plan;
}

inline void check_sgd(const dpk_sgd& sgd) {
  check_finite("lr", sgd.lr, true);
  check_finite("momentum", sgd.momentum, true);
  check_finite("dampening", sgd.dampening, true);
  check_finite("weight_decay", sgd.weight_decay, true);
}

inline SgdPlan sgd_plan(const dpk_sgd& sgd, const dpk_noise& noise, double step) {
  SgdPlan plan;
  plan.fresh = step == 1;
  plan.coupled = static_cast<float>(sgd.weight_decay);
  plan.keep = static_cast<float>(sgd.momentum);
  plan.take = static_cast<float>(plan.fresh ? 1.0 : 1.0 - sgd.dampening);
  plan.size = static_cast<float>(sgd.lr);
  plan.buffered = sgd.momentum != 0;
  plan.nesterov = sgd.nesterov != 0;
  plan.sign = noise.maximize != 0 ? -1.0f : 1.0f;
  plan.ahead = static_cast<float>(sgd.momentum);
  return plan;
}

}  // namespace dpk
