// Entry points of the fused step on the GPU.
#include "cuda/optim_kernel.cuh"

dpk_status dpk_cuda_noise_adamw(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                                const dpk_adam* adam, void* stream) {
  return dpk::noise_adamw<dpk::ChaCha>(tensors, tensor_count, noise, adam, stream);
}

dpk_status dpk_cuda_noise_sgd(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                              const dpk_sgd* sgd, void* stream) {
  return dpk::noise_sgd<dpk::ChaCha>(tensors, tensor_count, noise, sgd, stream);
}
