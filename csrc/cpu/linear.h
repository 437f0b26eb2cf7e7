// Code shared by the linear norm and the linear weighted sum: samples copied into panels, which the tile
// kernel reads in order.
#pragma once

#include <vector>

#include "cpu/views.h"

namespace dpk {

// The frames of sample i that add to its gradient: all but those where one row is all zero and the other
// finite. Padding is none of them, wherever it is, so neither a norm nor the bits of a sum depend on it.
template <class R>
std::vector<int64_t> own_frames(const dpk_tensor& x, const dpk_tensor& g, int64_t i, int64_t length);

// Copies own frames [t0, t1) of sample i into panels (micro.h), frame own[t] at t*width; panels lie
// own.size()*width apart. square_norms[t], unless null, becomes an upper bound of the square of its norm.
template <class R>
void pack_frames(const dpk_tensor& v, int64_t i, const std::vector<int64_t>& own, int64_t t0, int64_t t1,
                 const Panel<R>& panel, R* panels, double* square_norms);

// Elements of all panels of `length` frames of n columns.
template <class R>
int64_t packed_size(const Panel<R>& panel, int64_t length, int64_t n) {
  return round_to(n, panel.width) * length;
}

// Tall panels of a band: so many tiles read a wide panel while it is in the first-level cache.
constexpr int64_t kBandPanels = 4;
// Elements of the largest band of any instruction set (micro.h: tall.width <= 12, nr <= 32).
constexpr int64_t kMostBand = kBandPanels * 12 * 32;

// out[m][n] = sum over t < frames <= kBlock of a[t][m] b[t][n], in the order of Micro::tile, for m < rows:
// tall panels a, `apart` elements apart, times one wide panel b. Returns the number of rows written.
template <class R>
int64_t band_product(const R* a, int64_t apart, const R* b, int64_t frames, int64_t rows, R* out) {
  const Micro<R>& k = micro<R>();
  int64_t t0 = 0, written = 0;
  do {  // once also for no frames, which stores zeros
    const int64_t near = std::min(kNear, frames - t0);
    written = 0;
    for (int64_t m = 0; m < rows; m += k.tall.width)
      written += k.tall_tile(a + m / k.tall.width * apart + t0 * k.tall.width, b + t0 * k.nr, near, rows - m,
                             out + m * k.nr, t0 > 0);
    t0 += kNear;
  } while (t0 < frames);
  return written;
}

// A sum takes samples in groups whose panels fit in about this much memory: its output is read and written
// once a group.
constexpr int64_t kGroupBytes = int64_t{16} << 20;
// Frames packed by one call.
constexpr int64_t kPackFrames = 32;

}  // namespace dpk
