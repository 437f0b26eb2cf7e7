// The sweep on the GPU, as a template on the generator of its random words: the library instantiates it with
// ChaCha20, the benchmarks also with Philox (bench/native).
//
// A warp takes 256 entries of one parameter, and warps have nothing to do with each other. Each lane computes
// one block of the cipher, hence 8 normals, in registers; they pass through the warp's own shared memory, so
// that the lanes then touch consecutive pairs of entries: 16 bytes of the sum, 8 of every float buffer.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/sweep_arguments.h"
#include "cuda/launch.h"

namespace dpk {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 32;
constexpr int kTile = kLanes * kNormalsPerBlock;  // entries of a warp
constexpr int kEntries = kThreads * kNormalsPerBlock;
constexpr int kTilePairs = kTile / 2;
#ifndef DPK_GROUP
#define DPK_GROUP 2
#endif
#ifndef DPK_PREFETCH
#define DPK_PREFETCH 1
#endif
constexpr int kGroup = DPK_GROUP;  // pairs of a lane that are loaded, and computed side by side
constexpr bool kPrefetches = DPK_PREFETCH != 0;
#ifndef DPK_STREAM
#define DPK_STREAM 0
#endif
constexpr bool kStreams = DPK_STREAM != 0;  // buffers are marked as used once

template <class T>
__device__ __forceinline__ T read(const T* from) {
  return kStreams ? __ldcs(from) : *from;
}

template <class T>
__device__ __forceinline__ void write(T* to, T value) {
  if (kStreams)
    __stcs(to, value);
  else
    *to = value;
}
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
__device__ __forceinline__ ChaChaState state_of(const Batch<Plan>& batch, const uint32_t nonce[3]) {
  ChaChaState state;
#pragma unroll
  for (int i = 0; i < 8; ++i) state.key[i] = batch.key[i];
#pragma unroll
  for (int i = 0; i < 3; ++i) state.nonce[i] = nonce[i];
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

__device__ __forceinline__ bool keeps_first(const AdamPlan&) { return true; }
__device__ __forceinline__ bool keeps_first(const SgdPlan& plan) { return plan.buffered; }
__device__ __forceinline__ bool keeps_second(const AdamPlan&) { return true; }
__device__ __forceinline__ bool keeps_second(const SgdPlan&) { return false; }

// The buffers of a lane, from its first pair of entries on; the next is kLanes further.
template <bool kHalf>
struct Buffers {
  void* parameter;
  double2* sum;
  float2 *first, *second;
  void* gradient;

  template <class Plan>
  __device__ __forceinline__ Buffers(const Entry<Plan>& t, int64_t pair) {
    constexpr int width = kHalf ? 4 : 8;
    parameter = static_cast<char*>(t.parameter) + width * pair;
    sum = reinterpret_cast<double2*>(t.sum) + pair;
    first = reinterpret_cast<float2*>(t.first) + pair;
    second = reinterpret_cast<float2*>(t.second) + pair;
    gradient = t.gradient == nullptr ? nullptr : static_cast<char*>(t.gradient) + width * pair;
  }
};

// What a pair of entries has in its buffers.
struct Pair {
  double2 sum;
  float2 parameter, first, second;
};

template <bool kHalf, class Plan>
__device__ __forceinline__ Pair load(const Buffers<kHalf>& from, int i, const Plan& plan) {
  Pair found;
  found.sum = read(from.sum + i * kLanes);
  if (kHalf) {
    const uint32_t both = read(static_cast<const uint32_t*>(from.parameter) + i * kLanes);
    found.parameter = make_float2(float_from_bits(both << 16), float_from_bits(both & 0xffff0000u));
  } else {
    found.parameter = read(static_cast<const float2*>(from.parameter) + i * kLanes);
  }
  found.first = keeps_first(plan) ? read(from.first + i * kLanes) : make_float2(0, 0);
  found.second = keeps_second(plan) ? read(from.second + i * kLanes) : make_float2(0, 0);
  return found;
}

template <bool kHalf>
__device__ __forceinline__ void store(void* to, int i, float2 value) {
  if (kHalf)
    write(static_cast<uint32_t*>(to) + i * kLanes, to_bf16(value.x) | static_cast<uint32_t>(to_bf16(value.y))
                                                                          << 16);
  else
    write(static_cast<float2*>(to) + i * kLanes, value);
}

// adam_step where neither root nor quotient needs more than the short sequence that nvcc makes of them, and
// leaves by a branch each time for what is out of its range; `fine` becomes false there. Without the branches
// the entries of a lane are computed side by side.
__device__ __forceinline__ float short_adam_step(float parameter, float first, float second,
                                                 const AdamPlan& plan, bool* fine) {
  const auto within = [](float value, float least, float most) {
    const uint32_t low = __float_as_uint(least), high = __float_as_uint(most);
    return __float_as_uint(value) - low <= high - low;
  };
  float y = root_seed(second);
  const float g = second * y;
  const float root = __fmaf_rn(__fmaf_rn(-g, g, second), 0.5f * y, g);
  const float denominator = root * plan.root + plan.eps;
  y = reciprocal_seed(denominator);
  y = __fmaf_rn(y, __fmaf_rn(-denominator, y, 1.0f), y);
  const float q = first * y;
  const float quotient = __fmaf_rn(y, __fmaf_rn(-denominator, q, first), q);
  *fine &= within(second, 0x1p-100f, 0x1p100f) & within(denominator, 0x1p-40f, 0x1p40f) &
           within(fabsf(first), 0x1p-80f, 0x1p80f);
  return parameter - plan.size * quotient;
}

// The update of kCount pairs; their first and second become the new ones, the parameters are returned.
template <bool kCouples, int kCount>
__device__ __forceinline__ void update(const float2 (&gradient)[kCount], Pair (&pairs)[kCount],
                                       const AdamPlan& plan) {
  float2 decayed[kCount];
  bool fine = true;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Pair& p = pairs[i];
    decayed[i].x = adam_moments<kCouples>(gradient[i].x, p.parameter.x, &p.first.x, &p.second.x, plan);
    decayed[i].y = adam_moments<kCouples>(gradient[i].y, p.parameter.y, &p.first.y, &p.second.y, plan);
    p.parameter.x = short_adam_step(decayed[i].x, p.first.x, p.second.x, plan, &fine);
    p.parameter.y = short_adam_step(decayed[i].y, p.first.y, p.second.y, plan, &fine);
  }
  if (fine) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Pair& p = pairs[i];
    p.parameter.x = adam_step(decayed[i].x, p.first.x, p.second.x, plan);
    p.parameter.y = adam_step(decayed[i].y, p.first.y, p.second.y, plan);
  }
}

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

