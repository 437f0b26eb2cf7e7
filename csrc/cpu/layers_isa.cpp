// Inner loops of the streaming layers (bias, layer norm, embedding, depthwise convolution), compiled once per
// instruction set: see micro.h.
#include "cpu/micro.h"
#include "cpu/vectors.h"

namespace dpk::DPK_ISA {
namespace {

// Sum of squares in float64 where float32 over- or underflowed. One of the two is null for add_rows.
template <class R>
double squares_slowly(const R* x, int64_t ldx, const R* g, int64_t ldg, int64_t k, int64_t n) {
  double total = 0.0, lost = 0.0;  // lost: a square of float64 numbers underflows by 2^-1075 at most
  for (int64_t t = 0; t < k; ++t)
    for (int64_t j = 0; j < n; ++j) {
      const double right = static_cast<double>(g[t * ldg + j]),
                   left = x == nullptr ? 1.0 : static_cast<double>(x[t * ldx + j]), v = left * right;
      total += v * v;
      lost += left != 0.0 && right != 0.0 ? 0x1p-1074 : 0.0;
    }
  return total * square_slack(static_cast<double>(k * n), kUnitF64) + lost;
}

inline bool usable(float sum, double n) { return in_range(sum, n); }
inline bool usable(double sum, double) { return sum > kSmallSquares && sum < 0x1p900; }
inline double slack(float, double n) { return square_slack(n, kUnitF32); }
inline double slack(double, double n) { return square_slack(n, kUnitF64); }

// `vectors` columns of vectors at a time, all frames, sums in registers. The square of a product is that of
// its rounded value, one rounding more, which the slack's 2n covers.
template <class R, bool product, int vectors>
inline void strip(const R* x, int64_t ldx, const R* g, int64_t ldg, int64_t k, R* sum, Vector<R>& squares) {
  constexpr int lanes = kLanes<R>;
  Vector<R> column[vectors] = {};
  Vector<R> square[2] = {};
  for (int64_t t = 0; t < k; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Vector<R> value = read(g + t * ldg + v * lanes);
      if constexpr (product) {
        const Vector<R> left = read(x + t * ldx + v * lanes);
        column[v] += left * value;
        value = left * value;
      } else {
        column[v] += value;
      }
      square[v % 2] += value * value;
    }
  }
  for (int v = 0; v < vectors; ++v) write(sum + v * lanes, column[v]);
  squares += square[0] + square[1];
}

template <class R, bool product>
double add(const R* x, int64_t ldx, const R* g, int64_t ldg, int64_t k, int64_t n, R* sum) {
  constexpr int lanes = kLanes<R>;
  Vector<R> squares = {};
  int64_t j = 0;
  for (; j + 8 * lanes <= n; j += 8 * lanes)
    strip<R, product, 8>(product ? x + j : x, ldx, g + j, ldg, k, sum + j, squares);
  for (; j + lanes <= n; j += lanes)
    strip<R, product, 1>(product ? x + j : x, ldx, g + j, ldg, k, sum + j, squares);
  R total = 0;
  for (int l = 0; l < lanes; ++l) total += squares[l];
  for (; j < n; ++j) {
    R column = 0;
    for (int64_t t = 0; t < k; ++t) {
      R value = g[t * ldg + j];
      if constexpr (product) value *= x[t * ldx + j];
      column += value;
      total += value * value;
    }
    sum[j] = column;
  }
  const double count = static_cast<double>(k) * static_cast<double>(n);
  if (usable(total, count)) return total * slack(total, count);
  return squares_slowly(x, ldx, g, ldg, k, n);
}

template <class R>
double add_rows(const R* rows, int64_t ld, int64_t k, int64_t n, R* sum) {
  return add<R, false>(nullptr, 0, rows, ld, k, n, sum);
}

template <class R>
double add_products(const R* x, int64_t ldx, const R* g, int64_t ldg, int64_t k, int64_t n, R* sum) {
  return add<R, true>(x, ldx, g, ldg, k, n, sum);
}

template <class R>
void add_row(R* __restrict__ sum, const R* __restrict__ row, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
}

// Halves of a vector are added until four lanes (or fewer) are left: independent of the other taps, so
// several run at once.
template <class R, int bytes>
inline R sum_lanes(const R* v) {
  constexpr int lanes = bytes / static_cast<int>(sizeof(R));
  if constexpr (bytes > 16) {
    R half[lanes / 2];
    for (int l = 0; l < lanes / 2; ++l) half[l] = v[l] + v[l + lanes / 2];
    return sum_lanes<R, bytes / 2>(half);
  } else if constexpr (lanes == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

template <class R, int taps>
void correlate_some(const R* x, const int64_t* offsets, const R* g, int64_t n, R* out) {
  Vector<R> sum[taps] = {};
  for (int64_t t = 0; t < n; t += kLanes<R>) {
    const Vector<R> right = read(g + t);
#pragma GCC unroll 8
    for (int j = 0; j < taps; ++j) sum[j] += read(x + t + offsets[j]) * right;
  }
  for (int j = 0; j < taps; ++j) {
    R lane[kLanes<R>];
    write(lane, sum[j]);
    out[j] = sum_lanes<R, kBytes>(lane);
  }
}

template <class R>
void correlate(const R* x, const int64_t* offsets, int64_t taps, const R* g, int64_t n, R* out) {
  using Some = void (*)(const R*, const int64_t*, const R*, int64_t, R*);
  static constexpr Some some[] = {correlate_some<R, 1>, correlate_some<R, 2>, correlate_some<R, 3>,
                                  correlate_some<R, 4>, correlate_some<R, 5>, correlate_some<R, 6>,
                                  correlate_some<R, 7>, correlate_some<R, 8>};
  // Groups of at most 8 taps, as equal as can be: 9 taps are 5 + 4.
  for (int64_t groups = (taps + 7) / 8, j = 0; groups > 0; --groups) {
    const int64_t size = (taps - j + groups - 1) / groups;
    some[size - 1](x, offsets + j, g, n, out + j);
    j += size;
  }
}

constexpr LayerMicro<float> table_f32 = {add_rows<float>, add_products<float>, add_row<float>, kLanes<float>,
                                         correlate<float>};
constexpr LayerMicro<double> table_f64 = {add_rows<double>, add_products<double>, add_row<double>,
                                          kLanes<double>, correlate<double>};

}  // namespace

const LayerMicro<float>& layers_f32() { return table_f32; }
const LayerMicro<double>& layers_f64() { return table_f64; }

}  // namespace dpk::DPK_ISA
