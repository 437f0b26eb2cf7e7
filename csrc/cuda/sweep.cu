// The sweep on the GPU: one launch for many parameters, whose addresses travel as the kernel's argument.
//
// A thread block takes 1024 entries of one parameter. Each thread computes one block of the cipher, hence 8
// normals, in registers; they pass through shared memory, so that consecutive threads touch consecutive
// entries of the buffers.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/sweep_arguments.h"
#include "cuda/launch.h"

namespace dpk {
namespace {

constexpr int kThreads = 128;
constexpr int kEntries = kThreads * kNormalsPerBlock;
constexpr int kTensorsPerLaunch = 24;

struct Streams {
  uint32_t noise[3], rounding[3];  // nonces
};

template <class Plan>
struct Entry {
  void* parameter;
  double* sum;
  float* first;
  float* second;
  void* gradient;
  int64_t count;
  Streams nonces;
  Plan plan;
  bool half;
};

template <class Plan>
struct Batch {
  uint32_t key[8];
  NoisePlan noise;
  int64_t first_block[kTensorsPerLaunch + 1];  // of each tensor, and their number
  Entry<Plan> tensors[kTensorsPerLaunch];
  bool stochastic;
};

// One double of padding after every eight: the eight of a thread and those of its neighbours are then in
// different banks.
__device__ __forceinline__ int padded(int entry) { return entry + entry / kNormalsPerBlock; }

template <class Plan>
__device__ __forceinline__ ChaChaState state_of(const Batch<Plan>& batch, const uint32_t nonce[3]) {
  ChaChaState state;
#pragma unroll
  for (int i = 0; i < 8; ++i) state.key[i] = batch.key[i];
#pragma unroll
  for (int i = 0; i < 3; ++i) state.nonce[i] = nonce[i];
  state.counter = 0;
  return state;
}

__device__ __forceinline__ float update(float gradient, float parameter, int64_t index,
                                        const Entry<AdamPlan>& t) {
  float first = t.first[index], second = t.second[index];
  parameter = t.plan.coupled != 0.0f ? adam_update<true>(gradient, parameter, &first, &second, t.plan)
                                     : adam_update<false>(gradient, parameter, &first, &second, t.plan);
  t.first[index] = first;
  t.second[index] = second;
  return parameter;
}

__device__ __forceinline__ float update(float gradient, float parameter, int64_t index,
                                        const Entry<SgdPlan>& t) {
  const bool couples = t.plan.coupled != 0.0f;
  if (!t.plan.buffered)
    return couples ? sgd_update<true, false>(gradient, parameter, nullptr, t.plan)
                   : sgd_update<false, false>(gradient, parameter, nullptr, t.plan);
  float buffer = t.first[index];
  parameter = couples ? sgd_update<true, true>(gradient, parameter, &buffer, t.plan)
                      : sgd_update<false, true>(gradient, parameter, &buffer, t.plan);
  t.first[index] = buffer;
  return parameter;
}

template <class Plan>
__global__ void __launch_bounds__(kThreads) sweep_kernel(const __grid_constant__ Batch<Plan> batch) {
  __shared__ double normals[kEntries + kEntries / kNormalsPerBlock];
  __shared__ uint32_t random[kEntries / 2];
  int tensor = 0;
  while (static_cast<int64_t>(blockIdx.x) >= batch.first_block[tensor + 1]) ++tensor;
  const Entry<Plan>& t = batch.tensors[tensor];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - batch.first_block[tensor]) * kEntries;
  const int thread = static_cast<int>(threadIdx.x);
  const bool stochastic = batch.stochastic && t.half;

  if (batch.noise.draws && start + thread * kNormalsPerBlock < t.count) {
    uint32_t words[16];
    chacha20_block<uint32_t>(state_of(batch, t.nonces.noise),
                             static_cast<uint32_t>(start / kNormalsPerBlock + thread), words);
#pragma unroll
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
      const uint64_t w0 = words[4 * pair] | static_cast<uint64_t>(words[4 * pair + 1]) << 32;
      const uint64_t w1 = words[4 * pair + 2] | static_cast<uint64_t>(words[4 * pair + 3]) << 32;
      double* z = normals + padded(thread * kNormalsPerBlock) + 2 * pair;
      box_muller(w0, w1, z, z + 1);
    }
  }
  if (stochastic && thread < kEntries / kRoundingsPerBlock) {
    uint32_t words[16];
    chacha20_block<uint32_t>(state_of(batch, t.nonces.rounding),
                             static_cast<uint32_t>(start / kRoundingsPerBlock + thread), words);
#pragma unroll
    for (int i = 0; i < 16; ++i) random[thread * 16 + i] = words[i];
  }
  __syncthreads();