template <bool kCouples, int kCount>
__device__ __forceinline__ void update(const float2 (&gradient)[kCount], Pair (&pairs)[kCount],
                                       const SgdPlan& plan) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Pair& p = pairs[i];
    p.parameter.x = update<kCouples>(gradient[i].x, p.parameter.x, &p.first.x, nullptr, plan);
    p.parameter.y = update<kCouples>(gradient[i].y, p.parameter.y, &p.first.y, nullptr, plan);
  }
}

// Brings a tile's buffers on their way to the second-level cache while the cipher computes.
template <class Plan>
__device__ __forceinline__ void prefetch(const Entry<Plan>& t, int64_t start, int lane) {
  const auto fetch = [](const void* buffer, int64_t byte) {
    prefetch_line(static_cast<const char*>(buffer) + byte);
  };
  const int64_t entry = start + lane * kNormalsPerBlock;
  if (entry >= t.count) return;
  fetch(t.sum, 8 * entry);
  fetch(t.parameter, (t.half ? 2 : 4) * entry);
  if (keeps_first(t.plan)) fetch(t.first, 4 * entry);
  if (keeps_second(t.plan)) fetch(t.second, 4 * entry);
}

// A tile that lies whole in its tensor, from entry `start` on, with noise and grid. random: NULL, or the
// tile's words of rounding bits.
template <bool kHalf, bool kCouples, class Plan>
__device__ __forceinline__ void whole_tile(const NoisePlan& noise, const Entry<Plan>& t, int64_t start,
                                           int lane, const double2* normals, const uint32_t* random) {
  const Buffers<kHalf> buffers(t, start / 2 + lane);
  const Plan plan = t.plan;
  NoisePlan both = noise;
  both.draws = both.rounds = true;
#pragma unroll
  for (int done = 0; done < kPairsPerBlock; done += kGroup) {
    Pair pairs[kGroup];
    float2 gradient[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) pairs[i] = load(buffers, done + i, plan);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const double2 z = normals[slot(lane + (done + i) * kLanes)];
      gradient[i].x = noised_gradient(pairs[i].sum.x, z.x, both);
      gradient[i].y = noised_gradient(pairs[i].sum.y, z.y, both);
      write(buffers.sum + (done + i) * kLanes, make_double2(0.0, 0.0));
      if (buffers.gradient != nullptr) store<kHalf>(buffers.gradient, done + i, gradient[i]);
    }
    update<kCouples>(gradient, pairs, plan);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int at = (done + i) * kLanes;
      if (keeps_first(plan)) write(buffers.first + at, pairs[i].first);
      if (keeps_second(plan)) write(buffers.second + at, pairs[i].second);
      if (kHalf && random != nullptr) {
        const uint32_t bits = random[lane + at];
        write(static_cast<uint32_t*>(buffers.parameter) + at,
              to_bf16_stochastic(pairs[i].parameter.x, bits & 0xffffu) |
                  static_cast<uint32_t>(to_bf16_stochastic(pairs[i].parameter.y, bits >> 16)) << 16);
      } else {
        store<kHalf>(buffers.parameter, done + i, pairs[i].parameter);
      }
    }
  }
}

