// The ChaCha20 block function (RFC 8439) and the standard normals computed from its output; host and device
// code alike.
//
// No multiplication is fused with an addition in the files that include this (CMakeLists.txt), and only + - *
// / sqrt and integer operations are used, all of them correctly rounded: the normals have the same bits on
// every CPU and GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include "cuda/instructions.cuh"
#define DPK_SHARED __host__ __device__ __forceinline__
#else
#define DPK_SHARED inline __attribute__((always_inline))
#endif

namespace dpk {

constexpr int64_t kChaChaBlockBytes = 64;
constexpr int kPairsPerBlock = 4;  // 16 bytes make a pair of normals
constexpr int kNormalsPerBlock = 8;

// Words 4..15 of the initial state; the first four are the constant "expand 32-byte k".
struct ChaChaState {
  uint32_t key[8];
  uint32_t counter;
  uint32_t nonce[3];
};

// T is uint32_t (one block) or a vector of them (a block per lane).
template <class T>
DPK_SHARED T rotate_left(T v, int n) {
  return (v << n) | (v >> (32 - n));
}

template <class T>
DPK_SHARED T plus(T a, T b) {
  return a + b;
}

#ifdef __CUDACC__
// The cipher is bound by the pipe of xor and shift. What multiplies is another, and adds where the compiler
// cannot know that this is 1.
static __constant__ uint32_t kOneOnDevice = 1;
#endif

template <>
DPK_SHARED uint32_t plus<uint32_t>(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return b * kOneOnDevice + a;
#else
  return a + b;
#endif
}

template <class T>
DPK_SHARED void quarter_round(T& a, T& b, T& c, T& d) {
  a = plus<T>(a, b), d = rotate_left<T>(d ^ a, 16);
  c = plus<T>(c, d), b = rotate_left<T>(b ^ c, 12);
  a = plus<T>(a, b), d = rotate_left<T>(d ^ a, 8);
  c = plus<T>(c, d), b = rotate_left<T>(b ^ c, 7);
}

// out[0..15]: the words of the block with this counter (RFC 8439, 2.3).
template <class T>
DPK_SHARED void chacha20_block(const ChaChaState& state, T counter, T out[16]) {
  const T zero = counter ^ counter;
  T x[16] = {zero + 0x61707865u, zero + 0x3320646eu, zero + 0x79622d32u, zero + 0x6b206574u};
  for (int i = 0; i < 8; ++i) x[4 + i] = zero + state.key[i];
  x[12] = counter;
  for (int i = 0; i < 3; ++i) x[13 + i] = zero + state.nonce[i];
  for (int i = 0; i < 16; ++i) out[i] = x[i];
  for (int round = 0; round < 10; ++round) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 16; ++i) out[i] += x[i];
}

DPK_SHARED uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DPK_SHARED double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// double(v), correctly rounded. Where the instruction set converts 64-bit integers only one at a time, in a
// way that vectorises: 2^84 + 2^63 + (v >> 32) 2^32 and 2^52 + (v mod 2^32) are exact, and so is the first
// difference.
DPK_SHARED double to_double(int64_t v) {
#if defined(__SSE2__) && !defined(__AVX512DQ__) && !defined(__CUDA_ARCH__)
  const uint64_t bits = static_cast<uint64_t>(v);
  const double high = from_bits((bits >> 32) ^ 0x4530000080000000u);
  const double low = from_bits((bits & 0xffffffffu) | 0x4330000000000000u);
  return (high - 0x1.00000801p84) + low;
#else
  return static_cast<double>(v);
#endif
}

// Constants of box_muller: polynomials from the highest power on, ln 2 in two parts (a multiple of 2^-41, and
// the rest), 2 pi 2^-64.
struct BoxMuller {
  double artanh[7], sine[6], cosine[6], ln2_high, ln2_low, turn;
};
#define DPK_BOX_MULLER                                                                            \
  {{0x1.2f0568a84ffb1p-3, 0x1.39a1ba314aa2fp-3, 0x1.74663eedf6e1dp-3, 0x1.c71c52093ed37p-3,       \
    0x1.24924941f151bp-2, 0x1.999999997fdb3p-2, 0x1.5555555555592p-1},                            \
   {0x1.5d932f926046ap-33, -0x1.ae5e66d5b43e8p-26, 0x1.71de3578751ccp-19, -0x1.a01a019c126b6p-13, \
    0x1.111111110f881p-7, -0x1.5555555555549p-3},                                                 \
   {-0x1.8faed003c9c4bp-37, 0x1.1ee9ec4956ca1p-29, -0x1.27e4f80a78ddfp-22, 0x1.a01a019cb272bp-16, \
    -0x1.6c16c16c15185p-10, 0x1.555555555554cp-5},                                                \
   0x1.62e42fefa38p-1,                                                                            \
   0x1.ef35793c7673p-45,                                                                          \
   6.283185307179586 * 0x1p-64}
constexpr BoxMuller kBoxMuller = DPK_BOX_MULLER;
#ifdef __CUDACC__
// There an operand in constant memory costs nothing, and a literal two instructions.
static __constant__ BoxMuller kBoxMullerOnDevice = DPK_BOX_MULLER;
#endif

// a / b for 1 <= b <= 4 and a = 0 or 2^-200 <= |a| <= 2^200.
DPK_SHARED double divide(double a, double b) {
#ifdef __CUDA_ARCH__
  // What nvcc makes of a / b, without the check for what is excluded here.
  double y = __hiloint2double(__double2hiint(reciprocal_seed(b)), 1);
  double e = __fma_rn(-b, y, 1.0);
  e = __fma_rn(e, e, e);
  y = __fma_rn(y, e, y);
  e = __fma_rn(-b, y, 1.0);
  y = __fma_rn(y, e, y);
  const double q = a * y;
  return __fma_rn(y, __fma_rn(-b, q, a), q);
#else
  return a / b;
#endif
}

