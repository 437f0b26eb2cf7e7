// Norms and weighted sums of layers whose gradient is a sum over frames: bias, layer norm.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "cpu/bounds.h"
#include "cpu/views.h"

namespace dpk {
namespace {

// Bias (x null): sum_t g_t. Layer norm: sum_t x_t * g_t. Chunks of 64 frames are summed in R and added in
// float64.
//
// Bound: with n frames a chunk's column sum meets at most n + 1 <= 65 roundings, so it is off by 65 u sum_t
// |v_t| <= 65 u sqrt(n sum_t v_t^2), v = g or x * g. Over the columns, and then over the chunks: ||error|| <=
// 65 u S, S = sum over chunks of sqrt(n) ||v in the chunk||_F.
template <class R>
class ColumnSums {
 public:
  ColumnSums(const dpk_tensor* x, const dpk_tensor& g, const int64_t* lengths, int32_t threads)
      : x_(x), g_(g), lengths_(lengths), strips_(ceil_div(g.size[2], kStrip)), k_(layer_micro<R>()) {
    threads_ = worthwhile_threads(threads, static_cast<double>(g.size[0]) * static_cast<double>(g.size[1]) *
                                               static_cast<double>(g.size[2]) / 2);
  }

  void norms(float* out) const {
    if (is_one_frame()) return norms_of_one_frame(out);
    std::vector<double> squares(static_cast<size_t>(g_.size[0] * strips_)), scales(squares.size());
    parallel_for(static_cast<int64_t>(squares.size()), threads_, [&](int64_t n, int) {
      double sum[kStrip] = {};
      const size_t at = static_cast<size_t>(n);
      scales[at] = add(n / strips_, n % strips_, 1.0, sum);
      squares[at] = micro<double>().square_sum(sum, kStrip);
    });
    for (int64_t i = 0; i < g_.size[0]; ++i) {
      double square = 0.0, scale = 0.0;
      for (int64_t n = i * strips_; n < (i + 1) * strips_; ++n) {
        square += squares[static_cast<size_t>(n)];
        // different columns: errors add in squares
        scale += product_above(scales[static_cast<size_t>(n)], scales[static_cast<size_t>(n)]);
      }
      out[i] = upper(i, square, scale);
    }
  }

  void sums(const double* factors, void* out, dpk_dtype dtype) const {
    if (is_one_frame()) return sums_of_one_frame(factors, out, dtype);
    parallel_for(strips_, threads_, [&](int64_t strip, int) {
      double sum[kStrip];
      const int64_t first = strip * kStrip, columns = std::min(kStrip, g_.size[2] - first);
      read_out(out, dtype, first, columns, sum);
      for (int64_t i = 0; i < g_.size[0]; ++i)
        if (factors[i] != 0.0) add(i, strip, factors[i], sum);
      write_out(out, dtype, first, columns, sum);
    });
  }

 private:
  // The entries of a piece of one frame's work: some microseconds of reading, and 32 KiB of the sum.
  static constexpr int64_t kRead = 16384, kEntries = 4096;

  float upper(int64_t i, double square, double squared_scale) const {
    const double e = error_bound<R>(length_of(lengths_, i, g_.size[1]), g_.size[2], std::sqrt(squared_scale));
    return squared_scale == 0.0 ? 0.0f : upper_square(square, static_cast<double>(g_.size[2]), e);
  }

  // Whether each sample is a row in memory, as a gradient that exists already is: it is read as fast as
  // memory allows, with no sum over frames, and no copy.
  bool is_one_frame() const {
    return x_ == nullptr && lengths_ == nullptr && g_.size[1] == 1 && g_.stride[2] == 1 &&
           g_.dtype == kDtype<R>;
  }

  const R* entries(int64_t i, int64_t first) const { return reinterpret_cast<const R*>(at(g_, i, 0, first)); }

  // Squares of float32 numbers are exact in float64, and none underflows.
  static double squares_of(const float* v, int64_t n) { return micro<float>().square_sum(v, n); }
  static double squares_of(const double* v, int64_t n) { return micro<double>().square_sum_above(v, n); }

  void norms_of_one_frame(float* out) const {
    const int64_t n = g_.size[2], pieces = ceil_div(n, kRead);
    std::vector<double> squares(static_cast<size_t>(g_.size[0] * pieces));
    parallel_for(static_cast<int64_t>(squares.size()), threads_, [&](int64_t piece, int) {
      const int64_t first = piece % pieces * kRead;
      squares[static_cast<size_t>(piece)] =
          squares_of(entries(piece / pieces, first), std::min(kRead, n - first));
    });
    for (int64_t i = 0; i < g_.size[0]; ++i) {
      double square = 0.0;
      for (int64_t piece = i * pieces; piece < (i + 1) * pieces; ++piece)
        square += squares[static_cast<size_t>(piece)];
      out[i] = upper(i, square, square);
    }
  }

  void sums_of_one_frame(const double* factors, void* out, dpk_dtype dtype) const {
    parallel_for(ceil_div(g_.size[2], kEntries), threads_, [&](int64_t piece, int) {
      const int64_t first = piece * kEntries, n = std::min(kEntries, g_.size[2] - first);
      alignas(64) double sum[kEntries];
      read_out(out, dtype, first, n, sum);
      for (int64_t i = 0; i < g_.size[0]; ++i)
        if (factors[i] != 0.0) micro<R>().accumulate(sum, entries(i, first), n, factors[i]);
      write_out(out, dtype, first, n, sum);
    });
  }

