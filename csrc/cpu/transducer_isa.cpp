// Inner loops of the transducer's joint network: see transducer_isa.h for what each does.
#include "cpu/transducer_isa.h"

#include "cpu/vectors.h"
#include "dpkernels.h"

namespace dpk::DPK_ISA {
namespace {

// 28 accumulators of 32 registers with AVX-512, else 12 of 16 (24 of 32 on aarch64): the more rows, the fewer
// vectors of cells are read for an operation, and those come from the second-level cache.
constexpr int kProductRows = kBytes == 64 ? 14 : 6;
template <class R>
constexpr int kColumns = kTileVectors * kLanes<R>;

template <class R>
void product(const R* a, const R* b, int64_t k, R* out, bool add) {
  constexpr int lanes = kLanes<R>, columns = kColumns<R>;
  Vector<R> sum[kProductRows][kTileVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kProductRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[m][v] = Vector<R>{};
  for (int64_t j = 0; j < k; ++j) {
    Vector<R> right[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) right[v] = read(b + v * lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kProductRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] += a[m] * right[v];
    a += kProductRows;
    b += columns;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kProductRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      R* at = out + m * columns + v * lanes;
      write<R>(at, add ? read(at) + sum[m][v] : sum[m][v]);
    }
}

// e^y and e^y - 1: y = n ln 2 + r with |r| <= ln(2)/2, e^y - 1 = 2^n p + (2^n - 1) with p the Taylor
// polynomial of e^r - 1, whose first missing term is below half a unit in the last place.
template <class R>
struct Exponential;
template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr float round = 0x1.8p23f, high = 0x1.62e4p-1f, low = 0x1.7f7d1cp-20f;
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float least = -87.0f, most = 88.0f;  // results are normal numbers in between
};
template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr double round = 0x1.8p52, high = 0x1.62e42fefa38p-1, low = 0x1.ef35793c7673p-45;
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double least = -708.0, most = 709.0;
};
template <class R>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type __attribute__((vector_size(kBytes), may_alias));
};
template <>
struct BitsOf<double> {
  typedef uint64_t type __attribute__((vector_size(kBytes), may_alias));
};

// A NaN stays a NaN, because every comparison with it is false.
template <class R>
inline Vector<R> select(decltype(Vector<R>{} < Vector<R>{}) where, Vector<R> yes, Vector<R> no) {
  return where ? yes : no;
}

template <class R>
inline Vector<R> power_and_rest(Vector<R> y, Vector<R>& p) {
  using E = Exponential<R>;
  using Bits = typename BitsOf<R>::type;
  const Vector<R> shifted = y * R(0x1.71547652b82fep0) + E::round, n = shifted - E::round;
  const Vector<R> r = (y - n * E::high) - n * E::low;
  R factorial = 1;
  R inverse[E::degree + 1];
  for (int d = 1; d <= E::degree; ++d) {
    factorial *= R(d);
    inverse[d] = R(1) / factorial;
  }
  Vector<R> sum = Vector<R>{} + inverse[E::degree];
#pragma GCC unroll 16
  for (int d = E::degree - 1; d >= 1; --d) sum = sum * r + inverse[d];
  p = sum * r;
  // the low bits of `shifted` are n
  const Bits bits = (reinterpret_cast<Bits>(shifted) << E::mantissa) +
                    (static_cast<typename E::Bits>(E::bias) << E::mantissa);
  return reinterpret_cast<Vector<R>>(bits);
}

// Below `least` 0: a subnormal number would slow down every product that it enters.
template <class R>
inline Vector<R> exponential(Vector<R> y) {
  using E = Exponential<R>;
  const Vector<R> zero = {}, infinity = zero + R(__builtin_inf());
  Vector<R> p;
  const Vector<R> power = power_and_rest<R>(y, p);
  const Vector<R> inside = power * p + power;
  return select<R>(y < E::least, zero, select<R>(y > E::most, infinity, inside));
}

// tanh s = q / (q + 2) with q = e^2s - 1, which is 1 from s = 20 on, in float64 too.
template <class R>
inline Vector<R> hyperbolic_tangent(Vector<R> s) {
  const Vector<R> zero = {}, bound = zero + R(20);
  const Vector<R> y = R(2) * select<R>(s > bound, bound, select<R>(s < -bound, -bound, s));
  Vector<R> p;
  const Vector<R> power = power_and_rest<R>(y, p);
  const Vector<R> q = power * p + (power - R(1));
  return q / (q + R(2));
}

template <class R>
inline Vector<R> activated(Vector<R> s, int32_t activation) {
  if (activation == DPK_TANH) return hyperbolic_tangent<R>(s);
  return select<R>(s < Vector<R>{}, Vector<R>{}, s);
}