  for (int j = 0; j < kNormalsPerBlock; ++j) {
    const int entry = j * kThreads + thread;
    const int64_t index = start + entry;
    if (index >= t.count) break;
    const float gradient =
        noised_gradient(t.sum[index], batch.noise.draws ? normals[padded(entry)] : 0.0, batch.noise);
    t.sum[index] = 0.0;
    if (!t.half) {
      float* parameter = static_cast<float*>(t.parameter) + index;
      if (t.gradient != nullptr) static_cast<float*>(t.gradient)[index] = gradient;
      *parameter = update(gradient, *parameter, index, t);
      continue;
    }
    uint16_t* parameter = static_cast<uint16_t*>(t.parameter) + index;
    if (t.gradient != nullptr) static_cast<uint16_t*>(t.gradient)[index] = to_bf16(gradient);
    const float updated = update(gradient, from_bf16(*parameter), index, t);
    const uint32_t bits = stochastic ? (random[entry / 2] >> (16 * (entry % 2))) & 0xffffu : 0u;
    *parameter = stochastic ? to_bf16_stochastic(updated, bits) : to_bf16(updated);
  }
}

// plan_of(tensor) gives its optimizer's constants.
template <class Plan, class PlanOf>
void sweep(const char* op, const dpk_sweep_tensor* tensors, int64_t count, const dpk_noise& noise,
           void* stream, PlanOf&& plan_of) {
  static_assert(sizeof(Batch<Plan>) <= 4096, "a kernel's arguments");
  Batch<Plan> batch;
  memcpy(batch.key, noise.key, sizeof(batch.key));
  batch.noise = noise_plan(noise);
  batch.stochastic = noise.stochastic_rounding != 0;
  for (int64_t done = 0; done < count; done += kTensorsPerLaunch) {
    const int here = static_cast<int>(std::min<int64_t>(kTensorsPerLaunch, count - done));
    batch.first_block[0] = 0;
    for (int i = 0; i < here; ++i) {
      const dpk_sweep_tensor& t = tensors[done + i];
      Entry<Plan>& entry = batch.tensors[i];
      entry.parameter = t.parameter;
      entry.sum = t.sum;
      entry.first = t.first;
      entry.second = t.second;
      entry.gradient = t.gradient;
      entry.count = t.count;
      memcpy(entry.nonces.noise, t.nonce, sizeof(entry.nonces.noise));
      memcpy(entry.nonces.rounding, t.rounding_nonce, sizeof(entry.nonces.rounding));
      entry.plan = plan_of(t);
      entry.half = t.dtype == DPK_BF16;
      batch.first_block[i + 1] = batch.first_block[i] + (t.count + kEntries - 1) / kEntries;
    }
    const int64_t blocks = batch.first_block[here];
    if (blocks == 0) continue;
    if (blocks > INT32_MAX)
      invalid_argument("%lld entries in one launch", static_cast<long long>(blocks * kEntries));
    sweep_kernel<Plan>
        <<<static_cast<unsigned int>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
    check_launch(op, blocks * kEntries, "entries");
  }
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cuda_noise_adamw(const dpk_sweep_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                                const dpk_adam* adam, void* stream) {
  using namespace dpk;
  return guard([&] {
    noise_plan(*noise);
    check_adam(*adam);
    check_tensors(tensors, tensor_count, 2);
    sweep<AdamPlan>("noise_adamw", tensors, tensor_count, *noise, stream,
                    [&](const dpk_sweep_tensor& t) { return adam_plan(*adam, *noise, t.step); });
  });
}

dpk_status dpk_cuda_noise_sgd(const dpk_sweep_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                              const dpk_sgd* sgd, void* stream) {
  using namespace dpk;
  return guard([&] {
    noise_plan(*noise);
    check_sgd(*sgd);
    check_tensors(tensors, tensor_count, sgd->momentum != 0 ? 1 : 0);
    sweep<SgdPlan>("noise_sgd", tensors, tensor_count, *noise, stream,
                   [&](const dpk_sweep_tensor& t) { return sgd_plan(*sgd, *noise, t.step); });
  });
}
