// Squared norms of per-sample gradients of a linear layer, ||g_i^T x_i||^2, without materialising them.
//
// direct: tiles of g_i^T x_i are summed over frames in registers, squared and summed in float64. Work 2 T p
// d. gram:   sum_ts (x_t.x_s)(g_t.g_s), upper half of the T x T blocks. Work T^2 (p + d). Each (sample, panel
// of rows) gives one float64 partial sum, added in order: neither threads nor the rest of the batch change a
// bit.
#include "cpu/linear.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "cpu/bounds.h"

namespace dpk {

template <class R>
std::vector<int64_t> own_frames(const dpk_tensor& x, const dpk_tensor& g, int64_t i, int64_t length) {
  std::vector<R> space(static_cast<size_t>(std::max<int64_t>({g.size[2], x.size[2], 1})));
  const auto finite = [&](const dpk_tensor& v, int64_t t) {
    const Rows<R> row(v, i, t, 1, 0, v.size[2], 1, space.data());
    return micro<R>().all_finite(row.data, v.size[2]);
  };
  std::vector<int64_t> own;
  own.reserve(static_cast<size_t>(length));
  for (int64_t t = 0; t < length; ++t) {
    const bool g_is_zero = is_zero(g, i, t, 0, g.size[2]), x_is_zero = is_zero(x, i, t, 0, x.size[2]);
    if ((g_is_zero || x_is_zero) && (g_is_zero || finite(g, t)) && (x_is_zero || finite(x, t))) continue;
    own.push_back(t);
  }
  return own;
}

// Whether a column's frames lie side by side in memory: a convolution's layout, [B,C,T] seen as [B,T,C].
// Reading it row by row would touch a cache line for every entry.
template <class R>
bool channels_first(const dpk_tensor& v) {
  return v.dtype == kDtype<R> && v.stride[1] == 1 && v.stride[2] != 1;
}

// The squared norms of a convolution's frames, run by run: their bits are those of adjacent frames.
template <class R>
void squares_of_channels(const dpk_tensor& v, int64_t i, const int64_t* frame, int64_t frames, double* out) {
  for (int64_t r = 0; r < frames;) {
    int64_t run = 1;
    while (r + run < frames && frame[r + run] == frame[r] + run) ++run;
    // The float64 roundings of n additions are below the slack that the bounds leave for them (bounds.h).
    micro<R>().column_squares(reinterpret_cast<const R*>(at(v, i, frame[r], 0)), v.stride[2], v.size[2], run,
                              out + r);
    r += run;
  }
}

template <class R>
void pack_frames(const dpk_tensor& v, int64_t i, const std::vector<int64_t>& own, int64_t t0, int64_t t1,
                 const Panel<R>& panel, R* panels, double* square_norms) {
  const Micro<R>& k = micro<R>();
  const int64_t n = v.size[2], width = panel.width, length = static_cast<int64_t>(own.size());
  const int64_t* const frame = own.data();
  R* dst = panels + t0 * width;
  const bool by_channel = channels_first<R>(v) && t0 < t1;
  if (by_channel && square_norms != nullptr)
    squares_of_channels<R>(v, i, frame + t0, t1 - t0, square_norms + t0);
  if (by_channel && frame[t1 - 1] - frame[t0] == t1 - 1 - t0) {
    const R* rows = reinterpret_cast<const R*>(at(v, i, frame[t0], 0));
    for (int64_t j = 0; j < n; j += width, dst += length * width) {
      const R* src = rows + j * v.stride[2];
      const int64_t columns = std::min(width, n - j);
      if (columns == width) {
        panel.transpose(src, v.stride[2], t1 - t0, dst);
        continue;
      }
      std::fill_n(dst, (t1 - t0) * width, R(0));
      for (int64_t r = 0; r < columns; ++r)
        for (int64_t t = 0; t < t1 - t0; ++t) dst[t * width + r] = src[r * v.stride[2] + t];
    }
    return;
  }
  std::vector<R> space(static_cast<size_t>(n));
  for (int64_t t = t0; t < t1; ++t, dst += width) {
    const Rows<R> row(v, i, frame[t], 1, 0, n, 1, space.data());
    if (square_norms != nullptr && !by_channel) square_norms[t] = k.square_sum_above(row.data, n);
    panel.pack(row.data, n, dst, length * width);
  }
}

namespace {

// Copies own frames [t0, t0+nr) of sample i feature by feature: feature j of own frame t0+r at j*nr + r,
// zeros for frames that it does not have.
template <class R>
void pack_transposed(const dpk_tensor& v, int64_t i, const std::vector<int64_t>& own, int64_t t0, R* panel,
                     double* square_norms) {
  const Micro<R>& k = micro<R>();
  const int64_t n = v.size[2], width = k.nr, frames = std::min(width, static_cast<int64_t>(own.size()) - t0);
  const int64_t* const frame = own.data() + t0;
  const bool adjacent = frame[frames - 1] - frame[0] == frames - 1;
  const bool by_channel = channels_first<R>(v);
  if (by_channel) squares_of_channels<R>(v, i, frame, frames, square_norms + t0);
  if (by_channel && adjacent) {
    const R* rows = reinterpret_cast<const R*>(at(v, i, frame[0], 0));
    for (int64_t j = 0; j < n; ++j, panel += width) {
      std::copy_n(rows + j * v.stride[2], frames, panel);
      std::fill(panel + frames, panel + width, R(0));
    }
    return;
  }
  const bool in_place = n > 0 && v.dtype == kDtype<R> && v.stride[2] == 1 && frames == width && adjacent;
  const Scratch<R> space(in_place ? 0 : width * n);
  for (int64_t r = 0; !in_place && r < width; ++r) {
    R* row = space.get() + r * n;
    if (r < frames)
      k.load(at(v, i, frame[r], 0), v.dtype, v.stride[2], n, row);
    else
      std::fill_n(row, n, R(0));
  }
  const R* data = in_place ? reinterpret_cast<const R*>(at(v, i, frame[0], 0)) : space.get();
  const int64_t ld = in_place ? v.stride[1] : n;
  for (int64_t r = 0; r < frames && !by_channel; ++r)
    square_norms[t0 + r] = k.square_sum_above(data + r * ld, n);
  k.wide.transpose(data, ld, n, panel);
}

template <class R>
class Norms {
 public:
  Norms(const dpk_tensor& x, const dpk_tensor& g, int32_t threads, float* out)
      : x_(x), g_(g), threads_(threads), out_(out), k_(micro<R>()) {}

