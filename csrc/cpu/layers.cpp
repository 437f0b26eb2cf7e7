// Norms and weighted sums of layers whose gradient is read off in one pass: bias, layer norm, embedding,
// depthwise convolution.
#include <algorithm>
#include <cmath>

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
        scale += scales[static_cast<size_t>(n)] *
                 scales[static_cast<size_t>(n)];  // different columns: errors add in squares
      }
      const double e = error_bound<R>(length_of(lengths_, i, g_.size[1]), g_.size[2], std::sqrt(scale));
      out[i] = scale == 0.0 ? 0.0f : upper_square(square, static_cast<double>(g_.size[2]), e);
    }
  }

  void sums(const double* factors, void* out, dpk_dtype dtype) const {
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
  // sum += factor * (sample i's column sums); returns S of these columns.
  double add(int64_t i, int64_t strip, double factor, double* sum) const {
    const int64_t first = strip * kStrip, columns = std::min(kStrip, g_.size[2] - first),
                  length = length_of(lengths_, i, g_.size[1]);
    alignas(64) R part[kStrip], g_space[kRows * kStrip], x_space[kRows * kStrip];
    double scale = 0.0;
    for (int64_t t0 = 0; t0 < length; t0 += kRows) {
      const int64_t count = std::min(kRows, length - t0);
      const Rows<R> g(g_, i, t0, count, first, columns, 1, g_space);
      double squares;
      if (x_ == nullptr) {
        squares = k_.add_rows(g.data, g.ld, count, columns, part);
      } else {
        const Rows<R> x(*x_, i, t0, count, first, columns, 1, x_space);
        squares = k_.add_products(x.data, x.ld, g.data, g.ld, count, columns, part);
      }
      micro<R>().accumulate(sum, part, columns, factor);
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

// Frames in the order of their ids, equal ids in the order of frames.
struct Token {
  int64_t id, frame;  // frame: i * T + t
  bool operator<(const Token& other) const { return id != other.id ? id < other.id : frame < other.frame; }
};

// Embedding norms: rows of equal ids are summed in R, 64 at a time, then in float64. Bound as for ColumnSums,
// per id:
// ||error|| <= 65 u sqrt(sum over ids of (sum_t ||g_t||)^2).
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
          norms = std::sqrt(own) * 1.001;
          break;
        }
        norms += std::sqrt(k.square_sum_above(row.data, d));
        if ((n - first) % kChunk == 0) std::fill(part.begin(), part.end(), R(0));
        layer_micro<R>().add_row(part.data(), row.data, d);
        if ((n - first) % kChunk == kChunk - 1 || n + 1 == end)
          k.accumulate(total.data(), part.data(), d, 1.0);
      }
      if (end - first > 1) square += k.dot(total.data(), total.data(), d);
      scale += norms * norms;
    }
    const double terms = static_cast<double>(frames) * static_cast<double>(d);
    out[i] = scale == 0.0 ? 0.0f
                          : upper_square(square, terms, error_bound<R>(frames, frames * d, std::sqrt(scale)));
  });
}

// Embedding sums: every row of `out` belongs to one piece of work, which adds factor * g in float64, sample
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

// Depthwise convolution: of channel c, tap j the gradient is the correlation sum_t g[t] x[t*stride +
// j*dilation - padding]. x is copied with its zero padding into one row per phase of the stride, so that
// every tap reads consecutive frames.
//
// Bound: a lane of the vector sums at most 64 products and the lanes are then added pairwise (at most 4
// levels), so a product meets min(n,64) + 5 roundings; pieces of 16*64 frames are added in float64. |error of
// tap j| <= gamma sum_t |g_t||x_..| <= gamma ||g_c|| ||x_c||, so S of the channel is sqrt(k) ||g_c|| ||x_c||.
// kappa() counts up to 8 merges, which covers the 5.
template <class R>
class Depthwise {
 public:
  Depthwise(const dpk_tensor& x, const dpk_tensor& g, int64_t taps, int64_t stride, int64_t padding,
            int64_t dilation, int32_t threads)
      : x_(x),
        g_(g),
        taps_(taps),
        stride_(stride),
        padding_(padding),
        dilation_(dilation),
        frames_(round_to(g.size[2], kLanesMost)) {
    // Phase f of the padded input holds frames f, f + stride, ...; the last tap reads up to frames_ beyond
    // its offset.
    phase_ = frames_ + (taps - 1) * dilation / stride + 1;
    for (int64_t j = 0; j < taps; ++j)
      offsets_.push_back(j * dilation % stride * phase_ + j * dilation / stride);
    threads_ = worthwhile_threads(threads, static_cast<double>(x.size[0]) * static_cast<double>(x.size[1]) *
                                               static_cast<double>(frames_) * static_cast<double>(taps) / 8);
  }

