// LoRA: squared norms ||dh_i^T x_i||^2 and scaling^2 ||g_i^T h_i||^2, their weighted sums, and the gradients
// themselves.
//
// Both are a narrow matrix [T, r] against a wide one [T, n]. The wide one is read once, in place: a strip of
// columns at a time, 64 frames of it (in the first caches) against the narrow matrix, whose r x strip product
// stays in cache too. r columns are padded to the tile's rows.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/bounds.h"
#include "cpu/views.h"

namespace dpk {
namespace {

// Samples whose narrow matrices are held at a time: this much memory.
constexpr int64_t kNarrowBytes = int64_t{8} << 20;

// Frames whose part of S is bounded together, sum_t ||a_t|| ||b_t|| <= sqrt(sum_t ||a_t||^2 sum_t ||b_t||^2):
// a row's own norm would take as long as its products. Frames in which either row is 0 are not among them, so
// that padding, wherever it is, neither adds to a sum nor moves the others to another one.
constexpr int64_t kBoundFrames = 16;

struct Factor {
  const dpk_tensor* narrow;
  const dpk_tensor* wide;
  double scaling;
  float* norm_sq;  // norms: [B]
  void* out;       // sums: [r, n], or [n, r] when `transposed`; gradients: one of these a sample
  bool transposed;
};

template <class R>
class LoRA {
 public:
  LoRA(const Factor& a, const Factor& b, const int64_t* lengths, int32_t threads)
      : factors_{a, b},
        lengths_(lengths),
        k_(micro<R>()),
        r_(a.narrow->size[2]),
        padded_(round_to(r_, k_.mr)) {
    const double wide = static_cast<double>(a.wide->size[2] + b.wide->size[2]);
    threads_ = worthwhile_threads(threads, static_cast<double>(batch()) * static_cast<double>(frames()) *
                                               static_cast<double>(padded_) * wide / 16);
  }

  void norms() {
    for (int64_t i = 0; i < batch(); ++i) indices_.push_back(i);
    for_groups([&](size_t first, size_t count) {
      // One piece of work: a sample, one of the two factors, a strip of its columns.
      const int64_t pieces = strips(0) + strips(1);
      std::vector<double> squares(count * static_cast<size_t>(pieces)), scales(squares.size());
      parallel_for(static_cast<int64_t>(squares.size()), threads_, [&](int64_t n, int) {
        const Piece piece = piece_of(n % pieces);
        const size_t sample = static_cast<size_t>(n / pieces);
        const Scratch<double> sum(padded_ * kStrip);
        std::fill_n(sum.get(), padded_ * kStrip, 0.0);
        scales[static_cast<size_t>(n)] =
            product(piece, indices_[first + sample], sample, 1.0, sum.get(), true);
        squares[static_cast<size_t>(n)] = k_.dot(sum.get(), sum.get(), padded_ * kStrip);
      });
      for (size_t sample = 0; sample < count; ++sample)
        for (int which = 0; which < 2; ++which)
          finish(which, indices_[first + sample], &squares[sample * static_cast<size_t>(pieces)],
                 &scales[sample * static_cast<size_t>(pieces)]);
    });
  }

  void gradients() {
    for (int64_t i = 0; i < batch(); ++i) indices_.push_back(i);
    for_groups([&](size_t first, size_t count) {
      const int64_t pieces = strips(0) + strips(1);
      parallel_for(static_cast<int64_t>(count) * pieces, threads_, [&](int64_t n, int) {
        const Piece piece = piece_of(n % pieces);
        const Factor& f = factors_[piece.which];
        const size_t sample = static_cast<size_t>(n / pieces);
        const int64_t start = indices_[first + sample] * r_ * f.wide->size[2];
        const Scratch<double> sum(padded_ * kStrip);
        std::fill_n(sum.get(), padded_ * kStrip, 0.0);
        product(piece, indices_[first + sample], sample, f.scaling, sum.get(), false);
        write_piece(piece, sum.get(), kDtype<R>, start);
      });
    });
  }

