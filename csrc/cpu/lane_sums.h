// Sums and maxima over the lanes of several vectors at once.
#pragma once

#include "sinkhorn_simd.h"

namespace objslot::OBJSLOT_ISA {

#if defined(__AVX512F__)
// Two vectors become one: half of the lanes are of a, half of b, each made by `with` of two that were there. Within
// quarters of a register in the first steps, then across them. After all the steps, as many vectors as have lanes have
// become one with a lane for each, in order; fewer are repeated.
template <class T, int Step, class With>
OBJSLOT_INLINE Vec<T> meet(Vec<T> a, Vec<T> b, const With& with) {
  constexpr int pairs = sizeof(T) == 4 ? 1 : 0;
  if constexpr (Step < pairs)
    return with((Vec<T>)_mm512_unpacklo_ps((__m512)a, (__m512)b), (Vec<T>)_mm512_unpackhi_ps((__m512)a, (__m512)b));
  else if constexpr (Step == pairs)
    return with((Vec<T>)_mm512_unpacklo_pd((__m512d)a, (__m512d)b), (Vec<T>)_mm512_unpackhi_pd((__m512d)a, (__m512d)b));
  else
    return with((Vec<T>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88),
                (Vec<T>)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd));
}

template <class T, int R, int Step, class With>
OBJSLOT_INLINE void meet_all(Vec<T>* parts, const With& with) {
#pragma GCC unroll 8
  for (int r = 0; r < (R + 1) / 2; ++r)
    parts[r] = meet<T, Step>(parts[2 * r < R ? 2 * r : 0], parts[2 * r + 1 < R ? 2 * r + 1 : 0], with);
  if constexpr ((2 << Step) < width<T>) meet_all<T, (R + 1) / 2, Step + 1>(parts, with);
}
#endif

// out[r] = the lanes of parts[r] brought together by `with`, or by `whole` where that takes a vector at a time.
template <class T, int R, class With, class Whole>
OBJSLOT_INLINE void reduce_lanes_of(const Vec<T>* parts, T* out, const With& with, const Whole& whole) {
#if defined(__AVX512F__)
  if constexpr (R > 1) {
    (void)whole;
    Vec<T> left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = parts[r];
    meet_all<T, R, 0>(left, with);
    __builtin_memcpy(out, left, R * sizeof(T));
    return;
  }
#endif
  (void)with;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) out[r] = whole(parts[r]);
}

// sums[r] = the sum over the lanes of parts[r]; R is a power of two.
template <class T, int R>
OBJSLOT_INLINE void sum_lanes_of(const Vec<T>* parts, T* sums) {
  reduce_lanes_of<T, R>(
      parts, sums, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; },
      [](Vec<T> v) __attribute__((always_inline)) { return sum_lanes<T>(v); });
}

// tops[r] = the largest lane of parts[r]; R is a power of two.
template <class T, int R>
OBJSLOT_INLINE void largest_lanes_of(const Vec<T>* parts, T* tops) {
  reduce_lanes_of<T, R>(
      parts, tops, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return larger(a, b); },
      [](Vec<T> v) __attribute__((always_inline)) { return largest_lane<T>(v); });
}

}  // namespace objslot::OBJSLOT_ISA
