// The largest rounding error of a norm, and the rounding up that makes every norm safe to clip by.
//
// Notation: u = 2^-24 for float32 arithmetic, 2^-53 for float64. One entry of a sample's gradient is sum_t
// a_t b_t.
//
// Sum in blocks (micro.h: `tile`). Within a chunk of 64 frames the sum starts at 0 and takes one fused
// multiply-add a frame: each product passes through at most 64 roundings (a separate multiplication adds one;
// counted). Up to 8 chunks are then added, 7 more. Blocks of 512 frames are added in float64. So every
// product of the entry carries at most kappa(T) = min(T,64) + 1 + min(ceil(T/64),8) <= 73 roundings, whatever
// T, and |computed - exact| <= gamma sum_t |a_t||b_t| with gamma = kappa u / (1 - kappa u) (Higham, Accuracy
// and Stability of Numerical Algorithms, 2002, section 3.1). Over the entries of g^T x, by the triangle
// inequality over frames:
//     ||computed - exact||_F <= gamma S,   S = sum_t ||x_t|| ||g_t||.
// The weighted sum computes the same products in the same way, so its gradient of a sample is off by at most
// gamma S too, and at most u S more where a caller multiplies g by the factor beforehand (this library's sums
// do not: the factor is applied in float64). Hence with e = (2 kappa + 1) u S * 1.01 both ||exact|| and
// ||added||/c are <= ||computed|| + e. The 1.01 covers 1/(1 - kappa u), the float64 roundings of S and of
// sums over blocks, each below 1e-6. Results below the smallest normal number lose 2^-126 at most (also where
// the processor flushes them to 0): absolute() adds that.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/micro.h"

namespace dpk {

template <class R>
constexpr double kUnit = sizeof(R) == 4 ? 0x1p-24 : 0x1p-53;
template <class R>
constexpr double kTiniest = sizeof(R) == 4 ? 0x1p-126 : 0x1p-1022;

// The number of roundings of one product in a sum of n (see above).
inline double kappa(int64_t n) {
  const int64_t chunks = (n + kChunk - 1) / kChunk, most = kBlock / kChunk;
  return static_cast<double>((n < kChunk ? n : kChunk) + 1 + (chunks < most ? chunks : most));
}

// The error that rounding to subnormal numbers can add to the norm of `entries` sums of n products, counted
// once for the norm and once for the sum.
template <class R>
double absolute(int64_t n, int64_t entries) {
  return 4.0 * static_cast<double>(n) * std::sqrt(static_cast<double>(entries)) * kTiniest<R>;
}

// e of the derivation, for sums of n frames with S = `scale`. The relative part takes the largest kappa, not
// that of n: where n has padding in it, one long example would raise the norms of all that are padded to its
// length.
template <class R>
double error_bound(int64_t n, int64_t entries, double scale) {
  return (2.0 * kappa(kBlock) + 1.0) * kUnit<R> * 1.01 * scale + absolute<R>(n, entries);
}

// a * b of numbers >= 0, and never below it: a product that underflows is low by 2^-1075 at most. That
// happens to float64 inputs only: squares and products of float32 numbers are far inside of float64's range.
inline double product_above(double a, double b) {
  const double product = a * b;
  return product > 0x1p-1000 || a == 0.0 || b == 0.0 ? product : product + 0x1p-1074;
}

// The smallest float32 that is >= value; NaN stays NaN.
inline float round_up(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) < value
             ? std::nextafterf(nearest, std::numeric_limits<float>::infinity())
             : nearest;
}

// (sqrt(square) + e)^2 rounded up, `square` being a float64 sum of `terms` squares. Squares that underflowed
// are below the smallest float32, which the result is where it is not 0.
inline float upper_square(double square, double terms, double e) {
  const double norm = std::sqrt(square * (1.0 + (terms + 8.0) * 0x1p-52)) + e;
  return round_up(product_above(norm, norm) * (1.0 + 0x1p-50));
}

}  // namespace dpk
