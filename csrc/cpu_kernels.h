// CPU kernels of the C ABI: per-sample gradient norms, clip factors and weighted sums (math.md's table of
// layers).
//
// Conventions
//   - A tensor is a `dpk_tensor`: data, up to three sizes, strides in elements (any, also 0 or negative),
//   element type F32, F64, F16 or
//     BF16. Sizes may be 0. Float64 inputs are computed in float64; all others in float32 per sample and
//     float64 across samples.
//   - x [B,T,d] is a layer's input, g [B,T,p] the gradient at its output. `lengths` [B] or NULL (all T): of
//   sample i only frames
//     t < lengths[i] are read, and 0 <= lengths[i] <= T.
//   - `threads` >= 1. Results have the same bits for every thread count, and a sample's norm has the same
//   bits in every batch.
//   - Every norm: out[i] is a float32 not below the exact square of sample i's gradient norm, nor below the
//   square of what the weighted sum
//     of this library adds for that sample, divided by its factor (csrc/cpu/bounds.h). A NaN or infinity
//     among what is read makes it NaN or infinity, never finite.
//   - Every weighted sum: `out`, dense, F64 or F32, is added to. factors[i] == 0 means that sample i is not
//   read. Each sample's sum is
//     materialised in float32 in an order of its own and added in float64; an F32 `out` is rounded when it is
//     written.
//   - Each function returns DPK_OK or a status whose message dpk_last_error() holds.
#ifndef DPK_CPU_KERNELS_H
#define DPK_CPU_KERNELS_H

#include "dpk_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const void* data;
  int64_t size[3];
  int64_t stride[3];  // in elements
  dpk_dtype dtype;
} dpk_tensor;

enum {
  DPK_AUTO = 0,  // half-Gram where it needs fewer operations for the sample's own length, else direct
  DPK_GRAM = 1,  // half-Gram; a sample for which its rounding bound is loose (> 1 % of the square) is redone
                 // by direct
  DPK_DIRECT = 2,  // tiles of g_i^T x_i
};

// out[i] >= ||g_i^T x_i||^2, x [B,T,d], g [B,T,p].
DPK_API dpk_status dpk_cpu_linear_norm_sq(const dpk_tensor* x, const dpk_tensor* g, const int64_t* lengths,
                                          int32_t method, int32_t threads, float* out);

// out[i] >= ||sum_t g_it||^2.
DPK_API dpk_status dpk_cpu_bias_norm_sq(const dpk_tensor* g, const int64_t* lengths, int32_t threads,
                                        float* out);

// out_a[i] >= ||dh_i^T x_i||^2 (dh holds the scaling), out_b[i] >= scaling^2 ||g_i^T h_i||^2; x [B,T,d], h
// [B,T,r], g [B,T,p], dh [B,T,r].
DPK_API dpk_status dpk_cpu_lora_norm_sq(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                        const dpk_tensor* dh, double scaling, const int64_t* lengths,
                                        int32_t threads, float* out_a, float* out_b);

// out[i] >= sum over ids v of ||sum_{t: ids[i,t] = v} g_it||^2, ids [B,T] dense, g [B,T,d]; frames with ids
// == padding_idx count nothing and are not read (pass -1 for none).
DPK_API dpk_status dpk_cpu_embedding_norm_sq(const int64_t* ids, const dpk_tensor* g, int64_t padding_idx,
                                             int32_t threads, float* out);

// out[i] >= ||sum_t x_hat_it * g_it||^2 (elementwise product): the weight of LayerNorm and RMSNorm.
DPK_API dpk_status dpk_cpu_layer_norm_norm_sq(const dpk_tensor* x_hat, const dpk_tensor* g,
                                              const int64_t* lengths, int32_t threads, float* out);