  void sums(const double* factors, dpk_dtype out_dtype) {
    for (int64_t i = 0; i < batch(); ++i)
      if (factors[i] != 0.0) indices_.push_back(i);
    for_groups([&](size_t first, size_t count) {
      parallel_for(strips(0) + strips(1), threads_, [&](int64_t n, int) {
        const Piece piece = piece_of(n);
        const Factor& f = factors_[piece.which];
        const Scratch<double> sum(padded_ * kStrip);
        std::fill_n(sum.get(), padded_ * kStrip, 0.0);
        read_piece(piece, sum.get(), out_dtype);
        for (size_t s = 0; s < count; ++s)
          product(piece, indices_[first + s], s, factors[indices_[first + s]] * f.scaling, sum.get(), false);
        write_piece(piece, sum.get(), out_dtype, 0);
      });
    });
  }

 private:
  struct Piece {
    int which;
    int64_t column, columns;
  };

  int64_t batch() const { return factors_[0].wide->size[0]; }
  int64_t frames() const { return factors_[0].wide->size[1]; }
  int64_t strips(int which) const { return ceil_div(factors_[which].wide->size[2], kStrip); }
  Piece piece_of(int64_t n) const {
    const int which = n < strips(0) ? 0 : 1;
    const int64_t column = (which == 0 ? n : n - strips(0)) * kStrip;
    return {which, column, std::min(kStrip, factors_[which].wide->size[2] - column)};
  }

  // Between a piece's float64 sum [r, kStrip] and its place in the output, from entry `start` on; a
  // transposed output's place is one run.
  void read_piece(const Piece& piece, double* sum, dpk_dtype dtype) const {
    const Factor& f = factors_[piece.which];
    const int64_t n = piece.columns;
    if (!f.transposed) {
      for (int64_t m = 0; m < r_; ++m)
        read_out(f.out, dtype, m * f.wide->size[2] + piece.column, n, sum + m * kStrip);
      return;
    }
    const Scratch<double> run(n * r_);
    read_out(f.out, dtype, piece.column * r_, n * r_, run.get());
    for (int64_t m = 0; m < r_; ++m)
      for (int64_t j = 0; j < n; ++j) sum[m * kStrip + j] = run.get()[j * r_ + m];
  }

  void write_piece(const Piece& piece, const double* sum, dpk_dtype dtype, int64_t start) const {
    const Factor& f = factors_[piece.which];
    const int64_t n = piece.columns;
    if (!f.transposed) {
      for (int64_t m = 0; m < r_; ++m)
        write_out(f.out, dtype, start + m * f.wide->size[2] + piece.column, n, sum + m * kStrip);
      return;
    }
    const Scratch<double> run(n * r_);
    for (int64_t m = 0; m < r_; ++m)
      for (int64_t j = 0; j < n; ++j) run.get()[j * r_ + m] = sum[m * kStrip + j];
    write_out(f.out, dtype, start + piece.column * r_, n * r_, run.get());
  }

  // Converts the narrow matrices of a group of samples, then calls body(first, count).
  template <class Body>
  void for_groups(Body&& body) {
    const int64_t size = frames() * padded_;
    const int64_t bytes = std::max<int64_t>(1, 2 * size * static_cast<int64_t>(sizeof(R)));
    const size_t most = static_cast<size_t>(std::max<int64_t>(1, kNarrowBytes / bytes));
    const int64_t slots = 2 * static_cast<int64_t>(std::min(most, indices_.size()));
    const Scratch<R> space(size * slots);
    const Scratch<double> bound_space(frames() * slots);
    narrow_ = space.get();
    narrow_squares_ = bound_space.get();
    for (size_t first = 0; first < indices_.size(); first += most) {
      const size_t count = std::min(most, indices_.size() - first);
      parallel_for(static_cast<int64_t>(2 * count), threads_, [&](int64_t slot, int) {
        convert(slot, indices_[first + static_cast<size_t>(slot / 2)]);
      });
      body(first, count);
    }
  }

  // Sample i's narrow matrix [length, padded_], and upper bounds of the squares of its rows: 0 for rows of
  // zeros only.
  void convert(int64_t slot, int64_t i) const {
    const dpk_tensor& v = *factors_[slot % 2].narrow;
    const int64_t length = length_of(lengths_, i, frames());
    R* rows = narrow_ + slot * frames() * padded_;
    const Rows<R> source(v, i, 0, length, 0, r_, k_.mr, rows);
    for (int64_t t = 0; r_ > 0 && source.data != rows && t < length; ++t)
      std::copy_n(source.data + t * source.ld, r_, rows + t * padded_);
    for (int64_t t = 0; t < length; ++t)
      narrow_squares_[slot * frames() + t] = k_.square_sum_above(rows + t * padded_, padded_);
  }

