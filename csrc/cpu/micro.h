// The inner loops that are compiled once per instruction set (linear_isa.cpp, layers_isa.cpp), as tables of
// functions.
//
// R is float (inputs F32, F16, BF16) or double (F64). Order of every sum is fixed and does not depend on
// sizes around it, so that the norm and the weighted sum of one sample see the same rounded values.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dpk {

// Products that are summed in a register before the sum is merged; few, because rounding bounds grow with
// this number.
constexpr int64_t kChunk = 64;
// Frames (or features) summed in R: 8 chunks. Longer sums go on in float64.
constexpr int64_t kBlock = 512;
// Frames (or features) of two panels that stay in the first-level cache while their tiles are computed.
constexpr int64_t kNear = 192;
// Columns that the streaming kernels (LoRA, bias, layer norm) treat at a time: a multiple of every tile
// width.
constexpr int64_t kStrip = 128;

// Panels of `width` columns of a matrix: panel j holds columns [j*width, (j+1)*width) frame by frame, zeros
// in columns that do not exist.
template <class R>
struct Panel {
  int width;

  // One frame of n columns into its place in each panel; panels lie `apart` elements apart.
  void (*pack)(const R* row, int64_t n, R* dst, int64_t apart);

  // `width` rows of n features, row r at rows + r*ld, to dst[k*width + r].
  void (*transpose)(const R* rows, int64_t ld, int64_t n, R* dst);
};

template <class R>
struct Micro {
  int mr, nr;     // tile: mr x nr outputs; mr divides nr, nr divides kStrip
  Panel<R> wide;  // of nr columns
  Panel<R> tall;  // of as many columns as a tall tile has rows

  // dst[j] = src[j * stride], converted exactly (dtype as in dpkernels.h; F64 only when R is double).
  void (*load)(const void* src, int32_t dtype, int64_t stride, int64_t n, R* dst);

  // c[m][n] (+)= sum over t < k of a[t*lda+m] * b[t*ldb+n], in chunks of kChunk frames: each chunk is summed
  // from 0 in a register and then added to c (the first is stored when !accumulate).
  void (*tile)(const R* a, int64_t lda, const R* b, int64_t ldb, int64_t k, R* c, int64_t ldc,
               bool accumulate);

  // The same sums, bit for bit, for m < tall.width, from a tall panel a and a wide one b; c has rows of nr.
  // Where at most mr rows are wanted, mr are written. Returns the number of rows written.
  int64_t (*tall_tile)(const R* a, const R* b, int64_t k, int64_t rows, R* c, bool accumulate);

  // An upper bound of sum v[j]^2, within 0.1 % for n < 4096; NaN or infinity when a v[j] is.
  double (*square_sum_above)(const R* v, int64_t n);

  // The same for n columns of `count` rows that lie ld apart.
  double (*square_sum_above_rows)(const R* rows, int64_t ld, int64_t count, int64_t n);

  // sum v[j]^2 in float64.
  double (*square_sum)(const R* v, int64_t n);

  // out[j] = sum over r < count of rows[r*ld+j]^2 in float64.
  void (*column_squares)(const R* rows, int64_t ld, int64_t count, int64_t n, double* out);

  // acc[j] += factor * v[j].
  void (*accumulate)(double* acc, const R* v, int64_t n, double factor);

  // sum a[j] * b[j] in float64.
  double (*dot)(const double* a, const double* b, int64_t n);

  // Every v[j] is finite.
  bool (*all_finite)(const R* v, int64_t n);
};

template <class R>
struct LayerMicro {
  // sum[j] = sum over t < k <= kChunk of rows[t*ld+j]; returns an upper bound of the sum of squares of
  // everything read.
  double (*add_rows)(const R* rows, int64_t ld, int64_t k, int64_t n, R* sum);

  // The same for products x*g.
  double (*add_products)(const R* x, int64_t ldx, const R* g, int64_t ldg, int64_t k, int64_t n, R* sum);

  // sum[j] += row[j].
  void (*add_row)(R* sum, const R* row, int64_t n);

  // Entries of a vector: `correlate` adds every so many products in one chain.
  int64_t lanes;

  // out[j] = sum over t < n of g[t] * x[t + offsets[j]], n a multiple of `lanes` and at most lanes * kChunk.
  void (*correlate)(const R* x, const int64_t* offsets, int64_t taps, const R* g, int64_t n, R* out);
};

#define DPK_DECLARE(isa)                  \
  namespace isa {                         \
  const Micro<float>& micro_f32();        \
  const Micro<double>& micro_f64();       \
  const LayerMicro<float>& layers_f32();  \
  const LayerMicro<double>& layers_f64(); \
  }
DPK_FOR_EACH_ISA(DPK_DECLARE)
#undef DPK_DECLARE

template <class R>
const Micro<R>& micro();
template <>
inline const Micro<float>& micro<float>() {
  return DPK_DISPATCH(micro_f32)();
}
template <>
inline const Micro<double>& micro<double>() {
  return DPK_DISPATCH(micro_f64)();
}

template <class R>
const LayerMicro<R>& layer_micro();
template <>
inline const LayerMicro<float>& layer_micro<float>() {
  return DPK_DISPATCH(layers_f32)();
}
template <>
inline const LayerMicro<double>& layer_micro<double>() {
  return DPK_DISPATCH(layers_f64)();
}

}  // namespace dpk