  void norms(float* out) const {
    const int64_t pieces = ceil_div(x_.size[1], kChannels);
    std::vector<double> squares(static_cast<size_t>(x_.size[0] * pieces)), scales(squares.size());
    parallel_for(static_cast<int64_t>(squares.size()), threads_, [&](int64_t n, int) {
      Channel channel(*this);
      double square = 0.0, scale = 0.0;
      for (int64_t c = n % pieces * kChannels, end = std::min(c + kChannels, x_.size[1]); c < end; ++c) {
        scale += channel.correlate(*this, n / pieces, c, true);
        square += micro<double>().square_sum(channel.sums.data(), taps_);
      }
      squares[static_cast<size_t>(n)] = square;
      scales[static_cast<size_t>(n)] = scale;
    });
    for (int64_t i = 0; i < x_.size[0]; ++i) {
      double square = 0.0, scale = 0.0;
      for (int64_t n = i * pieces; n < (i + 1) * pieces; ++n) {
        square += squares[static_cast<size_t>(n)];
        scale += scales[static_cast<size_t>(n)];
      }
      const int64_t entries = x_.size[1] * taps_;
      const double e = error_bound<R>(g_.size[2], entries, std::sqrt(scale * static_cast<double>(taps_)));
      out[i] = scale == 0.0 ? 0.0f : upper_square(square, static_cast<double>(entries), e);
    }
  }

  void sums(const double* factors, void* out, dpk_dtype dtype) const {
    parallel_for(ceil_div(x_.size[1], kChannels), threads_, [&](int64_t piece, int) {
      Channel channel(*this);
      std::vector<double> total(static_cast<size_t>(taps_));
      for (int64_t c = piece * kChannels, end = std::min(c + kChannels, x_.size[1]); c < end; ++c) {
        read_out(out, dtype, c * taps_, taps_, total.data());
        for (int64_t i = 0; i < x_.size[0]; ++i) {
          if (factors[i] == 0.0) continue;
          channel.correlate(*this, i, c, false);
          micro<double>().accumulate(total.data(), channel.sums.data(), taps_, factors[i]);
        }
        write_out(out, dtype, c * taps_, taps_, total.data());
      }
    });
  }

 private:
  static constexpr int64_t kLanesMost = 16, kMost = kLanesMost * kChunk, kChannels = 16;

  struct Channel {
    explicit Channel(const Depthwise& of)
        : x(static_cast<size_t>(of.phase_ * of.stride_), R(0)),
          g(static_cast<size_t>(of.frames_), R(0)),
          part(static_cast<size_t>(of.taps_)),
          row(static_cast<size_t>(of.x_.size[2])),
          sums(static_cast<size_t>(of.taps_)) {}