  // Prefetches frames [t0, t0+kChunk) of a strip: a strip of a wide matrix takes a few cache
  // lines out of each row, which no hardware prefetcher follows across pages.
  static void prefetch(const dpk_tensor& wide, int64_t i, int64_t t0, int64_t length, const Piece& piece) {
    constexpr int64_t line = 64;
    const int64_t bytes = piece.columns * element_size(wide.dtype);
    if (wide.stride[2] != 1) return;
    for (int64_t t = t0, end = std::min(t0 + kChunk, length); t < end; ++t) {
      const char* row = at(wide, i, t, piece.column);
      for (int64_t b = 0; b < bytes; b += line) __builtin_prefetch(row + b);
    }
  }

  // S of the columns of a piece, or more, kBoundFrames own frames at a time.
  class Bound {
   public:
    // Frames [t0, t0 + count) of a sample, of which `rows` has the piece's columns.
    void add(const dpk_tensor& wide, int64_t i, int64_t t0, const Rows<R>& rows, int64_t count,
             const Piece& piece, const double* narrow_squares) {
      const auto own = [&](int64_t t) {
        return narrow_squares[t0 + t] != 0.0 && !is_zero(wide, i, t0 + t, piece.column, piece.columns);
      };
      for (int64_t t = 0; t < count;) {
        int64_t run = 0;
        for (; t + run < count && frames_ + run < kBoundFrames && own(t + run); ++run)
          of_narrow_ += narrow_squares[t0 + t + run];
        if (run > 0)
          of_wide_ += micro<R>().square_sum_above_rows(rows.data + t * rows.ld, rows.ld, run, piece.columns);
        frames_ += run;
        t += frames_ == kBoundFrames ? run : run + 1;  // the next frame is not the sample's own
        if (frames_ == kBoundFrames) end_group();
      }
    }

    double total() {
      end_group();
      return scale_;
    }

   private:
    void end_group() {
      scale_ += std::sqrt(product_above(of_narrow_, of_wide_));
      of_narrow_ = of_wide_ = 0.0;
      frames_ = 0;
    }

    double scale_ = 0.0, of_narrow_ = 0.0, of_wide_ = 0.0;
    int64_t frames_ = 0;
  };

  // sum [padded_, kStrip] += factor * narrow^T wide over one sample's frames, columns of `piece`. Returns,
  // on request, a number >= S = sum_t ||narrow_t|| ||wide_t|| of these columns.
  double product(const Piece& piece, int64_t i, size_t slot, double factor, double* sum,
                 bool with_scale) const {
    const dpk_tensor& wide = *factors_[piece.which].wide;
    const int64_t narrow_slot = 2 * static_cast<int64_t>(slot) + piece.which;
    const R* narrow_rows = narrow_ + narrow_slot * frames() * padded_;
    const double* narrow_squares = narrow_squares_ + narrow_slot * frames();
    const int64_t length = length_of(lengths_, i, frames());
    const Scratch<R> block(padded_ * kStrip), space(kChunk * kStrip);
    Bound bound;
    prefetch(wide, i, 0, length, piece);
    for (int64_t t0 = 0; t0 < length; t0 += kChunk) {
      const int64_t count = std::min(kChunk, length - t0);
      prefetch(wide, i, t0 + kChunk, length, piece);
      const Rows<R> rows(wide, i, t0, count, piece.column, piece.columns, k_.nr, space.get());
      const R* a = narrow_rows + t0 * padded_;
      for (int64_t j = 0; j < piece.columns; j += k_.nr)
        for (int64_t m = 0; m < padded_; m += k_.mr)
          k_.tile(a + m, padded_, rows.data + j, rows.ld, count, block.get() + m * kStrip + j, kStrip,
                  t0 % kBlock != 0);
      if (with_scale) bound.add(wide, i, t0, rows, count, piece, narrow_squares);
      if (t0 + count == length || (t0 + kChunk) % kBlock == 0)
        for (int64_t m = 0; m < r_; ++m)
          k_.accumulate(sum + m * kStrip, block.get() + m * kStrip, piece.columns, factor);
    }
    return bound.total();
  }

