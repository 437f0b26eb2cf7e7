#include "cpu/optim_isa.h"

#include "cpu/chacha20_lanes.h"

namespace dpk::DPK_ISA {
namespace {

// Entries whose normals and gradient are held in the first-level cache at a time: 8 + 4 + 4 bytes each.
constexpr int64_t kChunk = 512;
static_assert(kChunk % (kBlockLanes * kNormalsPerBlock) == 0 && kChunk % kRoundingsPerBlock == 0);

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

inline void prefetch(const void* start, int64_t bytes) {
  const char* at = static_cast<const char*>(start);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 1, 3);
}

// Computes the normals of entries [start, start + count) and prefetches the lines of their buffers, so that
// computation hides the memory's latency. It prefetches a few lines at a time, because a core can have about
// twenty in flight.
void draw_and_fetch(const OptimPiece& piece, int64_t start, int64_t count, double* z) {
  constexpr int64_t kRound = kBlockLanes * kNormalsPerBlock;
  const int64_t width = piece.half ? 2 : 4;
  ChaChaState stream = piece.noise;
  for (int64_t done = 0; done < count; done += kRound) {
    const int64_t at = start + done, entries = at_most(kRound, count - done);
    prefetch(piece.sum + at, 8 * entries);
    prefetch(static_cast<const char*>(piece.parameter) + width * at, width * entries);
    if (piece.first != nullptr) prefetch(piece.first + at, 4 * entries);
    if (piece.second != nullptr) prefetch(piece.second + at, 4 * entries);
    stream.counter = piece.noise.counter + static_cast<uint32_t>(at / kNormalsPerBlock);
    normals(stream, entries, z + done);
  }
}

// A copy, so that the compiler knows that writing a buffer does not change the plan.
void gradients(double* sum, const double* z, int64_t count, NoisePlan plan, float* gradient) {
  if (plan.draws && plan.rounds) {
    plan.draws = plan.rounds = true;
    for (int64_t j = 0; j < count; ++j) {
      gradient[j] = noised_gradient(sum[j], z[j], plan);
      sum[j] = 0.0;
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      gradient[j] = noised_gradient(sum[j], plan.draws ? z[j] : 0.0, plan);
      sum[j] = 0.0;
    }
  }
}

void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = from_bf16(from[j]);
}

void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = to_bf16(from[j]);
}

// Entry j takes the 16 bits at byte 2j of the stream.
void narrow_stochastic(const float* from, int64_t count, const ChaChaState& stream, uint16_t* to) {
  uint32_t words[16][kBlockLanes];
  for (int64_t done = 0; done < count; done += kBlockLanes * kRoundingsPerBlock) {
    blocks_by_lane(stream, stream.counter + static_cast<uint32_t>(done / kRoundingsPerBlock), words);
    for (int lane = 0; lane < kBlockLanes; ++lane) {
      const int64_t start = done + lane * kRoundingsPerBlock;
      const int64_t here = at_most(kRoundingsPerBlock, count - start);
      for (int j = 0; j < here; ++j)
        to[start + j] = to_bf16_stochastic(from[start + j], (words[j / 2][lane] >> (16 * (j % 2))) & 0xffffu);
    }
  }
}

template <bool kCouples>
void adam(const float* __restrict__ gradient, int64_t count, AdamPlan plan, float* __restrict__ parameter,
          float* __restrict__ first, float* __restrict__ second) {
  for (int64_t j = 0; j < count; ++j)
    parameter[j] = adam_update<kCouples>(gradient[j], parameter[j], first + j, second + j, plan);
}

void update(const float* gradient, int64_t count, const AdamPlan& plan, float* parameter, float* first,
            float* second) {
  (plan.coupled != 0.0f ? adam<true> : adam<false>)(gradient, count, plan, parameter, first, second);
}

template <bool kCouples>
void sgd(const float* __restrict__ gradient, int64_t count, SgdPlan plan, float* __restrict__ parameter,
         float* __restrict__ first) {
  if (plan.buffered) {
    for (int64_t j = 0; j < count; ++j)
      parameter[j] = sgd_update<kCouples, true>(gradient[j], parameter[j], first + j, plan);
  } else {
    for (int64_t j = 0; j < count; ++j)
      parameter[j] = sgd_update<kCouples, false>(gradient[j], parameter[j], nullptr, plan);
  }
}

void update(const float* gradient, int64_t count, const SgdPlan& plan, float* parameter, float* first,
            float*) {
  (plan.coupled != 0.0f ? sgd<true> : sgd<false>)(gradient, count, plan, parameter, first);
}

template <class Plan>
void fused_step(const OptimPiece& piece, const NoisePlan& noise, const Plan& plan) {
  alignas(64) double z[kChunk];
  alignas(64) float gradient[kChunk], wide[kChunk];
  for (int64_t start = 0; start < piece.count; start += kChunk) {
    const int64_t count = at_most(kChunk, piece.count - start);
    if (noise.draws) draw_and_fetch(piece, start, count, z);
    gradients(piece.sum + start, z, count, noise, gradient);
    float* first = piece.first == nullptr ? nullptr : piece.first + start;
    float* second = piece.second == nullptr ? nullptr : piece.second + start;
    if (!piece.half) {
      if (piece.gradient != nullptr)
        memcpy(static_cast<float*>(piece.gradient) + start, gradient, static_cast<size_t>(count) * 4);
      update(gradient, count, plan, static_cast<float*>(piece.parameter) + start, first, second);
      continue;
    }
    uint16_t* parameter = static_cast<uint16_t*>(piece.parameter) + start;
    if (piece.gradient != nullptr) narrow(gradient, count, static_cast<uint16_t*>(piece.gradient) + start);
    widen(parameter, count, wide);
    update(gradient, count, plan, wide, first, second);
    if (piece.stochastic) {
      ChaChaState stream = piece.rounding;
      stream.counter += static_cast<uint32_t>(start / kRoundingsPerBlock);
      narrow_stochastic(wide, count, stream, parameter);
    } else {
      narrow(wide, count, parameter);
    }
  }
}

}  // namespace

void optim_adam(const OptimPiece& piece, const NoisePlan& noise, const AdamPlan& plan) {
  fused_step(piece, noise, plan);
}

void optim_sgd(const OptimPiece& piece, const NoisePlan& noise, const SgdPlan& plan) {
  fused_step(piece, noise, plan);
}

void noise_sum(const ChaChaState& stream, double* sum, int64_t count, const NoisePlan& noise) {
  alignas(64) double z[kChunk];
  const NoisePlan plan = noise;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t here = at_most(kChunk, count - start);
    ChaChaState at = stream;
    at.counter += static_cast<uint32_t>(start / kNormalsPerBlock);
    if (plan.draws) normals(at, here, z);
    for (int64_t j = 0; j < here; ++j) sum[start + j] = noised(sum[start + j], plan.draws ? z[j] : 0.0, plan);
  }
}

}  // namespace dpk::DPK_ISA
