// The ChaCha20 block function (RFC 8439) and the standard normals made from its output; host and device code
// alike.
//
// No multiplication is fused with an addition in the files that include this (CMakeLists.txt), and only + - *
// / sqrt and integer operations are used, all of them correctly rounded: the normals have the same bits on
// every CPU and GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
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
DPK_SHARED void quarter_round(T& a, T& b, T& c, T& d) {
  a += b, d = rotate_left<T>(d ^ a, 16);
  c += d, b = rotate_left<T>(b ^ c, 12);
  a += b, d = rotate_left<T>(d ^ a, 8);
  c += d, b = rotate_left<T>(b ^ c, 7);
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

// double(v), correctly rounded, for 0 <= v < 2^63; written so that it vectorises without an instruction for
// it: 2^84 + (v >> 32) 2^32 and 2^52 + (v mod 2^32) are exact, and so is taking 2^84 + 2^52 from the first.
DPK_SHARED double to_double(uint64_t v) {
  const double high = from_bits((v >> 32) | 0x4530000000000000u);
  const double low = from_bits((v & 0xffffffffu) | 0x4330000000000000u);
  return (high - 0x1.00000001p84) + low;
}

// Box-Muller: two independent standard normals from two uniform 64-bit words,
//
//     z0 = sqrt(-2 ln u) cos(2 pi v),   z1 = sqrt(-2 ln u) sin(2 pi v),   u = (w0 + 1) 2^-64 in (0, 1],   v =
//     w1 2^-64.
//
// Up to 1/2, u itself is rounded; above, its distance to 1 is, (2^64 - 1 - w0) 2^-64, so that both ends keep
// full relative precision. The largest radius is sqrt(128 ln 2) = 9.42, the smallest but 0 is 2^-31.5. v is
// reduced to the nearest quarter turn in integers, so no rounding of pi decides the quadrant.
DPK_SHARED void box_muller(uint64_t w0, uint64_t w1, double* z0, double* z1) {
  const double unit = 0x1p-64;
  // ln u = e ln 2 + ln(1 + f) with sqrt(1/2) <= 1 + f <= sqrt(2).
  const bool upper = (w0 >> 63) != 0;
  const uint64_t scaled = bits_of(to_double(upper ? 0 : w0) + 1.0);  // 2^64 u
  const uint64_t carried =
      scaled + 0x00095f619980c433u;  // the exponent is one more from a mantissa of sqrt(2) on
  const double mantissa = from_bits(scaled - (carried & 0xfff0000000000000u) + 0x3ff0000000000000u);
  const double exponent = to_double(carried >> 52) - (1023 + 64);
  const double rest = to_double(upper ? ~w0 : 0) * unit;  // 1 - u
  const bool near_one = rest < 0.2928932188134524;        // u > sqrt(1/2)
  const double f = upper ? (near_one ? -rest : 1.0 - 2.0 * rest) : mantissa - 1.0;
  const double e = upper ? (near_one ? 0.0 : -1.0) : exponent;
  // ln(1 + f) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.1716; the first term left out is below
  // 2^-60 of the sum.
  const double s = f / (2.0 + f), q = s * s;
  double p = 2.0 / 21;
  p = p * q + 2.0 / 19;
  p = p * q + 2.0 / 17;
  p = p * q + 2.0 / 15;
  p = p * q + 2.0 / 13;
  p = p * q + 2.0 / 11;
  p = p * q + 2.0 / 9;
  p = p * q + 2.0 / 7;
  p = p * q + 2.0 / 5;
  p = p * q + 2.0 / 3;
  // 2 s = f - s f exactly, which keeps f's own precision. ln 2 in two parts: e times the first is exact.
  const double log1p = f - s * (f - q * p);
  const double log = e * 0x1.62e42fefa38p-1 + (e * 0x1.ef35793c7673p-45 + log1p);
  const double radius = sqrt(-2.0 * log);

  // 2 pi v = k quarter turns + a, |a| <= pi/4, k to the nearest.
  const uint64_t k = (w1 + 0x2000000000000000u) >> 62;
  const uint64_t turned = w1 - (k << 62);  // modulo 2^64, in [-2^61, 2^61)
  const bool negative = (turned >> 63) != 0;
  const double magnitude = to_double(negative ? 0 - turned : turned) * (6.283185307179586 * unit);
  const double a = negative ? -magnitude : magnitude, b = a * a;
  // Taylor series; the first terms left out are below 2^-58.
  double sine = 1.0 / 355687428096000;  // 17!
  sine = sine * b - 1.0 / 1307674368000;
  sine = sine * b + 1.0 / 6227020800;
  sine = sine * b - 1.0 / 39916800;
  sine = sine * b + 1.0 / 362880;
  sine = sine * b - 1.0 / 5040;
  sine = sine * b + 1.0 / 120;
  sine = sine * b - 1.0 / 6;
  sine = a + a * (b * sine);
  double cosine = 1.0 / 20922789888000;  // 16!
  cosine = cosine * b - 1.0 / 87178291200;
  cosine = cosine * b + 1.0 / 479001600;
  cosine = cosine * b - 1.0 / 3628800;
  cosine = cosine * b + 1.0 / 40320;
  cosine = cosine * b - 1.0 / 720;
  cosine = cosine * b + 1.0 / 24;
  cosine = 1.0 - (0.5 * b - b * (b * cosine));
  const bool odd = (k & 1) != 0;
  const double x = odd ? sine : cosine, y = odd ? cosine : sine;
  *z0 = radius * (((k + 1) & 2) != 0 ? -x : x);
  *z1 = radius * ((k & 2) != 0 ? -y : y);
}

}  // namespace dpk