  // Errors of different strips are errors of different entries, so they add in squares: e = gamma sqrt(sum of
  // S^2 over strips).
  void finish(int which, int64_t i, const double* squares, const double* scales) const {
    const Factor& f = factors_[which];
    double square = 0.0, scale = 0.0;
    for (int64_t n = which == 0 ? 0 : strips(0), end = which == 0 ? strips(0) : strips(0) + strips(1);
         n < end; ++n) {
      square += squares[n];
      scale += product_above(scales[n], scales[n]);
    }
    const int64_t n = f.wide->size[2];
    const double s = std::fabs(f.scaling), entries = static_cast<double>(r_) * static_cast<double>(n);
    // A scaling in (0, infinity) takes part in float64; s * s * square and s * e keep the relative errors.
    const double e = error_bound<R>(length_of(lengths_, i, frames()), r_ * n, std::sqrt(scale));
    // A row of zeros beside a NaN is not in the scale, but in the square.
    f.norm_sq[i] = scale == 0.0 && square == 0.0 ? 0.0f : upper_square(s * s * square, entries + 4.0, s * e);
  }

  const Factor factors_[2];
  const int64_t* lengths_;
  const Micro<R>& k_;
  const int64_t r_, padded_;
  int threads_ = 1;
  std::vector<int64_t> indices_;
  R* narrow_ = nullptr;               // [2 * samples of the group, T, padded_]
  double* narrow_squares_ = nullptr;  // [2 * samples of the group, T]
};

void check(const dpk_tensor& x, const dpk_tensor& h, const dpk_tensor& g, const dpk_tensor& dh,
           double scaling, const int64_t* lengths) {
  check_tensor("x", x);
  check_tensor("h", h);
  check_tensor("g", g);
  check_tensor("dh", dh);
  for (const dpk_tensor* v : {&h, &g, &dh}) {
    check_same("the batch sizes of x and of h, g or dh", x.size[0], v->size[0]);
    check_same("the frames of x and of h, g or dh", x.size[1], v->size[1]);
  }
  check_same("the ranks of h and dh", h.size[2], dh.size[2]);
  if (!std::isfinite(scaling)) invalid_argument("scaling is %g; it must be finite", scaling);
  check_lengths(lengths, x.size[0], x.size[1]);
}

bool wide_input(const dpk_tensor& x, const dpk_tensor& h, const dpk_tensor& g, const dpk_tensor& dh) {
  return x.dtype == DPK_F64 || h.dtype == DPK_F64 || g.dtype == DPK_F64 || dh.dtype == DPK_F64;
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_lora_norm_sq(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                const dpk_tensor* dh, double scaling, const int64_t* lengths, int32_t threads,
                                float* out_a, float* out_b) {
  using namespace dpk;
  return guard([&] {
    check(*x, *h, *g, *dh, scaling, lengths);
    for_arithmetic(wide_input(*x, *h, *g, *dh), [&](auto r) {
      LoRA<decltype(r)>({dh, x, 1.0, out_a, nullptr, false}, {h, g, scaling, out_b, nullptr, true}, lengths,
                        threads)
          .norms();
    });
  });
}

dpk_status dpk_cpu_lora_gradients(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                  const dpk_tensor* dh, double scaling, int32_t threads, void* out_a,
                                  void* out_b) {
  using namespace dpk;
  return guard([&] {
    check(*x, *h, *g, *dh, scaling, nullptr);
    for_arithmetic(wide_input(*x, *h, *g, *dh), [&](auto r) {
      LoRA<decltype(r)>({dh, x, 1.0, nullptr, out_a, false}, {h, g, scaling, nullptr, out_b, true}, nullptr,
                        threads)
          .gradients();
    });
  });
}

dpk_status dpk_cpu_lora_weighted_sum(const dpk_tensor* x, const dpk_tensor* h, const dpk_tensor* g,
                                     const dpk_tensor* dh, double scaling, const double* factors,
                                     const int64_t* lengths, int32_t threads, void* out_a, void* out_b,
                                     dpk_dtype out_dtype) {
  using namespace dpk;
  return guard([&] {
    check(*x, *h, *g, *dh, scaling, lengths);
    check_out(out_dtype);
    for_arithmetic(wide_input(*x, *h, *g, *dh), [&](auto r) {
      LoRA<decltype(r)>({dh, x, 1.0, nullptr, out_a, false}, {h, g, scaling, nullptr, out_b, true}, lengths,
                        threads)
          .sums(factors, out_dtype);
    });
  });
}
