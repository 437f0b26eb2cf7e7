// Vectors of the instruction set being compiled, by the compilers' vector extension. Only for *_isa.cpp
// files.
#pragma once

#include <cstdint>

namespace dpk::DPK_ISA {

// Rows of a tile, of a tall tile, and vectors in a row of both. A tile's accumulators hide the latency of its
// operations (two FMAs a cycle, four cycles each); a tall one fills the registers, so that fewer operands are
// read for an operation.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kTileRows = 8, kTallRows = 12, kTileVectors = 2;  // 16, 24 accumulators of 32
#elif defined(__AVX__)
constexpr int kBytes = 32, kTileRows = 4, kTallRows = 6, kTileVectors = 2;  // 8, 12 of 16
#elif defined(__aarch64__)
constexpr int kBytes = 16, kTileRows = 4, kTallRows = 6, kTileVectors = 4;  // 16, 24 of 32
#else
constexpr int kBytes = 16, kTileRows = 4, kTallRows = 6, kTileVectors = 2;
#endif

// The attribute does not take a dependent element type in all compilers, hence one specialisation each.
template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes), aligned(8), may_alias));
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(R));

template <class R>
static inline Vector<R> read(const R* p) {
  return *reinterpret_cast<const Vector<R>*>(p);
}
template <class R>
static inline void write(R* p, Vector<R> v) {
  *reinterpret_cast<Vector<R>*>(p) = v;
}

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums of squares for bounds. With u the unit roundoff, any order of n products and sums of non-negative
// numbers is low by at most (n+1) u of the result, so 1 + 2(n+2)u times it is not below. In float that holds
// unless squares left the range of normal numbers; then (seen by the size of the result, NaN included) the
// slow sum in float64 is taken.
static inline double square_slack(double n, double u) { return 1.0 + 2.0 * (n + 2.0) * u; }
static inline bool in_range(float sum, double n) { return sum > n * 0x1p-90 && sum < 0x1p120f && n < 0x1p20; }
constexpr double kUnitF32 = 0x1p-24, kUnitF64 = 0x1p-53;

}  // namespace dpk::DPK_ISA
