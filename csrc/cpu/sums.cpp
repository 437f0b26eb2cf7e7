// out += sum_i c_i g_i^T x_i for a linear layer, and the clip factors c_i.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "cpu/linear.h"

namespace dpk {
namespace {

// Columns of the output that one piece of work holds in float64, in units of a panel.
constexpr int64_t kPanelsWide = 4;
// Pieces of work for each thread, at least: a thread that the system takes away for a while delays the end by
// no more than a piece.
constexpr int64_t kPiecesPerThread = 3;

// Each piece of work owns a part of the output: it takes the samples in order, computes a sample's product
// in R (in the order of the norm's, bounds.h), and adds factor * product in float64, tile by tile. A tile is
// read from `out` first and written back at the end.
//
// The part is some whole rows if there are more rows than columns, else some whole columns, and the piece
// packs what only it reads of g, or of x: those panels stay in its core's cache. The other tensor's panels,
// which all pieces read, are packed before.
template <class R>
class WeightedSum {
 public:
  WeightedSum(const dpk_tensor& x, const dpk_tensor& g, int32_t threads, void* out, dpk_dtype out_dtype)
      : x_(x),
        g_(g),
        threads_(threads),
        out_(out),
        out_dtype_(out_dtype),
        k_(micro<R>()),
        by_rows_(g.size[2] >= x.size[2]) {}

  void run(const double* factors, const int64_t* lengths) const {
    std::vector<std::vector<int64_t>> own(static_cast<size_t>(x_.size[0]));
    const double rows = static_cast<double>(x_.size[0]) * static_cast<double>(x_.size[1]);
    parallel_for(x_.size[0], worthwhile_threads(threads_, 8.0 * rows), [&](int64_t i, int) {
      if (factors[i] != 0.0)
        own[static_cast<size_t>(i)] = own_frames<R>(x_, g_, i, length_of(lengths, i, x_.size[1]));
    });
    std::vector<Sample> group;
    int64_t size = 0;
    for (int64_t i = 0; i < x_.size[0]; ++i) {
      if (factors[i] == 0.0) continue;
      std::vector<int64_t>& frames = own[static_cast<size_t>(i)];
      const auto length = static_cast<int64_t>(frames.size());
      const int64_t shared = packed_size(panel(!by_rows_), length, tensor(!by_rows_).size[2]);
      if (!group.empty() && (size + shared) * static_cast<int64_t>(sizeof(R)) > kGroupBytes) {
        add(group, size);
        group.clear();
        size = 0;
      }
      group.push_back({i, std::move(frames), length, factors[i], size});
      size += shared;
    }
    if (!group.empty()) add(group, size);
  }

 private:
  // A tile of the output.
  struct Place {
    int64_t row, column, rows, columns;
  };

  // A sample's own frames, their number, its factor, and where its shared panels start, in elements.
  struct Sample {
    int64_t index;
    std::vector<int64_t> own;
    int64_t length;
    double factor;
    int64_t shared_at;
  };

  // g and its panels, or x and its.
  const dpk_tensor& tensor(bool of_g) const { return of_g ? g_ : x_; }
  const Panel<R>& panel(bool of_g) const { return of_g ? k_.tall : k_.wide; }

  void add(const std::vector<Sample>& group, int64_t size) const {
    const int64_t d = x_.size[2], p = g_.size[2];
    int64_t frames = 0;
    for (const Sample& s : group) frames += s.length;
    const int threads = worthwhile_threads(
        threads_, static_cast<double>(frames) * static_cast<double>(p) * static_cast<double>(d) / 16);
    const Workspace workspace(size * static_cast<int64_t>(sizeof(R)));
    R* const shared = workspace.as<R>();
    pack_shared(group, shared, threads);

    const int64_t unit = by_rows_ ? kBandPanels * k_.tall.width : kPanelsWide * k_.nr,
                  other = by_rows_ ? kPanelsWide * k_.nr : kBandPanels * k_.tall.width;
    const int64_t parts = ceil_div(by_rows_ ? p : d, unit), across = ceil_div(by_rows_ ? d : p, other);
    // Where there are few parts for the threads, several pieces pack the same part.
    const int64_t pieces = std::clamp<int64_t>(ceil_div(kPiecesPerThread * threads, parts), 1, across);
    parallel_for(parts * pieces, threads, [&](int64_t n, int worker) {
      const int64_t first = n / pieces * unit, count = std::min(unit, (by_rows_ ? p : d) - first);
      const int64_t from = n % pieces * across / pieces, to = (n % pieces + 1) * across / pieces;
      const Workspace own(frames * round_to(count, panel(by_rows_).width) * static_cast<int64_t>(sizeof(R)),
                          worker + 1);
      pack_own(group, first, count, own.as<R>());
      for (int64_t m = from; m < to; ++m) {
        const int64_t second = m * other, width = std::min(other, (by_rows_ ? d : p) - second);
        if (by_rows_)
          tile(group, {first, second, count, width}, own.as<R>(), shared);
        else
          tile(group, {second, first, width, count}, shared, own.as<R>());
      }
    });
  }