    // Leaves the channel's gradient in `sums`; returns an upper bound of ||g||^2 ||x||^2 when asked to.
    double correlate(const Depthwise& of, int64_t i, int64_t c, bool with_scale) {
      const Micro<R>& k = micro<R>();
      const int64_t out_frames = of.g_.size[2], frames = of.x_.size[2];
      k.load(at(of.g_, i, c, 0), of.g_.dtype, of.g_.stride[2], out_frames, g.data());
      // x[t] goes to padded frame t + padding = stride * m + phase; frames that no tap reads are left out.
      const int64_t last = (out_frames - 1) * of.stride_ + (of.taps_ - 1) * of.dilation_ - of.padding_;
      const int64_t used = out_frames == 0 ? 0 : std::max<int64_t>(0, std::min(frames, last + 1));
      if (of.stride_ == 1) {
        k.load(at(of.x_, i, c, 0), of.x_.dtype, of.x_.stride[2], used, x.data() + of.padding_);
      } else {
        k.load(at(of.x_, i, c, 0), of.x_.dtype, of.x_.stride[2], used, row.data());
        for (int64_t t = 0; t < used; ++t) {
          const int64_t padded = t + of.padding_;
          x[static_cast<size_t>(padded % of.stride_ * of.phase_ + padded / of.stride_)] =
              row[static_cast<size_t>(t)];
        }
      }
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t t = 0; t < of.frames_; t += kMost) {
        layer_micro<R>().correlate(x.data() + t, of.offsets_.data(), of.taps_, g.data() + t,
                                   std::min(kMost, of.frames_ - t), part.data());
        for (int64_t j = 0; j < of.taps_; ++j) sums[static_cast<size_t>(j)] += part[static_cast<size_t>(j)];
      }
      if (!with_scale) return 0.0;
      return k.square_sum_above(g.data(), out_frames) *
             k.square_sum_above(x.data(), static_cast<int64_t>(x.size()));
    }

    std::vector<R> x, g, part, row;
    std::vector<double> sums;
  };

  const dpk_tensor& x_;
  const dpk_tensor& g_;
  const int64_t taps_, stride_, padding_, dilation_, frames_;
  int64_t phase_ = 0;
  std::vector<int64_t> offsets_;
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

void check_depthwise(const dpk_tensor& x, const dpk_tensor& g, int64_t taps, int64_t stride, int64_t padding,
                     int64_t dilation) {
  check_tensor("x", x);
  check_tensor("g", g);
  check_same("the batch sizes of x and g", x.size[0], g.size[0]);
  check_same("the channels of x and g", x.size[1], g.size[1]);
  if (taps < 1 || stride < 1 || padding < 0 || dilation < 1)
    invalid_argument(
        "kernel_size, stride, padding and dilation are %lld, %lld, %lld, %lld; give at least 1, 1, 0, 1",
        static_cast<long long>(taps), static_cast<long long>(stride), static_cast<long long>(padding),
        static_cast<long long>(dilation));
  const int64_t room = x.size[2] + 2 * padding - dilation * (taps - 1) - 1,
                expected = room < 0 ? 0 : room / stride + 1;
  check_same("the frames of g and those that x, kernel_size, stride, padding and dilation give", g.size[2],
             expected);
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

dpk_status dpk_cpu_depthwise_conv1d_norm_sq(const dpk_tensor* x, const dpk_tensor* g, int64_t kernel_size,
                                            int64_t stride, int64_t padding, int64_t dilation,
                                            int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_depthwise(*x, *g, kernel_size, stride, padding, dilation);
    for_arithmetic(x->dtype == DPK_F64 || g->dtype == DPK_F64, [&](auto r) {
      Depthwise<decltype(r)>(*x, *g, kernel_size, stride, padding, dilation, threads).norms(out);
    });
  });
}

dpk_status dpk_cpu_depthwise_conv1d_weighted_sum(const dpk_tensor* x, const dpk_tensor* g,
                                                 const double* factors, int64_t kernel_size, int64_t stride,
                                                 int64_t padding, int64_t dilation, int32_t threads,
                                                 void* out, dpk_dtype out_dtype) {
  using namespace dpk;
  return guard([&] {
    check_depthwise(*x, *g, kernel_size, stride, padding, dilation);
    check_out(out_dtype);
    for_arithmetic(x->dtype == DPK_F64 || g->dtype == DPK_F64, [&](auto r) {
      Depthwise<decltype(r)>(*x, *g, kernel_size, stride, padding, dilation, threads)
          .sums(factors, out, out_dtype);
    });
  });
}
