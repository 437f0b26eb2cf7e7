// Norms and weighted sums of depthwise convolutions: every channel's gradient is a short correlation.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "cpu/bounds.h"
#include "cpu/views.h"

namespace dpk {
namespace {

// Depthwise convolution: of channel c, tap j the gradient is the correlation sum_t g[t] x[t*stride +
// j*dilation - padding]. x is copied with its zero padding into one row per phase of the stride, so that
// every tap reads consecutive frames.
//
// Bound: a lane of the vector sums at most 64 products and the lanes are then added pairwise (at most 4
// levels), so a product meets min(n,64) + 5 roundings; pieces of 16*64 frames are added in float64. |error of
// tap j| <= gamma sum_t |g_t||x_..|, the same correlation of |x| and |g|, and S of the channel is the root of
// the sum of their squares. ||g_c|| ||x_c|| would be cheaper, but padding adds to it: x is rarely 0 there.
// kappa() counts up to 8 merges, which covers the 5.
template <class R>
class Depthwise {
 public:
  Depthwise(const dpk_tensor& x, const dpk_tensor& g, int64_t taps, int64_t stride, int64_t padding,
            int64_t dilation, int32_t threads)
      : x_(x),
        g_(g),
        taps_(taps),
        stride_(g.size[2] > 1 ? stride : 1),  // one frame of g has none
        padding_(padding),
        dilation_(dilation),
        frames_(round_to(g.size[2], kLanesMost)) {
    // Phase f of the padded input holds frames f, f + stride, ...; the last tap reads up to frames_ beyond
    // its offset.
    phase_ = frames_ + (taps - 1) * dilation / stride_ + 1;
    for (int64_t j = 0; j < taps; ++j)
      offsets_.push_back(j * dilation % stride_ * phase_ + j * dilation / stride_);
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
        channel.correlate(*this, n / pieces, c);
        square += micro<double>().square_sum(channel.sums.data(), taps_);
        scale += channel.scale(*this);
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
      const double e = error_bound<R>(g_.size[2], entries, std::sqrt(scale));
      // Where a zero meets a NaN, the square has it; the scale may be one of zeros.
      out[i] = scale == 0.0 && square == 0.0 ? 0.0f : upper_square(square, static_cast<double>(entries), e);
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
          channel.correlate(*this, i, c);
          micro<double>().accumulate(total.data(), channel.sums.data(), taps_, factors[i]);
        }
        write_out(out, dtype, c * taps_, taps_, total.data());
      }
    });
  }

 private:
  static constexpr int64_t kLanesMost = 16, kChannels = 16;

  struct Channel {
    explicit Channel(const Depthwise& of)
        : x(static_cast<size_t>(of.phase_ * of.stride_), R(0)),
          g(static_cast<size_t>(of.frames_), R(0)),
          part(static_cast<size_t>(of.taps_)),
          row(static_cast<size_t>(of.x_.size[2])),
          sums(static_cast<size_t>(of.taps_)) {}

    // Leaves the channel's gradient in `sums`.
    void correlate(const Depthwise& of, int64_t i, int64_t c) {
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
      add_taps(of);
    }

    // S^2 of the channel that `correlate` left here, and no smaller; its x, g and sums are lost. 1e-5 covers
    // the rounding of a tap's terms. A tap whose products all underflowed to 0 counts as the smallest number:
    // what was taken from it is in absolute().
    double scale(const Depthwise& of) {
      const Micro<R>& k = micro<R>();
      const double most = product_above(k.square_sum_above(g.data(), of.g_.size[2]),
                                        k.square_sum_above(x.data(), static_cast<int64_t>(x.size())));
      if (most == 0.0) return 0.0;
      for (R& value : x) value = std::fabs(value);
      for (R& value : g) value = std::fabs(value);
      add_taps(of);
      double squares = 0.0;
      for (double terms : sums) squares += product_above(terms, terms);
      return std::max(squares * 1.00002, std::numeric_limits<double>::denorm_min());
    }

    std::vector<R> x, g, part, row;
    std::vector<double> sums;

   private:
    void add_taps(const Depthwise& of) {
      std::fill(sums.begin(), sums.end(), 0.0);
      const LayerMicro<R>& k = layer_micro<R>();
      const int64_t most = k.lanes * kChunk;
      for (int64_t t = 0; t < of.frames_; t += most) {
        k.correlate(x.data() + t, of.offsets_.data(), of.taps_, g.data() + t, std::min(most, of.frames_ - t),
                    part.data());
        for (int64_t j = 0; j < of.taps_; ++j) sums[static_cast<size_t>(j)] += part[static_cast<size_t>(j)];
      }
    }
  };

  const dpk_tensor& x_;
  const dpk_tensor& g_;
  const int64_t taps_, stride_, padding_, dilation_, frames_;
  int64_t phase_ = 0;
  std::vector<int64_t> offsets_;
  int threads_ = 1;
};

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
  int64_t padded = 0, reach = 0;
  if (__builtin_mul_overflow(padding, int64_t{2}, &padded) ||
      __builtin_add_overflow(padded, x.size[2], &padded) ||
      __builtin_mul_overflow(dilation, taps - 1, &reach))
    invalid_argument(
        "kernel_size, padding and dilation are %lld, %lld, %lld: their sizes in frames are beyond 64 bits",
        static_cast<long long>(taps), static_cast<long long>(padding), static_cast<long long>(dilation));
  const int64_t expected = padded <= reach ? 0 : (padded - reach - 1) / stride + 1;
  check_same("the frames of g and those that x, kernel_size, stride, padding and dilation give", g.size[2],
             expected);
}

}  // namespace
}  // namespace dpk

dpk_status dpk_cpu_depthwise_conv1d_norm_sq(const dpk_tensor* x, const dpk_tensor* g, int64_t kernel_size,
                                            int64_t stride, int64_t padding, int64_t dilation,
                                            int32_t threads, float* out) {
  using namespace dpk;
  return guard([&] {
    check_depthwise(*x, *g, kernel_size, stride, padding, dilation);
    if (g->size[2] == 0) {  // however far the taps reach
      worthwhile_threads(threads, 0.0);
      std::fill_n(out, x->size[0], 0.0f);
      return;
    }
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
    if (g->size[2] == 0) {
      worthwhile_threads(threads, 0.0);
      return;
    }
    for_arithmetic(x->dtype == DPK_F64 || g->dtype == DPK_F64, [&](auto r) {
      Depthwise<decltype(r)>(*x, *g, kernel_size, stride, padding, dilation, threads)
          .sums(factors, out, out_dtype);
    });
  });
}