  // Threads take whole samples: what one packs, it multiplies, and the panels stay in its own caches. Shared
  // between two cores' threads, the same work took 0.67 instead of 0.5 of one thread's time. The samples that
  // are left over, fewer than threads, are divided among all of them.
  void run(const int64_t* lengths, int32_t method) {
    const int64_t count = x_.size[0];
    const int threads = worthwhile_threads(
        threads_, static_cast<double>(count) * operations(static_cast<double>(x_.size[1])));
    const int64_t whole = count - count % threads;
    parallel_for(whole, threads, [&](int64_t i, int worker) {
      norm(i, length_of(lengths, i, x_.size[1]), method, 1, worker);
    });
    for (int64_t i = whole; i < count; ++i) norm(i, length_of(lengths, i, x_.size[1]), method, threads, 0);
  }

 private:
  // Half-Gram is chosen below this share of direct's operations. Measured (Zen 4, AVX-512, one thread; share
  // of operations -> share of time): 0.24 -> 0.39, 0.81 -> 0.99, 1.04 -> 1.43, 1.3 -> 2.0. It packs by
  // transposing, computes whole blocks on the diagonal, and may have to be redone.
  static constexpr double kGramShare = 0.75;

  int64_t panels(int64_t n) const { return ceil_div(n, k_.nr); }

  // A lower estimate of a sample's operations, in vectors of 16.
  double operations(double frames) const {
    const double p = static_cast<double>(g_.size[2]), d = static_cast<double>(x_.size[2]);
    return frames * std::min(frames * (p + d), 2.0 * p * d) / 32;
  }

  void norm(int64_t i, int64_t given, int32_t method, int threads, int worker) const {
    const double p = static_cast<double>(g_.size[2]), d = static_cast<double>(x_.size[2]);
    // By the sample's own frames: a norm's form, and whether Gram's bound is tight enough, are then its own.
    const std::vector<int64_t> own = own_frames<R>(x_, g_, i, given);
    const auto frames = static_cast<double>(own.size());
    const bool fewer = frames * (p + d) < kGramShare * 2.0 * p * d;
    const bool by_gram = method == DPK_GRAM || (method == DPK_AUTO && fewer);
    const Task task{i, own, threads, worker};
    if (!by_gram || !gram(task)) direct(task);
  }

  // One sample's norm, by so many threads; `worker`'s memory holds its panels.
  struct Task {
    int64_t index;
    const std::vector<int64_t>& own;
    int threads, worker;

    int64_t length() const { return static_cast<int64_t>(own.size()); }
  };

