// The fused step over a piece of one parameter, by one thread, compiled once per instruction set.
#pragma once

#include "common/isa.h"
#include "common/optim.h"

namespace dpk {

// Entries [0, count) of a piece: the streams stand at its first entry, which is a multiple of
// kRoundingsPerBlock.
struct OptimPiece {
  void* parameter;
  double* sum;
  float* first;
  float* second;
  void* gradient;  // or NULL
  int64_t count;
  bool half;  // the parameter (and gradient) are bfloat16
  bool stochastic;
  ChaChaState noise, rounding;
};

// noise_sum: noised() in place, on `count` entries from where the stream stands.
#define DPK_DECLARE(isa)                                                                         \
  namespace isa {                                                                                \
  void optim_adam(const OptimPiece& piece, const NoisePlan& noise, const AdamPlan&);             \
  void optim_sgd(const OptimPiece& piece, const NoisePlan& noise, const SgdPlan&);               \
  void noise_sum(const ChaChaState& stream, double* sum, int64_t count, const NoisePlan& noise); \
  }
DPK_FOR_EACH_ISA(DPK_DECLARE)
#undef DPK_DECLARE

}  // namespace dpk
