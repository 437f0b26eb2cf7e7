// For measurements and checks on a GPU only, no part of the library: the fused step with Philox in place of
// ChaCha20, and the normals of given words. bench/cases/native.py builds it.
#include "common/status.h"
#include "cuda/optim_kernel.cuh"
#include "philox.cuh"

namespace dpk {
namespace {

__global__ void box_muller_kernel(const uint64_t* words, int64_t pairs, double* normals) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < pairs) box_muller(words[2 * i], words[2 * i + 1], normals + 2 * i, normals + 2 * i + 1);
}

__global__ void short_kernel(const float* a, const float* b, int64_t count, float* roots, float* quotients) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) roots[i] = short_root(b[i]), quotients[i] = short_quotient(a[i], b[i]);
}

__global__ void philox_kernel(uint4 counter, uint2 key, uint32_t* words) {
  ChaChaState state = {};
  state.key[0] = key.x, state.key[1] = key.y;
  state.nonce[0] = counter.y, state.nonce[1] = counter.z, state.nonce[2] = counter.w;
  Philox::block(state, counter.x, words);
}

}  // namespace
}  // namespace dpk

#define BENCH_API extern "C" __attribute__((visibility("default")))

// dpk_cuda_noise_adamw with Philox's words.
BENCH_API dpk_status bench_noise_adamw_philox(const dpk_optim_tensor* tensors, int64_t tensor_count,
                                              const dpk_noise* noise, const dpk_adam* adam, void* stream) {
  return dpk::noise_adamw<dpk::Philox>(tensors, tensor_count, noise, adam, stream);
}

// dpk_cpu_box_muller, on device memory.
BENCH_API dpk_status bench_box_muller(const uint64_t* words, int64_t pairs, double* normals, void* stream) {
  return dpk::guard([&] {
    dpk::launch(dpk::box_muller_kernel, (pairs + 127) / 128, 128, stream, words, pairs, normals);
    dpk::check_launch("box_muller", pairs, "pairs");
  });
}

// roots[i] = sqrt(b[i]), quotients[i] = a[i] / b[i], by the update's short sequences, on device memory.
BENCH_API dpk_status bench_short(const float* a, const float* b, int64_t count, float* roots,
                                 float* quotients, void* stream) {
  return dpk::guard([&] {
    dpk::launch(dpk::short_kernel, (count + 127) / 128, 128, stream, a, b, count, roots, quotients);
    dpk::check_launch("short", count, "numbers");
  });
}

// 16 words: the blocks of counters 4 c0 to 4 c0 + 3, c[1..3] as given.
BENCH_API dpk_status bench_philox(const uint32_t* c, const uint32_t* key, uint32_t* words, void* stream) {
  return dpk::guard([&] {
    dpk::launch(dpk::philox_kernel, 1, 1, stream, make_uint4(c[0], c[1], c[2], c[3]),
                make_uint2(key[0], key[1]), words);
    dpk::check_launch("philox", 1, "block");
  });
}