  // S = sum_t ||x_t|| ||g_t||, and the sums of the row norms themselves.
  struct Scale {
    double both = 0.0, x = 0.0, g = 0.0;
  };
  static Scale scale(const std::vector<double>& x_rows, const std::vector<double>& g_rows) {
    Scale s;
    for (size_t t = 0; t < x_rows.size(); ++t) {
      const double x = std::sqrt(x_rows[t]), g = std::sqrt(g_rows[t]);
      s.both += product_above(x, g);
      s.x += x;
      s.g += g;
    }
    return s;
  }

  // c (nr x nr doubles) = a^T b over n rows of two packed panels.
  void block(const R* a, const R* b, int64_t n, R* tiles, double* c) const {
    const int64_t width = k_.nr;
    std::fill(c, c + width * width, 0.0);
    for (int64_t n0 = 0; n0 < n; n0 += kBlock) {
      const int64_t end = std::min(n0 + kBlock, n);
      for (int64_t n1 = n0; n1 < end; n1 += kNear)
        for (int64_t m = 0; m < width; m += k_.mr)
          k_.tile(a + n1 * width + m, width, b + n1 * width, width, std::min(kNear, end - n1),
                  tiles + m * width, width, n1 > n0);
      k_.accumulate(c, tiles, width * width, 1.0);
    }
  }

  // The sum of squares of a band's rows (at most `rows` of them exist) times a wide panel's columns.
  double band_squares(const R* a, const R* b, int64_t length, int64_t rows, R* tiles, double* sum) const {
    const int64_t apart = length * k_.tall.width;
    if (length <= kBlock) return k_.square_sum(tiles, band_product(a, apart, b, length, rows, tiles) * k_.nr);
    std::fill_n(sum, kMostBand, 0.0);
    int64_t size = 0;
    for (int64_t t0 = 0; t0 < length; t0 += kBlock) {
      const int64_t frames = std::min(kBlock, length - t0);
      size = band_product(a + t0 * k_.tall.width, apart, b + t0 * k_.nr, frames, rows, tiles) * k_.nr;
      k_.accumulate(sum, tiles, size, 1.0);
    }
    return k_.dot(sum, sum, size);
  }

  void direct(const Task& task) const {
    const int64_t d = x_.size[2], p = g_.size[2], length = task.length();
    const int64_t band = kBandPanels * k_.tall.width, bands = ceil_div(p, band), columns = panels(d);
    const int64_t x_size = packed_size(k_.wide, length, d);
    const Workspace workspace((x_size + packed_size(k_.tall, length, p)) * kSize, task.worker);
    R* const x = workspace.as<R>();
    R* const g = x + x_size;
    std::vector<double> x_rows(static_cast<size_t>(length)), g_rows(static_cast<size_t>(length));
    parallel_for(ceil_div(length, kPackFrames), task.threads, [&](int64_t n, int) {
      const int64_t t0 = n * kPackFrames, t1 = std::min(t0 + kPackFrames, length);
      pack_frames<R>(x_, task.index, task.own, t0, t1, k_.wide, x, x_rows.data());
      pack_frames<R>(g_, task.index, task.own, t0, t1, k_.tall, g, g_rows.data());
    });

    std::vector<double> partial(static_cast<size_t>(bands));
    parallel_for(bands, task.threads, [&](int64_t n, int) {
      const int64_t first = n * band, rows = std::min(band, p - first);
      alignas(64) R tiles[kMostBand];
      alignas(64) double sum[kMostBand];
      double square = 0.0;
      for (int64_t column = 0; column < columns; ++column)
        square += band_squares(g + first * length, x + column * length * k_.nr, length, rows, tiles, sum);
      partial[static_cast<size_t>(n)] = square;
    });

    const Scale scales = scale(x_rows, g_rows);
    double square = 0.0;
    for (const double part : partial) square += part;
    const double entries = static_cast<double>(p) * static_cast<double>(d);
    out_[task.index] =
        scales.both == 0.0 ? 0.0f : upper_square(square, entries, error_bound<R>(length, p * d, scales.both));
  }

