// Powers of two and logarithms to base two, on vectors.
#pragma once

#include "sinkhorn_simd.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int mantissa_bits = 23, degree = 6;
  static constexpr float lowest = -126, rounder = 12582912;  // 1.5 * 2^23
  // Minimax in the relative error for 2^r, 2e-9 before rounding: on [0, 1) where the instruction set takes the
  // fraction of a number in one step, on [-1/2, 1/2] otherwise.
#if defined(__AVX512F__)
  static constexpr float series[] = {1.f,           0.69314706f,   0.24022931f,   0.055485297f,
                                     0.0096754190f, 0.0012468151f, 0.00021611869f};
#else
  static constexpr float series[] = {1.f,           0.69314718f,   0.24022648f,   0.055503327f,
                                     0.0096184555f, 0.0013398811f, 0.00015348705f};
#endif
};
template <>
struct Exponent<double> {
  static constexpr int mantissa_bits = 52, degree = 13;
  static constexpr double lowest = -1022, rounder = 6755399441055744;  // 1.5 * 2^52
  // ln(2)^k / k!
  static constexpr double series[] = {1.0,
                                      0.693147180559945309,
                                      0.240226506959100712,
                                      0.0555041086648215800,
                                      0.00961812910762847716,
                                      0.00133335581464284434,
                                      0.000154035303933816099,
                                      1.52527338040598403e-05,
                                      1.32154867901443095e-06,
                                      1.01780860092396997e-07,
                                      7.05491162080112333e-09,
                                      4.44553827187081150e-10,
                                      2.56784359934882051e-11,
                                      1.36914888539041289e-12};
};

// 2^x: about one unit in the last place, 0 below the smallest normal number or little beyond, NaN for NaN.
template <class T>
OBJSLOT_INLINE Vec<T> exp2(Vec<T> x) {
  using E = Exponent<T>;
#if defined(__AVX512F__)
  // The fraction of an infinity is zero. scalef rounds the exponent it is given down.
  Vec<T> rest, whole = x;
  if constexpr (sizeof(T) == 4) {
    rest = (Vec<T>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  } else {
    rest = (Vec<T>)_mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    whole = x - rest;
  }
#else
  const Vec<T> shifted = x + E::rounder;
  const Vec<T> whole = shifted - E::rounder;
  const Vec<T> rest = x - whole;
#endif
  Vec<T> power = broadcast<T>(E::series[E::degree]);
#pragma GCC unroll 13
  for (int k = E::degree - 1; k >= 0; --k) power = fused(power, rest, broadcast<T>(E::series[k]));
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_scalef_ps((__m512)power, (__m512)whole);
  else
    return (Vec<T>)_mm512_scalef_pd((__m512d)power, (__m512d)whole);
#else
  // Exponents out of range may wrap around: what they give is not used.
  Vec<T> result = (Vec<T>)((Unsigned<T>)power + ((Unsigned<T>)shifted << E::mantissa_bits));
  result = x < E::lowest ? Vec<T>{} : result;
  return x == x ? result : x;
#endif
}

// log2(x) for x >= 0, within two units in the last place; minus infinity for 0 and for
// subnormal numbers, NaN for NaN.
template <class T>
OBJSLOT_INLINE Vec<T> log2(Vec<T> x) {
  using E = Exponent<T>;
  // The bits of sqrt(1/2).
  constexpr auto root_half =
      static_cast<typename Lanes<T>::Integer>(sizeof(T) == 4 ? int64_t{0x3f3504f3} : int64_t{0x3fe6a09e667f3bcd});
  const Bits<T> bits = (Bits<T>)x;
  const Bits<T> exponent = (bits - root_half) >> E::mantissa_bits;
  const Vec<T> mantissa = (Vec<T>)(bits - (exponent << E::mantissa_bits));
  // log(m) = 2 artanh(t), t = (m - 1) / (m + 1), with m in [sqrt(1/2), sqrt(2)).
  const Vec<T> t = (mantissa - T(1)) / (mantissa + T(1));
  const Vec<T> square = t * t;
  constexpr int terms = sizeof(T) == 4 ? 4 : 10;
  Vec<T> tail = broadcast<T>(T(1) / (2 * terms + 1));
#pragma GCC unroll 10
  for (int k = terms - 1; k >= 0; --k) tail = fused(tail, square, broadcast<T>(T(1) / (2 * k + 1)));
  const Vec<T> whole = __builtin_convertvector(exponent, Vec<T>);
  Vec<T> result = fused(t * tail, broadcast<T>(T(2.885390081777926815)), whole);
  result = x < std::numeric_limits<T>::min() ? broadcast<T>(-std::numeric_limits<T>::infinity()) : result;
  result = x == std::numeric_limits<T>::infinity() ? x : result;
  return x == x ? result : x;
}

}  // namespace objslot::OBJSLOT_ISA