  void pack_shared(const std::vector<Sample>& group, R* panels, int threads) const {
    struct Piece {
      const Sample* sample;
      int64_t t0;
    };
    std::vector<Piece> pieces;
    for (const Sample& s : group)
      for (int64_t t = 0; t < s.length; t += kPackFrames) pieces.push_back({&s, t});
    parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t n, int) {
      const auto [s, t0] = pieces[static_cast<size_t>(n)];
      pack_frames<R>(tensor(!by_rows_), s->index, s->own, t0, std::min(t0 + kPackFrames, s->length),
                     panel(!by_rows_), panels + s->shared_at, nullptr);
    });
  }

  // Columns [first, first + count) of every sample, one sample after the other.
  void pack_own(const std::vector<Sample>& group, int64_t first, int64_t count, R* panels) const {
    const dpk_tensor columns = columns_of(tensor(by_rows_), first, count);
    for (const Sample& s : group) {
      pack_frames<R>(columns, s.index, s.own, 0, s.length, panel(by_rows_), panels, nullptr);
      panels += packed_size(panel(by_rows_), s.length, count);
    }
  }

  // The tile of `out` at `place`: own panels begin with the place's first row (or column), shared ones with
  // 0.
  void tile(const std::vector<Sample>& group, const Place& place, const R* g_panels,
            const R* x_panels) const {
    const int64_t width = k_.nr, tall = k_.tall.width, band = kBandPanels * tall;
    alignas(64) R tiles[kMostBand];
    alignas(64) double sum[kPanelsWide * kMostBand];
    for_runs(place, sum, [&](double* run, int64_t index, int64_t count) {
      read_out(out_, out_dtype_, index, count, run);
    });
    for (const Sample& s : group) {
      const R* g = by_rows_ ? g_panels : g_panels + s.shared_at + place.row * s.length;
      const R* x = by_rows_ ? x_panels + s.shared_at + place.column * s.length : x_panels;
      for (int64_t t0 = 0; t0 < s.length; t0 += kBlock) {
        const int64_t frames = std::min(kBlock, s.length - t0);
        for (int64_t j = 0; j < place.columns; j += width) {
          const int64_t rows = band_product(g + t0 * tall, s.length * tall, x + j * s.length + t0 * width,
                                            frames, place.rows, tiles);
          k_.accumulate(sum + j * band, tiles, rows * width, s.factor);
        }
      }
      if (by_rows_)
        g_panels += packed_size(k_.tall, s.length, place.rows);
      else
        x_panels += packed_size(k_.wide, s.length, place.columns);
    }
    for_runs(place, sum, [&](const double* run, int64_t index, int64_t count) {
      write_out(out_, out_dtype_, index, count, run);
    });
  }

  // Copies between a piece's float64 tile and `out`, run by run.
  template <class Copy>
  void for_runs(const Place& place, double* sum, Copy&& copy) const {
    for (int64_t j = 0; j < place.columns; j += k_.nr)
      for (int64_t m = 0; m < place.rows; ++m)
        copy(sum + j * kBandPanels * k_.tall.width + m * k_.nr,
             (place.row + m) * x_.size[2] + place.column + j, std::min<int64_t>(k_.nr, place.columns - j));
  }

  const dpk_tensor& x_;
  const dpk_tensor& g_;
  int32_t threads_;
  void* out_;
  dpk_dtype out_dtype_;
  const Micro<R>& k_;
  const bool by_rows_;  // whether a piece of work has whole rows of the output, and packs g itself
};