  // Whether the bound was tight enough; if not, nothing is written.
  //
  // |computed - exact| <= sum_ts of errors of (x_t.x_s)(g_t.g_s) <= (gamma_d + gamma_p + gamma_d gamma_p)
  // S^2, as sum_ts ||x_t|| ||x_s|| ||g_t|| ||g_s|| = S^2; products and their sum in float64 add T^2 2^-52
  // S^2. An entry below the smallest normal number is off by n * 2^-126, which counts times the other factor:
  // (sum_t ||g_t||)^2 or (sum_t ||x_t||)^2.
  bool gram(const Task& task) const {
    const int64_t d = x_.size[2], p = g_.size[2], length = task.length(), width = k_.nr;
    const int64_t rows = panels(length), x_size = rows * width * d;
    const Workspace workspace((x_size + rows * width * p) * kSize, task.worker);
    R* const x = workspace.as<R>();
    R* const g = x + x_size;
    std::vector<double> x_rows(static_cast<size_t>(length)), g_rows(static_cast<size_t>(length));
    parallel_for(rows, task.threads, [&](int64_t n, int) {
      pack_transposed<R>(x_, task.index, task.own, n * width, x + n * width * d, x_rows.data());
      pack_transposed<R>(g_, task.index, task.own, n * width, g + n * width * p, g_rows.data());
    });

    std::vector<double> partial(static_cast<size_t>(rows));
    parallel_for(rows, task.threads, [&](int64_t row, int) {
      alignas(64) R tiles[kMostBlock];
      alignas(64) double xx[kMostBlock], gg[kMostBlock];
      double square = 0.0;
      for (int64_t column = row; column < rows; ++column) {
        block(x + row * width * d, x + column * width * d, d, tiles, xx);
        block(g + row * width * p, g + column * width * p, p, tiles, gg);
        square += (column == row ? 1.0 : 2.0) * k_.dot(xx, gg, width * width);
      }
      partial[static_cast<size_t>(row)] = square;
    });

    const Scale scales = scale(x_rows, g_rows);
    if (scales.both == 0.0) {
      out_[task.index] = 0.0f;
      return true;
    }
    if (!std::isfinite(scales.both)) {
      out_[task.index] = std::numeric_limits<float>::quiet_NaN();
      return true;
    }
    double square = 0.0;
    for (const double part : partial) square += part;
    const double frames = static_cast<double>(length), u = kUnit<R>;
    const double gamma_d = kappa(d) * u * 1.01, gamma_p = kappa(p) * u * 1.01;
    const double tiny_x = 2.0 * static_cast<double>(d) * kTiniest<R>,
                 tiny_g = 2.0 * static_cast<double>(p) * kTiniest<R>;
    const double error = (gamma_d + gamma_p + gamma_d * gamma_p + (frames * frames + 8.0) * 0x1p-52) *
                             scales.both * scales.both +
                         tiny_x * scales.g * scales.g + tiny_g * scales.x * scales.x +
                         tiny_x * tiny_g * frames * frames;
    if (!(error <= 0.01 * square)) return false;  // also for NaN and for a negative square
    out_[task.index] = upper_square(square + error, 0.0, error_bound<R>(length, p * d, scales.both));
    return true;
  }

  static constexpr int64_t kSize = static_cast<int64_t>(sizeof(R));
  // Largest block of any instruction set (micro.h: nr <= 32).
  static constexpr int kMostBlock = 32 * 32;

  const dpk_tensor& x_;
  const dpk_tensor& g_;
  int32_t threads_;
  float* out_;
  const Micro<R>& k_;
};

}  // namespace

template std::vector<int64_t> own_frames<float>(const dpk_tensor&, const dpk_tensor&, int64_t, int64_t);
template std::vector<int64_t> own_frames<double>(const dpk_tensor&, const dpk_tensor&, int64_t, int64_t);
template void pack_frames<float>(const dpk_tensor&, int64_t, const std::vector<int64_t>&, int64_t, int64_t,
                                 const Panel<float>&, float*, double*);
template void pack_frames<double>(const dpk_tensor&, int64_t, const std::vector<int64_t>&, int64_t, int64_t,
                                  const Panel<double>&, double*, double*);

}  // namespace dpk

dpk_status dpk_cpu_linear_norm_sq(const dpk_tensor* x, const dpk_tensor* g, const int64_t* lengths,
                                  int32_t method, int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_tensor("x", *x);
    check_tensor("g", *g);
    check_same("the batch sizes of x and g", x->size[0], g->size[0]);
    check_same("the frames of x and g", x->size[1], g->size[1]);
    check_lengths(lengths, x->size[0], x->size[1]);
    if (method != DPK_AUTO && method != DPK_GRAM && method != DPK_DIRECT)
      invalid_argument("method is %d", static_cast<int>(method));
    for_arithmetic(x->dtype == DPK_F64 || g->dtype == DPK_F64,
                   [&](auto r) { Norms<decltype(r)>(*x, *g, threads, out).run(lengths, method); });
  });
}
