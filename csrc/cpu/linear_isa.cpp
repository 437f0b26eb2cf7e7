// Inner loops of the matrix-like kernels, compiled once per instruction set: see micro.h for what each does.
#include "cpu/micro.h"
#include "cpu/vectors.h"
#include "dpkernels.h"

namespace dpk::DPK_ISA {
namespace {

template <class R, int rows, int vectors>
void tile(const R* a, int64_t lda, const R* b, int64_t ldb, int64_t k, R* c, int64_t ldc, bool accumulate) {
  constexpr int lanes = kLanes<R>;
  int64_t t0 = 0;
  do {  // once also for k = 0, which stores zeros
    Vector<R> sum[rows][vectors];
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < vectors; ++v) sum[m][v] = Vector<R>{};
    const int64_t n = at_most(kChunk, k - t0);
    for (int64_t t = 0; t < n; ++t) {
      Vector<R> right[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) right[v] = read(b + v * lanes);
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[m][v] += a[m] * right[v];
      }
      a += lda;
      b += ldb;
    }
    if (t0 == 0 && !accumulate) {
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) write(c + m * ldc + v * lanes, sum[m][v]);
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
          R* at = c + m * ldc + v * lanes;
          write<R>(at, read(at) + sum[m][v]);
        }
    }
    t0 += kChunk;
  } while (t0 < k);
}

template <class R>
int64_t tall_tile(const R* a, const R* b, int64_t k, int64_t rows, R* c, bool accumulate) {
  constexpr int columns = kTileVectors * kLanes<R>;
  if (rows <= kTileRows) {
    tile<R, kTileRows, kTileVectors>(a, kTallRows, b, columns, k, c, columns, accumulate);
    return kTileRows;
  }
  tile<R, kTallRows, kTileVectors>(a, kTallRows, b, columns, k, c, columns, accumulate);
  return kTallRows;
}

// IEEE half to float in integers, so that subnormals survive a processor set to flush them.
inline float half(uint16_t h) {
  const uint32_t exponent = (h >> 10) & 31, magnitude = h & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  bits = exponent == 31 ? bits + (112u << 23) : bits;
  float normal;
  __builtin_memcpy(&normal, &bits, 4);
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float value = exponent == 0 ? small : normal;
  return (h & 0x8000) != 0 ? -value : value;
}

inline float brain(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <class R, class S, R (*convert)(S)>
void load_as(const void* from, int64_t stride, int64_t n, R* __restrict__ dst) {
  const S* src = static_cast<const S*>(from);
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) dst[j] = convert(src[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) dst[j] = convert(src[j * stride]);
  }
}

template <class R, class S>
inline R plain(S v) {
  return static_cast<R>(v);
}
template <class R>
inline R from_half(uint16_t v) {
  return half(v);
}
template <class R>
inline R from_brain(uint16_t v) {
  return brain(v);
}

template <class R>
void load(const void* src, int32_t dtype, int64_t stride, int64_t n, R* dst) {
  if (dtype == DPK_F32) return load_as<R, float, plain<R, float>>(src, stride, n, dst);
  if (dtype == DPK_F64) return load_as<R, double, plain<R, double>>(src, stride, n, dst);
  if (dtype == DPK_F16) return load_as<R, uint16_t, from_half<R>>(src, stride, n, dst);
  load_as<R, uint16_t, from_brain<R>>(src, stride, n, dst);
}

// As many elements as a vector of doubles holds, converted.
typedef float HalfVector __attribute__((vector_size(kBytes / 2), aligned(4), may_alias));
inline Vector<double> read_wide(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(p), Vector<double>);
}
inline Vector<double> read_wide(const double* p) { return read(p); }

template <class R>
double square_sum(const R* v, int64_t n) {
  constexpr int lanes = kLanes<double>;
  Vector<double> sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const Vector<double> x = read_wide(v + j + s * lanes);
      sum[s] += x * x;
    }
  }
  double total = 0.0;
  for (; j < n; ++j) total += static_cast<double>(v[j]) * v[j];
  const Vector<double> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int l = 0; l < lanes; ++l) total += all[l];
  return total;
}

double squares_slowly(double n, const float* rows, int64_t ld, int64_t count, int64_t columns) {
  double total = 0.0;
  for (int64_t t = 0; t < count; ++t) total += square_sum(rows + t * ld, columns);
  return total * square_slack(n, kUnitF64);
}

// What the squares of these numbers may have lost where their sum is so small: 2^-1075 each, and 0 squares
// none.
double lost_squares(const double* rows, int64_t ld, int64_t count, int64_t n, double total) {
  if (total > kSmallSquares) return 0.0;
  double lost = 0.0;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t j = 0; j < n; ++j) lost += rows[t * ld + j] != 0.0 ? 0x1p-1074 : 0.0;
  return lost;
}

double square_sum_above_rows(const double* rows, int64_t ld, int64_t count, int64_t n) {
  double total = 0.0;
  for (int64_t t = 0; t < count; ++t) total += square_sum(rows + t * ld, n);
  const double slack = square_slack(static_cast<double>(count * n), kUnitF64);
  return total * slack + lost_squares(rows, ld, count, n, total);
}

double square_sum_above_rows(const float* rows, int64_t ld, int64_t count, int64_t n) {
  constexpr int lanes = kLanes<float>;
  Vector<float> sum[4] = {};
  float total = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    const float* v = rows + t * ld;
    int64_t j = 0;
    for (; j + 4 * lanes <= n; j += 4 * lanes) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const Vector<float> x = read(v + j + s * lanes);
        sum[s] += x * x;
      }
    }
    for (; j < n; ++j) total += v[j] * v[j];
  }
  const Vector<float> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int l = 0; l < lanes; ++l) total += all[l];
  const double terms = static_cast<double>(count) * static_cast<double>(n);
  if (in_range(total, terms)) return total * square_slack(terms, kUnitF32);
  return squares_slowly(terms, rows, ld, count, n);
}

