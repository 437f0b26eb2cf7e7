// The fused noise-and-optimizer step, CPU and CUDA: it adds noise, divides, updates the parameters and clears
// the sums, and reads and writes each buffer once.
//
// For entry j of a tensor, with z_j the normals of dpk_cpu_chacha20_normal for (key, nonce) from
// counter 0 on:
//
//     gradient_j  = round((sum_j + noise_scale z_j) / grid) grid / divisor      in float64, then float32
//     (first_j, second_j, parameter_j) = the optimizer's update, in float32
//     sum_j       = 0
//
// With noise_scale == 0 nothing is drawn, with grid == 0 nothing is rounded to it. The bits are the same for
// every thread count, instruction set and device.
#ifndef DPK_OPTIM_KERNELS_H
#define DPK_OPTIM_KERNELS_H

#include "dpk_types.h"

#ifdef __cplusplus
extern "C" {
#endif

// One parameter. All dense; no buffer may overlap another.
typedef struct {
  void* parameter;
  double* sum;
  float* first;    // exp_avg, or SGD's momentum buffer; NULL for SGD without momentum
  float* second;   // exp_avg_sq; NULL for SGD
  void* gradient;  // NULL, or receives the gradient, in the parameter's type
  int64_t count;
  double step;  // Adam: the number of this step, from 1 on. SGD: 1 where `first` holds nothing yet, else more
  dpk_dtype dtype;  // of the parameter: F32, or BF16 (computed in float32, rounded when written)
  uint8_t nonce[12];
  uint8_t rounding_nonce[12];  // read where stochastic_rounding is set and dtype is BF16
} dpk_optim_tensor;

typedef struct {
  const uint8_t* key;  // 32 bytes
  double noise_scale;  // standard deviation on the sum; 0: none
  double grid;         // a power of two, or 0
  double divisor;
  int32_t maximize;  // nonzero: ascend
  int32_t
      stochastic_rounding;  // nonzero: a BF16 parameter is rounded at random, by 16 bits of the stream (key,
                            // rounding_nonce) an entry, so that its expectation is the float32 result
} dpk_noise;

typedef struct {
  double lr, beta1, beta2, eps, weight_decay;
  int32_t
      decoupled;  // nonzero: AdamW, the parameter decays; 0: Adam, weight_decay times it joins the gradient
} dpk_adam;

typedef struct {
  double lr, momentum, dampening, weight_decay;
  int32_t nesterov;
} dpk_sgd;

DPK_API dpk_status dpk_cpu_noise_adamw(const dpk_optim_tensor* tensors, int64_t tensor_count,
                                       const dpk_noise* noise, const dpk_adam* adam, int32_t threads);
DPK_API dpk_status dpk_cpu_noise_sgd(const dpk_optim_tensor* tensors, int64_t tensor_count,
                                     const dpk_noise* noise, const dpk_sgd* sgd, int32_t threads);

// `tensors`, `noise` and the options are host memory, read before the call returns; what they point to is
// device memory.
DPK_API dpk_status dpk_cuda_noise_adamw(const dpk_optim_tensor* tensors, int64_t tensor_count,
                                        const dpk_noise* noise, const dpk_adam* adam, void* stream);
DPK_API dpk_status dpk_cuda_noise_sgd(const dpk_optim_tensor* tensors, int64_t tensor_count,
                                      const dpk_noise* noise, const dpk_sgd* sgd, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // DPK_OPTIM_KERNELS_H
