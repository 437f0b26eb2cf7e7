// Norms and weighted sums of many layers in one call each, and noise on finished sums; CPU.
#ifndef DPK_GROUPED_KERNELS_H
#define DPK_GROUPED_KERNELS_H

#include "cpu_kernels.h"
#include "optim_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  DPK_LAYER_LINEAR = 0,            // x, g, out
  DPK_LAYER_BIAS = 1,              // g, out
  DPK_LAYER_LORA = 2,              // x, h, g, dh, scaling, out (A), out_b (B)
  DPK_LAYER_EMBEDDING = 3,         // ids, g, padding_idx, vocabulary, out
  DPK_LAYER_LAYER_NORM = 4,        // x (x_hat), g, out
  DPK_LAYER_DEPTHWISE_CONV1D = 5,  // x, g, kernel_size, stride, padding, dilation, out
};

// One layer; fields that its kind does not name are not read, and a norm reads no out. Meanings are those of
// the norm and the weighted sum of that name.
typedef struct {
  int32_t kind;
  dpk_dtype out_dtype;
  dpk_tensor x, h, g, dh;
  const int64_t* ids;
  int64_t padding_idx, vocabulary;
  double scaling;
  int64_t kernel_size, stride, padding, dilation;
  void* out;
  void* out_b;
} dpk_layer;

// out[i] >= the sum over layers of their squared norms, with the bits of each one's own function (a linear
// layer's by DPK_AUTO), added in float64 in the order of the layers and rounded up. Threads as below.
DPK_API dpk_status dpk_cpu_total_norm_sq(const dpk_layer* layers, int64_t layer_count, int64_t batch,
                                         int32_t threads, float* out);

// Every layer's weighted sum, with the bits of its own function. Each small layer is computed by
// one thread; each large one by all threads. No two outs may overlap.
DPK_API dpk_status dpk_cpu_weighted_sums(const dpk_layer* layers, int64_t layer_count, const double* factors,
                                         int32_t threads);

// A finished sum and its stream.
typedef struct {
  double* sum;
  int64_t count;
  uint8_t nonce[12];
} dpk_noised_sum;

// sum_j = round((sum_j + noise_scale z_j) / grid) grid / divisor in float64: the gradient of the fused step,
// before it is rounded to float32. Of `noise`, maximize and stochastic_rounding are not read.
DPK_API dpk_status dpk_cpu_noise_sums(const dpk_noised_sum* sums, int64_t sum_count, const dpk_noise* noise,
                                      int32_t threads);

#ifdef __cplusplus
}
#endif

#endif  // DPK_GROUPED_KERNELS_H
