// Code shared by the linear norm and the linear weighted sum: samples copied into panels, which the tile
// kernel reads in order.
#pragma once

#include <vector>

#include "cpu/views.h"

namespace dpk {

// Frames of sample i that can matter: the given length less trailing frames where g is all zero (and x
// finite, so that 0 * x is 0). Padding that a loss ignores has g = 0 exactly, so skipping it changes no
// bit of a sum.
template <class R>
int64_t effective_length(const dpk_tensor& x, const dpk_tensor& g, int64_t i, int64_t length);

// Copies frames [t0, t1) of sample i into panels of nr columns: panel j holds columns [j*nr, (j+1)*nr), frame
// t at t*nr, zeros in columns that do not exist; panels lie length*nr apart. square_norms[t], unless null,
// becomes an upper bound of ||row t||^2.
template <class R>
void pack_frames(const dpk_tensor& v, int64_t i, int64_t length, int64_t t0, int64_t t1, R* panels,
                 double* square_norms);

// Samples are taken in groups whose panels fit in about this much memory: enough to share among threads,
// little enough for caches.
constexpr int64_t kGroupBytes = int64_t{16} << 20;

struct Sample {
  int64_t index, length;
  double factor;
  int64_t x_at, g_at;  // where its panels start, in elements
  int64_t rows_at;     // where its row norms start
};

// Frames packed by one call.
constexpr int64_t kPackFrames = 32;

}  // namespace dpk