// sqrt(v) for v = 0, also -0, or 2^-200 <= v <= 2^200.
DPK_SHARED double square_root(double v) {
#ifdef __CUDA_ARCH__
  // What nvcc makes of sqrt(v), without the check; 0 starts from the root of another number and stays 0.
  const int high = max(__double2hiint(v), 0x00100000);
  const double seed = root_seed(__hiloint2double(high, 0));
  double y = __hiloint2double(__double2hiint(seed), high + static_cast<int>(0xfcb00000u));
  const double e = __fma_rn(v, -(y * y), 1.0);
  y = __fma_rn(__fma_rn(e, 0.375, 0.5), y * e, y);
  const double g = v * y;
  const double half = __hiloint2double(__double2hiint(y) - 0x00100000, __double2loint(y));
  return __fma_rn(__fma_rn(-g, g, v), half, g);
#else
  return sqrt(v);
#endif
}

// Box-Muller: two independent standard normals from two uniform 64-bit words,
//
//     z0 = sqrt(-2 ln u) cos(2 pi v),   z1 = sqrt(-2 ln u) sin(2 pi v),   u = (w0 + 1) 2^-64 in (0, 1],   v =
//     w1 2^-64.
//
// Up to 1/2, u itself is rounded; above, its distance to 1 is, (2^64 - 1 - w0) 2^-64, so that both ends keep
// full relative precision. The largest radius is sqrt(128 ln 2) = 9.42, the smallest but 0 is 2^-31.5. v is
// reduced to the nearest quarter turn in integers, so no rounding of pi decides the quadrant.
//
// The polynomials are minimax; the error of each is given beside it.
DPK_SHARED void box_muller(uint64_t w0, uint64_t w1, double* z0, double* z1) {
#ifdef __CUDA_ARCH__
  const BoxMuller& constants = kBoxMullerOnDevice;
#else
  constexpr BoxMuller constants = kBoxMuller;
#endif
  const double unit = 0x1p-64;
  const uint64_t sign = 0x8000000000000000u;
  // u = x 2^-64, and ln u = e ln 2 + ln(1 + f) with sqrt(1/2) <= 1 + f <= sqrt(2). `nearest` counts from the
  // nearer end of (0, 1].
  const bool upper = static_cast<int64_t>(w0) < 0;
  const double nearest =
      to_double(static_cast<int64_t>(w0 ^ static_cast<uint64_t>(static_cast<int64_t>(w0) >> 63)));
  const double x = upper ? 0x1p64 - nearest : nearest + 1.0;
  const uint64_t scaled = bits_of(x);
  // The exponent is one more from a mantissa of sqrt(2) on.
  const uint64_t carried = scaled + 0x00095f619980c433u;
  const double mantissa = from_bits(scaled - (carried & 0xfff0000000000000u) + 0x3ff0000000000000u);
  const double e = from_bits((carried >> 52) | 0x4330000000000000u) - (0x1p52 + 1023 + 64);
  // e is 0 above sqrt(1/2), and only there: x itself has lost the low bits of u's distance to 1.
  const double f = e == 0.0 ? nearest * -unit : mantissa - 1.0;
  // ln(1 + f) = 2 artanh(s) = 2 s + s q p(q), q = s^2, |s| <= 0.1716; to 2^-59.
  const double s = divide(f, 2.0 + f), q = s * s;
  double p = constants.artanh[0];
  p = p * q + constants.artanh[1];
  p = p * q + constants.artanh[2];
  p = p * q + constants.artanh[3];
  p = p * q + constants.artanh[4];
  p = p * q + constants.artanh[5];
  p = p * q + constants.artanh[6];
  // 2 s = f - s f exactly, which keeps f's own precision. ln 2 in two parts: e times the first is exact.
  const double log1p = f - s * (f - q * p);
  const double log = e * constants.ln2_high + (e * constants.ln2_low + log1p);
  const double radius = square_root(-2.0 * log);

  // 2 pi v = k quarter turns + a, |a| <= pi/4, k to the nearest: the upper two bits of `turned`.
  const uint64_t turned = w1 + 0x2000000000000000u;
  const int64_t rest = static_cast<int64_t>(turned & 0x3fffffffffffffffu) - 0x2000000000000000;
  const double a = to_double(rest) * constants.turn, b = a * a;
  // sin a = a + a b S(b), to 2^-58; cos a = 1 - b/2 + b^2 C(b), to 2^-64.
  double sine = constants.sine[0];
  sine = sine * b + constants.sine[1];
  sine = sine * b + constants.sine[2];
  sine = sine * b + constants.sine[3];
  sine = sine * b + constants.sine[4];
  sine = sine * b + constants.sine[5];
  sine = a + a * (b * sine);
  double cosine = constants.cosine[0];
  cosine = cosine * b + constants.cosine[1];
  cosine = cosine * b + constants.cosine[2];
  cosine = cosine * b + constants.cosine[3];
  cosine = cosine * b + constants.cosine[4];
  cosine = cosine * b + constants.cosine[5];
  cosine = 1.0 - (0.5 * b - b * (b * cosine));
  // cos and sin of the sum: exchanged after an odd number of quarter turns, and signed by the quadrant.
  const bool odd = (turned & 0x4000000000000000u) != 0;
  const double along = radius * (odd ? sine : cosine), across = radius * (odd ? cosine : sine);
  *z0 = from_bits(bits_of(along) ^ ((turned + 0x4000000000000000u) & sign));
  *z1 = from_bits(bits_of(across) ^ (turned & sign));
}

}  // namespace dpk
