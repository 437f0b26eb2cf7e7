// One call for the norms of many layers, and one for their weighted sums.
//
// One thread computes a small layer completely, by calling the function of its family: the thread pool is
// busy with the loop over layers, so the function runs in its caller alone (parallel.h). A model of hundreds
// of LoRA layers then wakes the threads once, not hundreds of times.
#include "grouped_kernels.h"

#include <algorithm>
#include <vector>

#include "common/optim_arguments.h"
#include "common/parallel.h"
#include "cpu/bounds.h"
#include "cpu/optim_isa.h"
#include "cpu/views.h"

namespace dpk {
namespace {

// Multiplications beyond which a layer is worth all threads: some milliseconds of one.
constexpr double kLarge = 5e7;
constexpr int64_t kPieceEntries = 8192;

double volume(const dpk_tensor& t) {
  return static_cast<double>(t.size[0]) * static_cast<double>(t.size[1]) * static_cast<double>(t.size[2]);
}

double work(const dpk_layer& layer) {
  switch (layer.kind) {
    case DPK_LAYER_LINEAR:
      return volume(layer.x) * static_cast<double>(layer.g.size[2]);
    case DPK_LAYER_LORA:
      return (volume(layer.x) + volume(layer.g)) * static_cast<double>(layer.h.size[2]);
    case DPK_LAYER_DEPTHWISE_CONV1D:
      return volume(layer.x) * static_cast<double>(layer.kernel_size);
    default:
      return volume(layer.g);
  }
}

[[noreturn]] void unknown_kind(const dpk_layer& l) {
  invalid_argument("kind is %d; see DPK_LAYER_* in grouped_kernels.h", static_cast<int>(l.kind));
}

void check(dpk_status status) {
  if (status != DPK_OK) throw Error(status, dpk_last_error());
}

// The layer's squared norms, one for each parameter: of LoRA's A in `out` [B] and of its B in `out_b`.
void norm(const dpk_layer& l, int32_t threads, float* out, float* out_b) {
  dpk_status status = DPK_OK;
  switch (l.kind) {
    case DPK_LAYER_LINEAR:
      status = dpk_cpu_linear_norm_sq(&l.x, &l.g, nullptr, DPK_AUTO, threads, out);
      break;
    case DPK_LAYER_BIAS:
      status = dpk_cpu_bias_norm_sq(&l.g, nullptr, threads, out);
      break;
    case DPK_LAYER_LORA:
      status = dpk_cpu_lora_norm_sq(&l.x, &l.h, &l.g, &l.dh, l.scaling, nullptr, threads, out, out_b);
      break;
    case DPK_LAYER_EMBEDDING:
      status = dpk_cpu_embedding_norm_sq(l.ids, &l.g, l.padding_idx, threads, out);
      break;
    case DPK_LAYER_LAYER_NORM:
      status = dpk_cpu_layer_norm_norm_sq(&l.x, &l.g, nullptr, threads, out);
      break;
    case DPK_LAYER_DEPTHWISE_CONV1D:
      status = dpk_cpu_depthwise_conv1d_norm_sq(&l.x, &l.g, l.kernel_size, l.stride, l.padding, l.dilation,
                                                threads, out);
      break;
    default:
      unknown_kind(l);
  }
  check(status);
}

void add(const dpk_layer& l, const double* factors, int32_t threads) {
  dpk_status status = DPK_OK;
  switch (l.kind) {
    case DPK_LAYER_LINEAR:
      status = dpk_cpu_linear_weighted_sum(&l.x, &l.g, factors, nullptr, threads, l.out, l.out_dtype);
      break;
    case DPK_LAYER_BIAS:
      status = dpk_cpu_bias_weighted_sum(&l.g, factors, nullptr, threads, l.out, l.out_dtype);
      break;
    case DPK_LAYER_LORA:
      status = dpk_cpu_lora_weighted_sum(&l.x, &l.h, &l.g, &l.dh, l.scaling, factors, nullptr, threads, l.out,
                                         l.out_b, l.out_dtype);
      break;
    case DPK_LAYER_EMBEDDING:
      status = dpk_cpu_embedding_weighted_sum(l.ids, &l.g, l.padding_idx, factors, threads, l.out,
                                              l.out_dtype, l.vocabulary);
      break;
    case DPK_LAYER_LAYER_NORM:
      status = dpk_cpu_layer_norm_weighted_sum(&l.x, &l.g, factors, nullptr, threads, l.out, l.out_dtype);
      break;
    case DPK_LAYER_DEPTHWISE_CONV1D:
      status = dpk_cpu_depthwise_conv1d_weighted_sum(&l.x, &l.g, factors, l.kernel_size, l.stride, l.padding,
                                                     l.dilation, threads, l.out, l.out_dtype);
      break;
    default:
      unknown_kind(l);
  }
  check(status);
}

// Calls body(layer, threads) for every layer: of a large one with all threads, of a small one in one of them.
template <class Body>
void for_layers(const dpk_layer* layers, int64_t layer_count, int32_t threads, Body&& body) {
  if (layer_count < 0) invalid_argument("layer_count is %lld", static_cast<long long>(layer_count));
  if (threads < 1) invalid_argument("threads is %d; it must be 1 or more", static_cast<int>(threads));
  std::vector<const dpk_layer*> small;
  for (int64_t i = 0; i < layer_count; ++i) {
    if (threads > 1 && work(layers[i]) > kLarge)
      body(layers[i], threads);
    else
      small.push_back(&layers[i]);
  }
  // The longest first, so that no thread begins one when the others have finished.
  std::stable_sort(small.begin(), small.end(),
                   [](const dpk_layer* a, const dpk_layer* b) { return work(*a) > work(*b); });
  double total = 0.0;
  for (const dpk_layer* layer : small) total += work(*layer);
  const int worthwhile = total < 1e6 ? 1 : threads;  // waking a thread takes tens of microseconds
  parallel_for(static_cast<int64_t>(small.size()), worthwhile,
               [&](int64_t n, int) { body(*small[static_cast<size_t>(n)], 1); });
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_total_norm_sq(const dpk_layer* layers, int64_t layer_count, int64_t batch, int32_t threads,
                                 float* out) {
  using namespace dpk;
  return guard([&] {
    if (batch < 0) invalid_argument("batch is %lld", static_cast<long long>(batch));
    int64_t parts = 0;
    for (int64_t i = 0; i < layer_count; ++i) {
      check_same("batches of a layer's g and of out", layers[i].g.size[0], batch);
      parts += layers[i].kind == DPK_LAYER_LORA ? 2 : 1;
    }
    // [layers, 2, batch]; the second of a layer with one parameter stays 0
    std::vector<float> squares(static_cast<size_t>(2 * std::max<int64_t>(layer_count, 0) * batch));
    for_layers(layers, layer_count, threads, [&](const dpk_layer& layer, int32_t its_threads) {
      float* of_layer = squares.data() + 2 * batch * (&layer - layers);
      norm(layer, its_threads, of_layer, of_layer + batch);
    });
    for (int64_t i = 0; i < batch; ++i) {
      double total = 0.0;
      for (int64_t part = 0; part < 2 * layer_count; ++part)
        total += squares[static_cast<size_t>(part * batch + i)];
      // the error of each addition is at most 2^-53 of the sum
      out[i] = round_up(total * (1.0 + static_cast<double>(parts + 1) * 0x1p-52));
    }
  });
}

dpk_status dpk_cpu_weighted_sums(const dpk_layer* layers, int64_t layer_count, const double* factors,
                                 int32_t threads) {
  using namespace dpk;
  return guard([&] {
    for_layers(layers, layer_count, threads,
               [&](const dpk_layer& layer, int32_t its_threads) { add(layer, factors, its_threads); });
  });
}

dpk_status dpk_cpu_noise_sums(const dpk_noised_sum* sums, int64_t sum_count, const dpk_noise* noise,
                              int32_t threads) {
  using namespace dpk;
  return guard([&] {
    const NoisePlan plan = noise_plan(*noise);
    if (threads < 1) invalid_argument("threads is %d; it must be 1 or more", static_cast<int>(threads));
    const auto run = DPK_DISPATCH(noise_sum);
    for (int64_t i = 0; i < sum_count; ++i) {
      const dpk_noised_sum& one = sums[i];
      chacha20_state(noise->key, 0, one.nonce,
                     normal_blocks(one.count, DPK_F64));  // the counter does not wrap
      if (one.count > 0 && one.sum == nullptr)
        invalid_argument("sum %lld is NULL", static_cast<long long>(i));
      const int64_t pieces = (one.count + kPieceEntries - 1) / kPieceEntries;
      parallel_for(pieces, pieces > 1 ? threads : 1, [&](int64_t index, int) {
        const int64_t start = index * kPieceEntries;
        ChaChaState stream = stream_of(*noise, one.nonce);
        stream.counter = static_cast<uint32_t>(start / kNormalsPerBlock);
        run(stream, one.sum + start, std::min(kPieceEntries, one.count - start), plan);
      });
    }
  });
}
