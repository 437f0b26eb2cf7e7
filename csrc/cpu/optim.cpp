// Entry points of the fused step on the CPU: checks, and pieces of all parameters for the threads.
#include <algorithm>
#include <vector>

#include "common/optim_arguments.h"
#include "common/parallel.h"
#include "cpu/optim_isa.h"

namespace dpk {
namespace {

constexpr int64_t kPieceEntries = 8192;  // some 30 µs
static_assert(kPieceEntries % (kNormalsPerBlock * kRoundingsPerBlock) == 0,
              "streams are cut at whole blocks");

OptimPiece piece_of(const dpk_optim_tensor& tensor, const dpk_noise& noise, int64_t start) {
  OptimPiece piece;
  piece.half = tensor.dtype == DPK_BF16;
  const int64_t width = piece.half ? 2 : 4;
  piece.parameter = static_cast<char*>(tensor.parameter) + width * start;
  piece.gradient = tensor.gradient == nullptr ? nullptr : static_cast<char*>(tensor.gradient) + width * start;
  piece.sum = tensor.sum + start;
  piece.first = tensor.first == nullptr ? nullptr : tensor.first + start;
  piece.second = tensor.second == nullptr ? nullptr : tensor.second + start;
  piece.count = std::min(kPieceEntries, tensor.count - start);
  piece.stochastic = noise.stochastic_rounding != 0;
  piece.noise = stream_of(noise, tensor.nonce);
  piece.noise.counter = static_cast<uint32_t>(start / kNormalsPerBlock);
  piece.rounding = stream_of(noise, tensor.rounding_nonce);
  piece.rounding.counter = static_cast<uint32_t>(start / kRoundingsPerBlock);
  return piece;
}

// run(piece, index of its tensor) for all pieces of all tensors.
template <class Run>
void for_each_piece(const dpk_optim_tensor* tensors, int64_t count, const dpk_noise& noise, int32_t threads,
                    Run&& run) {
  if (threads < 1) invalid_argument("threads is %d; it must be 1 or more", static_cast<int>(threads));
  std::vector<int64_t> first_piece(static_cast<size_t>(count) + 1);  // of each tensor, and their number
  int64_t entries = 0;
  for (int64_t i = 0; i < count; ++i) {
    entries += tensors[i].count;
    first_piece[static_cast<size_t>(i) + 1] =
        first_piece[static_cast<size_t>(i)] + (tensors[i].count + kPieceEntries - 1) / kPieceEntries;
  }
  const int worthwhile = entries < kPieceEntries ? 1 : threads;  // waking one takes tens of microseconds
  parallel_for(first_piece.back(), worthwhile, [&](int64_t index, int) {
    const int64_t tensor =
        std::upper_bound(first_piece.begin(), first_piece.end(), index) - first_piece.begin() - 1;
    const int64_t start = (index - first_piece[static_cast<size_t>(tensor)]) * kPieceEntries;
    run(piece_of(tensors[tensor], noise, start), tensor);
  });
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_noise_adamw(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                               const dpk_adam* adam, int32_t threads) {
  using namespace dpk;
  return guard([&] {
    const NoisePlan plan = noise_plan(*noise);
    check_adam(*adam);
    check_tensors(tensors, tensor_count, 2);
    std::vector<AdamPlan> plans;
    for (int64_t i = 0; i < tensor_count; ++i) plans.push_back(adam_plan(*adam, *noise, tensors[i].step));
    const auto step = DPK_DISPATCH(optim_adam);
    for_each_piece(tensors, tensor_count, *noise, threads, [&](const OptimPiece& piece, int64_t tensor) {
      step(piece, plan, plans[static_cast<size_t>(tensor)]);
    });
  });
}

dpk_status dpk_cpu_noise_sgd(const dpk_optim_tensor* tensors, int64_t tensor_count, const dpk_noise* noise,
                             const dpk_sgd* sgd, int32_t threads) {
  using namespace dpk;
  return guard([&] {
    const NoisePlan plan = noise_plan(*noise);
    check_sgd(*sgd);
    check_tensors(tensors, tensor_count, sgd->momentum != 0 ? 1 : 0);
    const auto step = DPK_DISPATCH(optim_sgd);
    for_each_piece(tensors, tensor_count, *noise, threads, [&](const OptimPiece& piece, int64_t tensor) {
      step(piece, plan, sgd_plan(*sgd, *noise, tensors[tensor].step));
    });
  });
}
