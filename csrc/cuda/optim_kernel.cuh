// The fused step on the GPU, as a template on the generator of its random words: the library instantiates it
// with ChaCha20, the benchmarks also with Philox (bench/native).
//
// A warp takes 256 entries of one parameter, a tile, and warps are independent of each other. Each lane
// computes one block of the cipher, hence 8 normals, in registers; they pass through the warp's own shared
// memory, so that the lanes then touch consecutive pairs of entries: 16 bytes of the sum, 8 of every float
// buffer. A lane loads all of its four pairs before it computes with the first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/optim_arguments.h"
#include "cuda/launch.h"
#include "cuda/optim_update.cuh"

namespace dpk {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 32;
constexpr int kTile = kLanes * kNormalsPerBlock;
constexpr int kTilePairs = kTile / 2;
constexpr int kEntries = kThreads * kNormalsPerBlock;  // of a block of threads
#if CUDART_VERSION >= 12010
constexpr int kTensorsPerLaunch = 128;
constexpr size_t kArgumentBytes = 32764;  // since CUDA 12.1, on every architecture that is built for
#else
constexpr int kTensorsPerLaunch = 16;
constexpr size_t kArgumentBytes = 4096;
#endif

struct ChaCha {
  static __device__ __forceinline__ void block(const ChaChaState& state, uint32_t counter,
                                               uint32_t words[16]) {
    chacha20_block<uint32_t>(state, counter, words);
  }
};

template <class Plan>
struct Entry : dpk_optim_tensor {
  Plan plan;
  bool half;     // its parameter is bfloat16
  bool aligned;  // every buffer, to 16 bytes
};

template <class Plan>
struct Batch {
  uint32_t key[8];
  NoisePlan noise;
  uint32_t first_block[kTensorsPerLaunch];  // of each tensor, then UINT32_MAX
  bool stochastic;
  Entry<Plan> tensors[kTensorsPerLaunch];
};

template <class Plan>
__device__ __forceinline__ ChaChaState state_of(const Batch<Plan>& batch, const uint8_t nonce[12]) {
  ChaChaState state;
  memcpy(state.key, batch.key, sizeof(state.key));
  memcpy(state.nonce, nonce, sizeof(state.nonce));
  state.counter = 0;
  return state;
}

// The tensor that a block belongs to; `first_block` goes on to a power of two with what no block reaches.
template <class Plan>
__device__ __forceinline__ int tensor_of(const Batch<Plan>& batch, uint32_t block) {
  int found = 0;
#pragma unroll
  for (int step = kTensorsPerLaunch / 2; step > 0; step /= 2)
    if (batch.first_block[found + step] <= block) found += step;
  return found;
}

// Where pair q of a tile lies in shared memory: permuted within eights, so that 8 lanes that write 64 bytes
// apart and 8 that read 16 bytes apart both meet all banks.
__device__ __forceinline__ int slot(int q) { return q ^ ((q >> 3) & 3); }

// Pairs of parameters or gradients as they are stored: floats, or bfloat16 in one word.
__device__ __forceinline__ float2 unpack(float2 both) { return both; }
__device__ __forceinline__ float2 unpack(uint32_t both) {
  return make_float2(float_from_bits(both << 16), float_from_bits(both & 0xffff0000u));
}

__device__ __forceinline__ uint32_t join(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}
__device__ __forceinline__ void pack(float a, float b, float2* to) { *to = make_float2(a, b); }
__device__ __forceinline__ void pack(float a, float b, uint32_t* to) { *to = join(to_bf16(a), to_bf16(b)); }

// By 16 random bits each.
__device__ __forceinline__ void pack_stochastic(float a, float b, uint32_t, float2* to) { pack(a, b, to); }
__device__ __forceinline__ void pack_stochastic(float a, float b, uint32_t random, uint32_t* to) {
  *to = join(to_bf16_stochastic(a, random & 0xffffu), to_bf16_stochastic(b, random >> 16));
}

// A tile that lies whole in its tensor, from entry `start` on, with noise and grid. random: NULL, or the
// tile's words of rounding bits.
template <class Packed, bool kCouples, class Plan>
__device__ __forceinline__ void whole_tile(NoisePlan noise, const Entry<Plan>& t, int64_t start, int lane,
                                           const double2* normals, const uint32_t* random) {
  const int64_t own = start / 2 + lane;  // the lane's first pair; the next is kLanes further
  double2* const sum = reinterpret_cast<double2*>(t.sum) + own;
  Packed* const parameter = static_cast<Packed*>(t.parameter) + own;
  float2* const first = reinterpret_cast<float2*>(t.first) + own;
  float2* const second = reinterpret_cast<float2*>(t.second) + own;
  Packed* const gradient = t.gradient == nullptr ? nullptr : static_cast<Packed*>(t.gradient) + own;
  const Plan plan = t.plan;
  noise.draws = noise.rounds = true;

  Held held;
  double2 sums[kPairsPerBlock];
  const auto hold = [](float* to, float2 both) { to[0] = both.x, to[1] = both.y; };
#pragma unroll
  for (int i = 0; i < kPairsPerBlock; ++i) {
    const int at = i * kLanes;
    sums[i] = sum[at];
    hold(held.parameter + 2 * i, unpack(parameter[at]));
    hold(held.first + 2 * i, keeps_first(plan) ? first[at] : make_float2(0, 0));
    hold(held.second + 2 * i, keeps_second(plan) ? second[at] : make_float2(0, 0));
  }
#pragma unroll
  for (int i = 0; i < kPairsPerBlock; ++i) {
    const int at = i * kLanes;
    const double2 z = normals[slot(lane + at)];
    const float a = noised_gradient(sums[i].x, z.x, noise), b = noised_gradient(sums[i].y, z.y, noise);
    sum[at] = make_double2(0.0, 0.0);
    if (gradient != nullptr) pack(a, b, gradient + at);
    hold(held.gradient + 2 * i, make_float2(a, b));
  }
  update<kCouples>(held, plan);
#pragma unroll
  for (int i = 0; i < kPairsPerBlock; ++i) {
    const int at = i * kLanes, a = 2 * i, b = a + 1;
    if (keeps_first(plan)) pack(held.first[a], held.first[b], first + at);
    if (keeps_second(plan)) pack(held.second[a], held.second[b], second + at);
    if (random != nullptr)
      pack_stochastic(held.parameter[a], held.parameter[b], random[lane + at], parameter + at);
    else
      pack(held.parameter[a], held.parameter[b], parameter + at);
  }
}

// The end of a tensor, buffers that are not aligned, and a step without noise or grid: entry by entry.
template <class Plan>
__device__ __forceinline__ void ragged_tile(const NoisePlan& noise, const Entry<Plan>& t, int64_t start,
                                            int lane, const double2* normals, const uint32_t* random) {
  for (int j = lane; j < kTile && start + j < t.count; j += kLanes) {
    const int64_t index = start + j;
    const double2 z = noise.draws ? normals[slot(j / 2)] : make_double2(0.0, 0.0);
    const float gradient = noised_gradient(t.sum[index], j % 2 == 0 ? z.x : z.y, noise);
    t.sum[index] = 0.0;
    float* wide = static_cast<float*>(t.parameter) + index;
    uint16_t* narrow = static_cast<uint16_t*>(t.parameter) + index;
    if (t.gradient != nullptr && t.half) static_cast<uint16_t*>(t.gradient)[index] = to_bf16(gradient);
    if (t.gradient != nullptr && !t.half) static_cast<float*>(t.gradient)[index] = gradient;
    const float parameter = t.half ? from_bf16(*narrow) : *wide;
    float first = keeps_first(t.plan) ? t.first[index] : 0.0f;
    float second = keeps_second(t.plan) ? t.second[index] : 0.0f;
    const float updated = t.plan.coupled != 0.0f
                              ? update<true>(gradient, parameter, &first, &second, t.plan)
                              : update<false>(gradient, parameter, &first, &second, t.plan);
    if (keeps_first(t.plan)) t.first[index] = first;
    if (keeps_second(t.plan)) t.second[index] = second;
    if (!t.half)
      *wide = updated;
    else if (random == nullptr)
      *narrow = to_bf16(updated);
    else
      *narrow = to_bf16_stochastic(updated, (random[j / 2] >> (16 * (j % 2))) & 0xffffu);
  }
}

template <class Plan, class Generator>
__global__ void __launch_bounds__(kThreads) optim_kernel(const __grid_constant__ Batch<Plan> batch) {
  __shared__ double2 all_normals[kThreads / kLanes][kTilePairs];
  __shared__ uint32_t all_random[kThreads / kLanes][kTilePairs];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int tensor = tensor_of(batch, blockIdx.x);
  const Entry<Plan>& t = batch.tensors[tensor];
  const int64_t start =
      static_cast<int64_t>(blockIdx.x - batch.first_block[tensor]) * kEntries + warp * kTile;
  if (start >= t.count) return;
  double2* normals = all_normals[warp];
  uint32_t* random = batch.stochastic && t.half ? all_random[warp] : nullptr;

  if (batch.noise.draws) {
    uint32_t words[16];
    const uint32_t counter = static_cast<uint32_t>(start / kNormalsPerBlock) + lane;
    Generator::block(state_of(batch, t.nonce), counter, words);
#pragma unroll
    for (int pair = 0; pair < kPairsPerBlock; ++pair) {
      const uint64_t w0 = words[4 * pair] | static_cast<uint64_t>(words[4 * pair + 1]) << 32;
      const uint64_t w1 = words[4 * pair + 2] | static_cast<uint64_t>(words[4 * pair + 3]) << 32;
      double2 z;
      box_muller(w0, w1, &z.x, &z.y);
      normals[slot(kPairsPerBlock * lane + pair)] = z;
    }
  }
  if (random != nullptr && lane < kTile / kRoundingsPerBlock) {
    uint32_t words[16];
    const uint32_t counter = static_cast<uint32_t>(start / kRoundingsPerBlock) + lane;
    Generator::block(state_of(batch, t.rounding_nonce), counter, words);
#pragma unroll
    for (int i = 0; i < 16; ++i) random[lane * 16 + i] = words[i];
  }
  __syncwarp();

  if (!t.aligned || start + kTile > t.count || !batch.noise.draws || !batch.noise.rounds)
    ragged_tile(batch.noise, t, start, lane, normals, random);
  else if (t.plan.coupled != 0.0f)
    t.half ? whole_tile<uint32_t, true>(batch.noise, t, start, lane, normals, random)
           : whole_tile<float2, true>(batch.noise, t, start, lane, normals, random);
  else
    t.half ? whole_tile<uint32_t, false>(batch.noise, t, start, lane, normals, random)
           : whole_tile<float2, false>(batch.noise, t, start, lane, normals, random);
}

inline bool aligned(const dpk_optim_tensor& t) {
  uintptr_t all = 0;
  for (const void* buffer : {t.parameter, static_cast<void*>(t.sum), static_cast<void*>(t.first),
                             static_cast<void*>(t.second), t.gradient})
    all |= reinterpret_cast<uintptr_t>(buffer);
  return all % sizeof(double2) == 0;
}

// plan_of(tensor) gives its optimizer's constants.
template <class Generator, class Plan, class PlanOf>
void fused_step(const char* op, const dpk_optim_tensor* tensors, int64_t count, const dpk_noise& noise,
                void* stream, PlanOf&& plan_of) {
  static_assert(sizeof(Batch<Plan>) <= kArgumentBytes, "a kernel's arguments");
  Batch<Plan> batch;
  memcpy(batch.key, noise.key, sizeof(batch.key));
  batch.noise = noise_plan(noise);
  batch.stochastic = noise.stochastic_rounding != 0;
  for (int64_t done = 0; done < count; done += kTensorsPerLaunch) {
    const int here = static_cast<int>(std::min<int64_t>(kTensorsPerLaunch, count - done));
    int64_t blocks = 0;
    std::fill(batch.first_block, batch.first_block + kTensorsPerLaunch, UINT32_MAX);
    for (int i = 0; i < here; ++i) {
      const dpk_optim_tensor& t = tensors[done + i];
      batch.tensors[i] = {t, plan_of(t), t.dtype == DPK_BF16, aligned(t)};
      batch.first_block[i] = static_cast<uint32_t>(blocks);
      blocks += (t.count + kEntries - 1) / kEntries;
      if (blocks > INT32_MAX)
        invalid_argument("%lld entries in one launch", static_cast<long long>(blocks * kEntries));
    }
    if (blocks == 0) continue;
    launch(optim_kernel<Plan, Generator>, blocks, kThreads, stream, batch);
    check_launch(op, blocks * kEntries, "entries");
  }
}

template <class Generator>
dpk_status noise_adamw(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                       const dpk_adam* adam, void* stream) {
  return guard([&] {
    noise_plan(*noise);
    check_adam(*adam);
    check_tensors(tensors, tensor_count, 2);
    fused_step<Generator, AdamPlan>(
        "noise_adamw", tensors, tensor_count, *noise, stream,
        [&](const dpk_optim_tensor& t) { return adam_plan(*adam, *noise, t.step); });
  });
}

template <class Generator>
dpk_status noise_sgd(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                     const dpk_sgd* sgd, void* stream) {
  return guard([&] {
    noise_plan(*noise);
    check_sgd(*sgd);
    check_tensors(tensors, tensor_count, sgd->momentum != 0 ? 1 : 0);
    fused_step<Generator, SgdPlan>("noise_sgd", tensors, tensor_count, *noise, stream,
                                   [&](const dpk_optim_tensor& t) { return sgd_plan(*sgd, *noise, t.step); });
  });
}

}  // namespace
}  // namespace dpk