// The end of a tensor, buffers that are not aligned, and a sweep without noise or grid: entry by entry.
template <class Plan>
__device__ __forceinline__ void ragged_tile(const Batch<Plan>& batch, const Entry<Plan>& t, int64_t start,
                                            int lane, const double2* normals, const uint32_t* random) {
  for (int j = lane; j < kTile && start + j < t.count; j += kLanes) {
    const int64_t index = start + j;
    const double2 z = batch.noise.draws ? normals[slot(j / 2)] : make_double2(0.0, 0.0);
    const float gradient = noised_gradient(t.sum[index], j % 2 == 0 ? z.x : z.y, batch.noise);
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
__global__ void __launch_bounds__(kThreads) sweep_kernel(const __grid_constant__ Batch<Plan> batch) {
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

  if (kPrefetches) prefetch(t, start, lane);
  if (batch.noise.draws) {
    uint32_t words[16];
    Generator::block(state_of(batch, t.nonces.noise), static_cast<uint32_t>(start / kNormalsPerBlock) + lane,
                     words);
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
    Generator::block(state_of(batch, t.nonces.rounding),
                     static_cast<uint32_t>(start / kRoundingsPerBlock) + lane, words);
#pragma unroll
    for (int i = 0; i < 16; ++i) random[lane * 16 + i] = words[i];
  }
  __syncwarp();

  if (!t.aligned || start + kTile > t.count || !batch.noise.draws || !batch.noise.rounds)
    ragged_tile(batch, t, start, lane, normals, random);
  else if (t.plan.coupled != 0.0f)
    t.half ? whole_tile<true, true>(batch.noise, t, start, lane, normals, random)
           : whole_tile<false, true>(batch.noise, t, start, lane, normals, random);
  else
    t.half ? whole_tile<true, false>(batch.noise, t, start, lane, normals, random)
           : whole_tile<false, false>(batch.noise, t, start, lane, normals, random);
}

inline bool aligned(const dpk_sweep_tensor& t) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(t.parameter) | reinterpret_cast<uintptr_t>(t.sum) |
                        reinterpret_cast<uintptr_t>(t.first) | reinterpret_cast<uintptr_t>(t.second) |
                        reinterpret_cast<uintptr_t>(t.gradient);
  return all % sizeof(double2) == 0;
}

// plan_of(tensor) gives its optimizer's constants.
template <class Generator, class Plan, class PlanOf>
void sweep(const char* op, const dpk_sweep_tensor* tensors, int64_t count, const dpk_noise& noise,
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
      entry.aligned = aligned(t);
      batch.first_block[i] = static_cast<uint32_t>(blocks);
      blocks += (t.count + kEntries - 1) / kEntries;
      if (blocks > INT32_MAX)
        invalid_argument("%lld entries in one launch", static_cast<long long>(blocks * kEntries));
    }
    if (blocks == 0) continue;
    launch(sweep_kernel<Plan, Generator>, blocks, kThreads, stream, batch);
    check_launch(op, blocks * kEntries, "entries");
  }
}

template <class Generator>
dpk_status noise_adamw(const dpk_sweep_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                       const dpk_adam* adam, void* stream) {
  return guard([&] {
    noise_plan(*noise);
    check_adam(*adam);
    check_tensors(tensors, tensor_count, 2);
    sweep<Generator, AdamPlan>("noise_adamw", tensors, tensor_count, *noise, stream,
                               [&](const dpk_sweep_tensor& t) { return adam_plan(*adam, *noise, t.step); });
  });
}

template <class Generator>
dpk_status noise_sgd(const dpk_sweep_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                     const dpk_sgd* sgd, void* stream) {
  return guard([&] {
    noise_plan(*noise);
    check_sgd(*sgd);
    check_tensors(tensors, tensor_count, sgd->momentum != 0 ? 1 : 0);
    sweep<Generator, SgdPlan>("noise_sgd", tensors, tensor_count, *noise, stream,
                              [&](const dpk_sweep_tensor& t) { return sgd_plan(*sgd, *noise, t.step); });
  });
}

}  // namespace
}  // namespace dpk