inline float rounded_to_brain(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return v == v ? value : v;
}

inline float rounded_to_half(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  const uint32_t sign = bits & 0x80000000u, magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
  normal = normal > 0x477fe000u ? 0x7f800000u : normal;  // above 65504
  float size;
  __builtin_memcpy(&size, &magnitude, 4);
  const float small = (size + 0.75f) - 0.75f;  // below 2^-14: to a multiple of 2^-24, the last place of 0.75
  uint32_t small_bits;
  __builtin_memcpy(&small_bits, &small, 4);
  bits = sign | (magnitude < 0x38800000u ? small_bits : normal);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return v == v ? value : v;
}

void round_to(float* v, int64_t n, int32_t dtype) {
  if (dtype == DPK_BF16)
    for (int64_t j = 0; j < n; ++j) v[j] = rounded_to_brain(v[j]);
  if (dtype == DPK_F16)
    for (int64_t j = 0; j < n; ++j) v[j] = rounded_to_half(v[j]);
}
void round_to(double*, int64_t, int32_t) {}

template <class R>
void joint(const R* e, const R* p, int64_t n, int32_t activation, int32_t dtype, R* z) {
  for (int64_t j = 0; j < n; j += kLanes<R>)
    write<R>(z + j, activated<R>(read(e + j) + read(p + j), activation));
  round_to(z, n, dtype);
}

template <class R>
void add_exponentials(R* logits, const R* bias, int64_t count, R* most, R* sum) {
  constexpr int lanes = kLanes<R>, columns = kColumns<R>;
  for (int c = 0; c < columns; c += lanes) {
    const Vector<R> before = read(most + c);
    Vector<R> largest = before;
    for (int64_t j = 0; j < count; ++j) {
      R* at = logits + j * columns + c;
      const Vector<R> logit = read(at) + bias[j];
      write<R>(at, logit);
      largest = select<R>(logit > largest, logit, largest);
    }
    // where all are -infinity, their exponentials are 0 and not e^(-infinity + infinity)
    const Vector<R> zero = {};
    const Vector<R> origin = select<R>(largest == zero - R(__builtin_inf()), zero, largest);
    Vector<R> part[4] = {};
    for (int64_t j = 0; j < count; ++j)
      part[j % 4] += exponential<R>(read(logits + j * columns + c) - origin);
    write<R>(most + c, largest);
    write<R>(sum + c,
             read(sum + c) * exponential<R>(before - origin) + ((part[0] + part[1]) + (part[2] + part[3])));
  }
}

template <class R>
void softmax(R* logits, const R* bias, int64_t count, const R* normalizers, const R* scales) {
  constexpr int lanes = kLanes<R>, columns = kColumns<R>;
  for (int c = 0; c < columns; c += lanes) {
    const Vector<R> normalizer = read(normalizers + c), scale = read(scales + c);
    for (int64_t j = 0; j < count; ++j) {
      R* at = logits + j * columns + c;
      write<R>(at, exponential<R>((read(at) + bias[j]) - normalizer) * scale);
    }
  }
}

template <class R>
void add_cell(const R* of_z, const R* e, const R* p, int64_t n, int32_t activation, R scale, R* of_encoder,
              R* of_predictor) {
  const Vector<R> zero = {}, one = zero + R(1);
  for (int64_t j = 0; j < n; j += kLanes<R>) {
    const Vector<R> value = activated<R>(read(e + j) + read(p + j), activation);
    const Vector<R> slope = activation == DPK_TANH ? one - value * value : select<R>(value > zero, one, zero);
    const Vector<R> d = (read(of_z + j) * slope) * scale;
    write<R>(of_encoder + j, read(of_encoder + j) + d);
    write<R>(of_predictor + j, read(of_predictor + j) + d);
  }
}

template <class R>
void transpose(const R* from, int64_t n, R* to, int64_t ld) {
  // blocks, so that the lines that one writes stay in the first-level cache
  for (int64_t j0 = 0; j0 < n; j0 += 64)
    for (int c = 0; c < kColumns<R>; ++c)
      for (int64_t j = j0; j < at_most(n, j0 + 64); ++j) to[c * ld + j] = from[j * kColumns<R> + c];
}

template <class R>
constexpr JointMicro<R> make() {
  return {kProductRows,        kColumns<R>, product<R>,  joint<R>,
          add_exponentials<R>, softmax<R>,  add_cell<R>, transpose<R>};
}

constexpr JointMicro<float> table_f32 = make<float>();
constexpr JointMicro<double> table_f64 = make<double>();

}  // namespace

const JointMicro<float>& joint_f32() { return table_f32; }
const JointMicro<double>& joint_f64() { return table_f64; }

}  // namespace dpk::DPK_ISA