// out[i] >= sum_{c,j} (sum_t g[i,c,t] x[i,c, t*stride + j*dilation - padding])^2, x [B,C,T], g [B,C,T'], 0 <=
// j < kernel_size; x is 0 outside [0,T).
DPK_API dpk_status dpk_cpu_depthwise_conv1d_norm_sq(const dpk_tensor* x, const dpk_tensor* g,
                                                    int64_t kernel_size, int64_t stride, int64_t padding,
                                                    int64_t dilation, int32_t threads, float* out);

// out[i] = min(1, max_grad_norm / sqrt(norm_sq[i])) rounded down, so that out[i] * sqrt(norm_sq[i]) <=
// max_grad_norm exactly; 0 where norm_sq is NaN, infinite or negative. norm_sq F32 or F64, dense.
DPK_API dpk_status dpk_cpu_clip_factors(const void* norm_sq, dpk_dtype dtype, int64_t count,
                                        double max_grad_norm, float* out);

// out[i] = max_grad_norm / (sqrt(norm_sq[i]) + stability) rounded down, so that out[i] * (sqrt(norm_sq[i]) +
// stability) <= max_grad_norm exactly; 0 where norm_sq is NaN, infinite or negative. norm_sq F32 or F64,
// dense.
DPK_API dpk_status dpk_cpu_automatic_clip_factors(const void* norm_sq, dpk_dtype dtype, int64_t count,
                                                  double max_grad_norm, double stability, float* out);

// out [p,d] += sum_i factors[i] g_i^T x_i.
DPK_API dpk_status dpk_cpu_linear_weighted_sum(const dpk_tensor* x, const dpk_tensor* g,
                                               const double* factors, const int64_t* lengths, int32_t threads,
                                               void* out, dpk_dtype out_dtype);

// out [p] += sum_i factors[i] sum_t g_it.
DPK_API dpk_status dpk_cpu_bias_weighted_sum(const dpk_tensor* g, const double* factors,
                                             const int64_t* lengths, int32_t threads, void* out,
                                             dpk_dtype out_dtype);

// out_a [r,d] += sum_i factors[i] dh_i^T x_i, out_b [p,r] += scaling sum_i factors[i] g_i^T h_i.
DPK_API dpk_status dpk_cpu_lora_weighted_sum(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                             const dpk_tensor* dh, double scaling, const double* factors,
                                             const int64_t* lengths, int32_t threads, void* out_a,
                                             void* out_b, dpk_dtype out_dtype);

// out_a [B,r,d]: dh_i^T x_i, out_b [B,p,r]: scaling g_i^T h_i, both dense and written; F64 where an input is,
// else F32.
DPK_API dpk_status dpk_cpu_lora_gradients(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                          const dpk_tensor* dh, double scaling, int32_t threads, void* out_a,
                                          void* out_b);

// out [vocabulary,d]: row ids[i,t] += factors[i] g_it. An id outside [0, vocabulary) of a sample that is read
// is refused.
DPK_API dpk_status dpk_cpu_embedding_weighted_sum(const int64_t* ids, const dpk_tensor* g,
                                                  int64_t padding_idx, const double* factors, int32_t threads,
                                                  void* out, dpk_dtype out_dtype, int64_t vocabulary);

// out [d] += sum_i factors[i] sum_t x_hat_it * g_it.
DPK_API dpk_status dpk_cpu_layer_norm_weighted_sum(const dpk_tensor* x_hat, const dpk_tensor* g,
                                                   const double* factors, const int64_t* lengths,
                                                   int32_t threads, void* out, dpk_dtype out_dtype);

// out [C,1,kernel_size] += sum_i factors[i] (gradient of sample i), as in dpk_cpu_depthwise_conv1d_norm_sq.
DPK_API dpk_status dpk_cpu_depthwise_conv1d_weighted_sum(const dpk_tensor* x, const dpk_tensor* g,
                                                         const double* factors, int64_t kernel_size,
                                                         int64_t stride, int64_t padding, int64_t dilation,
                                                         int32_t threads, void* out, dpk_dtype out_dtype);

#ifdef __cplusplus
}
#endif

#endif  // DPK_CPU_KERNELS_H