  // Whether frame t adds something to these columns' sums: a row of zeros beside finite numbers does not.
  // Chunks are of such frames only, so that padding moves no bound, wherever it is.
  bool adds(int64_t i, int64_t t, int64_t first, int64_t columns, R* space) const {
    const auto finite = [&](const dpk_tensor& v) {
      return micro<R>().all_finite(Rows<R>(v, i, t, 1, first, columns, 1, space).data, columns);
    };
    const bool g_is_zero = is_zero(g_, i, t, first, columns);
    if (x_ == nullptr) return !g_is_zero;
    const bool x_is_zero = is_zero(*x_, i, t, first, columns);
    return !(g_is_zero || x_is_zero) || !(g_is_zero || finite(g_)) || !(x_is_zero || finite(*x_));
  }

  // Frames `own` of a tensor, `ld` apart: in place where they follow on one another, else copied.
  struct Chunk {
    Chunk(const dpk_tensor& v, int64_t i, const int64_t* own, int64_t count, int64_t first, int64_t columns,
          R* space) {
      if (own[count - 1] - own[0] == count - 1) {
        const Rows<R> rows(v, i, own[0], count, first, columns, 1, space);
        data = rows.data;
        ld = rows.ld;
        return;
      }
      for (int64_t r = 0; r < count; ++r) {
        R* const to = space + r * columns;
        const Rows<R> row(v, i, own[r], 1, first, columns, 1, to);
        if (row.data != to) std::copy_n(row.data, columns, to);
      }
      data = space;
      ld = columns;
    }

    const R* data;
    int64_t ld;
  };

  // sum += factor * (sample i's column sums); returns S of these columns.
  double add(int64_t i, int64_t strip, double factor, double* sum) const {
    const int64_t first = strip * kStrip, columns = std::min(kStrip, g_.size[2] - first),
                  length = length_of(lengths_, i, g_.size[1]);
    alignas(64) R part[kStrip], g_space[kRows * kStrip], x_space[kRows * kStrip];
    int64_t own[kRows];
    double scale = 0.0;
    for (int64_t t = 0; t < length;) {
      int64_t count = 0;
      for (; t < length && count < kRows; ++t)
        if (adds(i, t, first, columns, part)) own[count++] = t;
      if (count == 0) break;
      const Chunk g(g_, i, own, count, first, columns, g_space);
      double squares;
      if (x_ == nullptr) {
        squares = k_.add_rows(g.data, g.ld, count, columns, part);
      } else {
        const Chunk x(*x_, i, own, count, first, columns, x_space);
        squares = k_.add_products(x.data, x.ld, g.data, g.ld, count, columns, part);
      }
      micro<R>().accumulate(sum, part, columns, factor);
      // The sum of m norms is at most the root of m times their squares.
      scale += std::sqrt(squares * static_cast<double>(count));
    }
    return scale;
  }

  static constexpr int64_t kRows = kChunk;

  const dpk_tensor* x_;
  const dpk_tensor& g_;
  const int64_t* lengths_;
  const int64_t strips_;
  const LayerMicro<R>& k_;
  int threads_ = 1;
};

void check_columns(const dpk_tensor* x, const dpk_tensor& g, const int64_t* lengths) {
  check_tensor("g", g);
  if (x != nullptr) {
    check_tensor("x_hat", *x);
    for (int n = 0; n < 3; ++n) check_same("the sizes of x_hat and g", x->size[n], g.size[n]);
  }
  check_lengths(lengths, g.size[0], g.size[1]);
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_bias_norm_sq(const dpk_tensor* g, const int64_t* lengths, int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_columns(nullptr, *g, lengths);
    for_arithmetic(g->dtype == DPK_F64,
                   [&](auto r) { ColumnSums<decltype(r)>(nullptr, *g, lengths, threads).norms(out); });
  });
}

dpk_status dpk_cpu_bias_weighted_sum(const dpk_tensor* g, const double* factors, const int64_t* lengths,
                                     int32_t threads, void* out, dpk_dtype out_dtype) {
  using namespace dpk;
  return guard([&] {
    check_columns(nullptr, *g, lengths);
    check_out(out_dtype);
    for_arithmetic(g->dtype == DPK_F64, [&](auto r) {
      ColumnSums<decltype(r)>(nullptr, *g, lengths, threads).sums(factors, out, out_dtype);
    });
  });
}

dpk_status dpk_cpu_layer_norm_norm_sq(const dpk_tensor* x_hat, const dpk_tensor* g, const int64_t* lengths,
                                      int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_columns(x_hat, *g, lengths);
    for_arithmetic(x_hat->dtype == DPK_F64 || g->dtype == DPK_F64,
                   [&](auto r) { ColumnSums<decltype(r)>(x_hat, *g, lengths, threads).norms(out); });
  });
}

dpk_status dpk_cpu_layer_norm_weighted_sum(const dpk_tensor* x_hat, const dpk_tensor* g,
                                           const double* factors, const int64_t* lengths, int32_t threads,
                                           void* out, dpk_dtype out_dtype) {
  using namespace dpk;
  return guard([&] {
    check_columns(x_hat, *g, lengths);
    check_out(out_dtype);
    for_arithmetic(x_hat->dtype == DPK_F64 || g->dtype == DPK_F64, [&](auto r) {
      ColumnSums<decltype(r)>(x_hat, *g, lengths, threads).sums(factors, out, out_dtype);
    });
  });
}