// factor^2 * square <= limit^2, decided exactly: each product is split into its rounded value and the rest
// (Dekker's two-product by fused multiply-add). factor is a float32, so its square is exact in float64.
bool within(float factor, double square, double limit) {
  const double f2 = static_cast<double>(factor) * factor;
  const double left = f2 * square, left_rest = std::fma(f2, square, -left);
  const double right = limit * limit, right_rest = std::fma(limit, limit, -right);
  return left != right ? left < right : left_rest <= right_rest;
}

float clip_factor(double square, double limit) {
  if (!std::isfinite(square) || square < 0.0) return 0.0f;
  // Both scaled by a power of two so that the limit is in [1, 2) and no square of it over- or underflows. A
  // square that does is 2^1000 times off the limit's, either way.
  const int exponent = std::ilogb(limit);
  limit = std::scalbn(limit, -exponent);
  square = std::scalbn(std::scalbn(square, -exponent), -exponent);
  if (std::isinf(square)) return 0.0f;
  if (within(1.0f, square, limit)) return 1.0f;
  float factor = static_cast<float>(limit / std::sqrt(square));
  while (factor > 0.0f && !within(factor, square, limit)) factor = std::nextafterf(factor, 0.0f);
  return factor;
}

// limit / (sqrt(square) + stability), rounded down: the root, the sum and the quotient round by 2^-53 each,
// which 2^-50 covers before the rounding to float.
float automatic_clip_factor(double square, double limit, double stability) {
  if (!std::isfinite(square) || square < 0.0) return 0.0f;
  const double exact = limit / (std::sqrt(square) + stability) * (1.0 - 0x1p-50);
  if (exact > std::numeric_limits<float>::max()) return std::numeric_limits<float>::max();
  const float nearest = static_cast<float>(exact);
  return nearest > exact ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Checks what both kinds of factors take.
void check_clipping(dpk_dtype dtype, double max_grad_norm) {
  if (dtype != DPK_F32 && dtype != DPK_F64)
    invalid_argument("norm_sq has element type %d; give F32 or F64", static_cast<int>(dtype));
  if (!(max_grad_norm > 0.0 && std::isfinite(max_grad_norm)))
    invalid_argument("max_grad_norm is %g; give a finite number above 0", max_grad_norm);
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_linear_weighted_sum(const dpk_tensor* x, const dpk_tensor* g, const double* factors,
                                       const int64_t* lengths, int32_t threads, void* out,
                                       dpk_dtype out_dtype) {
  using namespace dpk;
  return guard([&] {
    check_tensor("x", *x);
    check_tensor("g", *g);
    check_same("the batch sizes of x and g", x->size[0], g->size[0]);
    check_same("the frames of x and g", x->size[1], g->size[1]);
    check_lengths(lengths, x->size[0], x->size[1]);
    check_out(out_dtype);
    for_arithmetic(x->dtype == DPK_F64 || g->dtype == DPK_F64, [&](auto r) {
      WeightedSum<decltype(r)>(*x, *g, threads, out, out_dtype).run(factors, lengths);
    });
  });
}

dpk_status dpk_cpu_clip_factors(const void* norm_sq, dpk_dtype dtype, int64_t count, double max_grad_norm,
                                float* out) {
  using namespace dpk;
  return guard([&] {
    check_clipping(dtype, max_grad_norm);
    for (int64_t i = 0; i < count; ++i) {
      double square;
      read_out(norm_sq, dtype, i, 1, &square);
      out[i] = clip_factor(square, max_grad_norm);
    }
  });
}

dpk_status dpk_cpu_automatic_clip_factors(const void* norm_sq, dpk_dtype dtype, int64_t count,
                                          double max_grad_norm, double stability, float* out) {
  using namespace dpk;
  return guard([&] {
    check_clipping(dtype, max_grad_norm);
    if (!(stability > 0.0 && std::isfinite(stability)))
      invalid_argument("stability is %g; give a finite number above 0", stability);
    for (int64_t i = 0; i < count; ++i) {
      double square;
      read_out(norm_sq, dtype, i, 1, &square);
      out[i] = automatic_clip_factor(square, max_grad_norm, stability);
    }
  });
}