template <class R>
double square_sum_above(const R* v, int64_t n) {
  return square_sum_above_rows(v, n, 1, n);
}

template <class R>
void column_squares(const R* rows, int64_t ld, int64_t count, int64_t n, double* __restrict__ out) {
  constexpr int lanes = kLanes<double>;
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
    Vector<double> sum[4] = {};
    for (int64_t r = 0; r < count; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const Vector<double> x = read_wide(rows + r * ld + j + s * lanes);
        sum[s] += x * x;
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) write<double>(out + j + s * lanes, sum[s]);
  }
  for (; j < n; ++j) {
    double sum = 0.0;
    for (int64_t r = 0; r < count; ++r) sum += static_cast<double>(rows[r * ld + j]) * rows[r * ld + j];
    out[j] = sum;
  }
  if constexpr (sizeof(R) == sizeof(double))
    for (j = 0; j < n; ++j) out[j] += lost_squares(rows + j, ld, count, 1, out[j]);
}

template <class R>
void accumulate(double* __restrict__ acc, const R* __restrict__ v, int64_t n, double factor) {
  constexpr int lanes = kLanes<double>;
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      double* at = acc + j + s * lanes;
      write<double>(at, read(at) + factor * read_wide(v + j + s * lanes));
    }
  }
  for (; j < n; ++j) acc[j] += factor * v[j];
}

double dot(const double* a, const double* b, int64_t n) {
  constexpr int lanes = kLanes<double>;
  Vector<double> sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes)
    for (int s = 0; s < 4; ++s) sum[s] += read(a + j + s * lanes) * read(b + j + s * lanes);
  double total = 0.0;
  for (; j < n; ++j) total += a[j] * b[j];
  const Vector<double> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int l = 0; l < lanes; ++l) total += all[l];
  return total;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DPK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef DPK_SHUFFLE
typedef int32_t ShuffleIndex __attribute__((vector_size(16)));
#define DPK_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, ShuffleIndex{i, j, k, l})
#endif
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline void transpose_4x4(const float* src, int64_t ld, float* dst, int64_t ldd) {
  const Four a = *reinterpret_cast<const Four*>(src), b = *reinterpret_cast<const Four*>(src + ld);
  const Four c = *reinterpret_cast<const Four*>(src + 2 * ld),
             d = *reinterpret_cast<const Four*>(src + 3 * ld);
  const Four ab_low = DPK_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = DPK_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = DPK_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = DPK_SHUFFLE(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Four*>(dst) = DPK_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(dst + ldd) = DPK_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(dst + 2 * ldd) = DPK_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(dst + 3 * ldd) = DPK_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

inline void transpose_4x4(const double* src, int64_t ld, double* dst, int64_t ldd) {
  for (int r = 0; r < 4; ++r)
    for (int k = 0; k < 4; ++k) dst[k * ldd + r] = src[r * ld + k];
}

template <class R, int width>
void transpose(const R* rows, int64_t ld, int64_t n, R* dst) {
  // Blocks of features: what one block writes stays in the first-level cache.
  for (int64_t k0 = 0; k0 < n; k0 += kChunk) {
    const int64_t k1 = at_most(n, k0 + kChunk);
    int r = 0;
    for (; r + 4 <= width; r += 4) {
      const R* src = rows + r * ld;
      int64_t k = k0;
      for (; k + 4 <= k1; k += 4) transpose_4x4(src + k, ld, dst + k * width + r, width);
      for (; k < k1; ++k)
        for (int s = 0; s < 4; ++s) dst[k * width + r + s] = src[s * ld + k];
    }
    for (; r < width; ++r)
      for (int64_t k = k0; k < k1; ++k) dst[k * width + r] = rows[r * ld + k];
  }
}

template <class R, int width>
void pack(const R* __restrict__ row, int64_t n, R* __restrict__ dst, int64_t apart) {
  int64_t j = 0;
  for (; j + width <= n; j += width, dst += apart) __builtin_memcpy(dst, row + j, width * sizeof(R));
  if (j == n) return;
  for (int c = 0; c < width; ++c) dst[c] = j + c < n ? row[j + c] : R(0);
}

template <class R, int width>
constexpr Panel<R> panel() {
  return {width, pack<R, width>, transpose<R, width>};
}

template <class R>
bool all_finite(const R* v, int64_t n) {
  R zero = 0;
  for (int64_t j = 0; j < n; ++j) zero += v[j] * R(0);
  return zero == R(0);
}

template <class R>
constexpr Micro<R> make() {
  constexpr int width = kTileVectors * kLanes<R>;
  static_assert(width % kTileRows == 0 && kStrip % width == 0, "see Micro");
  return {kTileRows,
          width,
          panel<R, width>(),
          panel<R, kTallRows>(),
          load<R>,
          tile<R, kTileRows, kTileVectors>,
          tall_tile<R>,
          square_sum_above<R>,
          square_sum_above_rows,
          square_sum<R>,
          column_squares<R>,
          accumulate<R>,
          dot,
          all_finite<R>};
}

constexpr Micro<float> table_f32 = make<float>();
constexpr Micro<double> table_f64 = make<double>();

}  // namespace

const Micro<float>& micro_f32() { return table_f32; }
const Micro<double>& micro_f64() { return table_f64; }

}  // namespace dpk::DPK_ISA
