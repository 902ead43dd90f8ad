// Vectors of one register, the few functions on them that Sinkhorn needs, and conversions of the half types.
//
// To be included by kernel files alone: everything is static and lives in the namespace of the level.
#pragma once

#include <cstdint>
#include <limits>

#ifdef OBJSLOT_X86
// Intrinsics without a mask start from a variable that is left uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#include "objslot/dispatch.h"
#include "objslot/sinkhorn.h"

#if defined(__AVX512F__)
#define OBJSLOT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define OBJSLOT_VECTOR_BYTES 32
#else
#define OBJSLOT_VECTOR_BYTES 16
#endif

#define OBJSLOT_INLINE static inline __attribute__((always_inline))
#define OBJSLOT_INLINE_MEMBER inline __attribute__((always_inline))

namespace objslot::OBJSLOT_ISA {

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(OBJSLOT_VECTOR_BYTES), aligned(4), may_alias));
  using Integer = int32_t;
  typedef int32_t Bits __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(OBJSLOT_VECTOR_BYTES), aligned(8), may_alias));
  using Integer = int64_t;
  typedef int64_t Bits __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(OBJSLOT_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Lanes<T>::Vector;
template <class T>
using Bits = typename Lanes<T>::Bits;
template <class T>
using Unsigned = typename Lanes<T>::Unsigned;
template <class T>
constexpr int width = OBJSLOT_VECTOR_BYTES / sizeof(T);

// n rounded up to whole vectors.
template <class T>
OBJSLOT_INLINE int64_t padded(int64_t n) {
  return (n + width<T> - 1) / width<T> * width<T>;
}

template <class T>
OBJSLOT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}
template <class T>
OBJSLOT_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}
template <class T>
OBJSLOT_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

OBJSLOT_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
OBJSLOT_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The larger of the two; b where either is NaN.
OBJSLOT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
OBJSLOT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of the two; b where either is NaN.
OBJSLOT_INLINE Vec<float> smaller(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
OBJSLOT_INLINE Vec<double> smaller(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// Subnormal numbers are zero while this lives: they are slow, and imprecise where zero would be seen.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  OBJSLOT_INLINE_MEMBER FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  OBJSLOT_INLINE_MEMBER ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  OBJSLOT_INLINE_MEMBER FlushSubnormals() {}
#endif
};

template <class T>
OBJSLOT_INLINE T sum_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T parts[width<T>];
  store(parts, v);
  for (int half = width<T> / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  return parts[0];
}
template <class T>
OBJSLOT_INLINE T largest_lane(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_max_pd((__m512d)v);
#endif
  T parts[width<T>];
  store(parts, v);
  for (int half = width<T> / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane)
      if (parts[lane + half] > parts[lane]) parts[lane] = parts[lane + half];
  return parts[0];
}

// The first `count` lanes, zero beyond; reads nothing past them.
template <class T>
OBJSLOT_INLINE Vec<T> load_first(const T* p, int64_t count) {
  if (count < 0) __builtin_unreachable();
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
#else
  T parts[width<T>] = {};
  for (int64_t lane = 0; lane < count; ++lane) parts[lane] = p[lane];
  return load(parts);
#endif
}
template <class T>
OBJSLOT_INLINE void store_first(T* p, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
#else
  T parts[width<T>];
  store(parts, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = parts[lane];
#endif
}
template <class T>
OBJSLOT_INLINE Vec<T> keep_first(Vec<T> v, int64_t count) {
  T parts[width<T>];
  store(parts, v);
  return load_first(parts, count);
}

// A store past the caches: p is aligned to a vector.
template <class T>
OBJSLOT_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
// Makes streamed stores visible to the other threads.
OBJSLOT_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

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

// ---- half types ----

OBJSLOT_INLINE float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}
// To the nearest, ties to even; NaN stays NaN.
OBJSLOT_INLINE uint16_t to_bfloat16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// Row elements in the arithmetic type: the memory itself where it has that type, otherwise a copy in
// `buffer`.
template <class T>
OBJSLOT_INLINE const T* read_row(const void* base, Element type, int64_t offset, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == 4) {
    const uint16_t* source = static_cast<const uint16_t*>(base) + offset;
    if (type == Element::bfloat16) {
      for (int64_t j = 0; j < count; ++j) buffer[j] = from_bfloat16(source[j]);
      return buffer;
    }
    if (type == Element::float16) {
      int64_t j = 0;
#if defined(__AVX512F__)
      for (; j + 16 <= count; j += 16)
        _mm512_storeu_ps(buffer + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + j))));
#elif defined(__AVX2__)
      for (; j + 8 <= count; j += 8)
        _mm256_storeu_ps(buffer + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
#endif
      for (; j < count; ++j) {
        _Float16 half;
        __builtin_memcpy(&half, source + j, 2);
        buffer[j] = static_cast<float>(half);
      }
      return buffer;
    }
  }
  return static_cast<const T*>(base) + offset;
}

// The other way round for the half types.
OBJSLOT_INLINE void write_half_row(const float* row, void* base, Element type, int64_t offset, int64_t count) {
  uint16_t* target = static_cast<uint16_t*>(base) + offset;
  if (type == Element::bfloat16) {
    for (int64_t j = 0; j < count; ++j) target[j] = to_bfloat16(row[j]);
    return;
  }
  int64_t j = 0;
#if defined(__AVX512F__)
  for (; j + 16 <= count; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + j),
                        _mm512_cvtps_ph(_mm512_loadu_ps(row + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  for (; j + 8 <= count; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; j < count; ++j) {
    const _Float16 half = static_cast<_Float16>(row[j]);
    __builtin_memcpy(target + j, &half, 2);
  }
}

}  // namespace objslot::OBJSLOT_ISA
