// Norms and weighted sums of embeddings: frames of equal ids are one row of the gradient.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "cpu/bounds.h"
#include "cpu/views.h"

namespace dpk {
namespace {

// Frames in the order of their ids, equal ids in the order of frames.
struct Token {
  int64_t id, frame;  // frame: i * T + t
  bool operator<(const Token& other) const { return id != other.id ? id < other.id : frame < other.frame; }
};

// Norms: rows of equal ids are summed in R, 64 at a time, then in float64. Bound as for ColumnSums
// (columns.cpp), per id: ||error|| <= 65 u sqrt(sum over ids of (sum_t ||g_t||)^2).
template <class R>
void embedding_norms(const int64_t* ids, const dpk_tensor& g, int64_t padding, int32_t threads, float* out) {
  const Micro<R>& k = micro<R>();
  const int64_t frames = g.size[1], d = g.size[2];
  const int workers = worthwhile_threads(
      threads, static_cast<double>(g.size[0]) * static_cast<double>(frames) * static_cast<double>(d) / 2);
  parallel_for(g.size[0], workers, [&](int64_t i, int) {
    std::vector<Token> tokens;
    for (int64_t t = 0; t < frames; ++t)
      if (ids[i * frames + t] != padding || padding < 0) tokens.push_back({ids[i * frames + t], t});
    std::sort(tokens.begin(), tokens.end());
    std::vector<R> space(static_cast<size_t>(d)), part(static_cast<size_t>(d));
    std::vector<double> total(static_cast<size_t>(d));
    double square = 0.0, scale = 0.0;
    for (size_t first = 0, end; first < tokens.size(); first = end) {
      for (end = first; end < tokens.size() && tokens[end].id == tokens[first].id; ++end) {
      }
      double norms = 0.0;
      if (end - first > 1) std::fill(total.begin(), total.end(), 0.0);
      for (size_t n = first; n < end; ++n) {
        const Rows<R> row(g, i, tokens[n].frame, 1, 0, d, 1, space.data());
        if (end - first == 1) {
          const double own = k.square_sum(row.data, d);
          square += own;
          norms = std::sqrt(own > 0x1p-900 ? own * 1.001 : k.square_sum_above(row.data, d));
          break;
        }
        norms += std::sqrt(k.square_sum_above(row.data, d));
        if ((n - first) % kChunk == 0) std::fill(part.begin(), part.end(), R(0));
        layer_micro<R>().add_row(part.data(), row.data, d);
        if ((n - first) % kChunk == kChunk - 1 || n + 1 == end)
          k.accumulate(total.data(), part.data(), d, 1.0);
      }
      if (end - first > 1) square += k.dot(total.data(), total.data(), d);
      scale += product_above(norms, norms);
    }
    const double terms = static_cast<double>(frames) * static_cast<double>(d);
    out[i] = scale == 0.0 ? 0.0f
                          : upper_square(square, terms, error_bound<R>(frames, frames * d, std::sqrt(scale)));
  });
}

// Sums: every row of `out` belongs to one piece of work, which adds factor * g in float64, sample
// after sample.
template <class R>
void embedding_sums(const int64_t* ids, const dpk_tensor& g, int64_t padding, const double* factors,
                    int32_t threads, void* out, dpk_dtype dtype, int64_t vocabulary) {
  const int64_t frames = g.size[1], d = g.size[2];
  std::vector<Token> tokens;
  for (int64_t n = 0; n < g.size[0] * frames; ++n) {
    const int64_t id = ids[n];
    if (factors[n / frames] == 0.0 || (padding >= 0 && id == padding)) continue;
    if (id < 0 || id >= vocabulary)
      invalid_argument("ids holds %lld; the embedding has rows 0..%lld", static_cast<long long>(id),
                       static_cast<long long>(vocabulary - 1));
    tokens.push_back({id, n});
  }
  std::sort(tokens.begin(), tokens.end());
  std::vector<size_t> starts;  // where each id begins
  for (size_t n = 0; n < tokens.size(); ++n)
    if (n == 0 || tokens[n].id != tokens[n - 1].id) starts.push_back(n);
  constexpr size_t kRowsAtOnce = 16;
  const int workers =
      worthwhile_threads(threads, static_cast<double>(tokens.size()) * static_cast<double>(d));
  const Scratch<double> sums(workers * d);
  const Scratch<R> spaces(workers * d);
  parallel_for(ceil_div(static_cast<int64_t>(starts.size()), kRowsAtOnce), workers,
               [&](int64_t piece, int worker) {
                 R* space = spaces.get() + worker * d;
                 for (size_t s = static_cast<size_t>(piece) * kRowsAtOnce;
                      s < std::min(starts.size(), static_cast<size_t>(piece + 1) * kRowsAtOnce); ++s) {
                   const int64_t row = tokens[starts[s]].id * d;
                   double* sum = dtype == DPK_F64 ? static_cast<double*>(out) + row : sums.get() + worker * d;
                   if (dtype != DPK_F64) read_out(out, dtype, row, d, sum);
                   for (size_t n = starts[s], end = s + 1 < starts.size() ? starts[s + 1] : tokens.size();
                        n < end; ++n) {
                     const int64_t i = tokens[n].frame / frames;
                     const Rows<R> from(g, i, tokens[n].frame % frames, 1, 0, d, 1, space);
                     micro<R>().accumulate(sum, from.data, d, factors[i]);
                   }
                   if (dtype != DPK_F64) write_out(out, dtype, row, d, sum);
                 }
               });
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_embedding_norm_sq(const int64_t* ids, const dpk_tensor* g, int64_t padding_idx,
                                     int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_tensor("g", *g);
    for_arithmetic(g->dtype == DPK_F64,
                   [&](auto r) { embedding_norms<decltype(r)>(ids, *g, padding_idx, threads, out); });
  });
}

dpk_status dpk_cpu_embedding_weighted_sum(const int64_t* ids, const dpk_tensor* g, int64_t padding_idx,
                                          const double* factors, int32_t threads, void* out,
                                          dpk_dtype out_dtype, int64_t vocabulary) {
  using namespace dpk;
  return guard([&] {
    check_tensor("g", *g);
    check_out(out_dtype);
    for_arithmetic(g->dtype == DPK_F64, [&](auto r) {
      embedding_sums<decltype(r)>(ids, *g, padding_idx, factors, threads, out, out_dtype, vocabulary);
    });
  });
}
