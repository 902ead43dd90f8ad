// Vectors of one register.
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
  if (count < 0 || count > width<T>) __builtin_unreachable();
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
OBJSLOT_INLINE Vec<T> load_upto(const T* p, int64_t count) {
  return count >= width<T> ? load(p) : load_first(p, count);
}
template <class T>
OBJSLOT_INLINE void store_upto(T* p, Vec<T> v, int64_t count) {
  if (count >= width<T>)
    store(p, v);
  else
    store_first(p, v, count);
}

}  // namespace objslot::OBJSLOT_ISA
