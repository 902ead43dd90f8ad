// How the slots of groups lie in lanes, and what is done over the lanes of each group: its softmax, its sums.
#pragma once

#include <type_traits>
#include <utility>

#include "slot_lanes.h"

namespace objslot::OBJSLOT_ISA {

// Groups start at multiples of `step` lanes: a power of two, or whole vectors. Lanes between them are padding,
// with logits of minus infinity and weights of zero.
struct Layout {
  int64_t groups, slots, step, lanes, rows;
};
template <class T>
OBJSLOT_INLINE Layout layout_of(int64_t groups, int64_t slots) {
  int64_t step = 1;
  while (step < slots && step < width<T>) step *= 2;
  if (step < slots) step = padded<T>(slots);
  return {groups, slots, step, padded<T>(groups * step), (groups - 1) * step + slots};
}

template <class T, int S, int... lane>
OBJSLOT_INLINE Vec<T> exchanged(Vec<T> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ S)...);
}
// Every lane gets the result of its segment of `Step` lanes.
template <class T, int Step, bool Largest, int S = 1>
OBJSLOT_INLINE Vec<T> reduce_segments(Vec<T> v) {
  if constexpr (S < Step) {
    const Vec<T> other = exchanged<T, S>(v, std::make_integer_sequence<int, width<T>>());
    return reduce_segments<T, Step, Largest, 2 * S>(Largest ? larger(v, other) : v + other);
  } else {
    return v;
  }
}

// One over a sum of powers, to about a unit in the last place: a division takes as long as the power.
template <class T>
OBJSLOT_INLINE Vec<T> inverse_of(Vec<T> sum) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> first = (Vec<T>)_mm512_rcp14_ps((__m512)sum);
    return fused(first, fused(-first, sum, broadcast(T(1))), first);
  }
#endif
  return T(1) / sum;
}

// Turns the logits of a position, in units of log2, into probabilities. Step 0: groups of several vectors.
template <class T, int Step>
OBJSLOT_INLINE void softmax_lanes(T* row, const Layout& layout) {
  if constexpr (Step > 0) {
    for (int64_t z = 0; z < layout.lanes; z += width<T>) {
      const Vec<T> logit = load(row + z);
      const Vec<T> power = exp2<T>(logit - reduce_segments<T, Step, true>(logit));
      store(row + z, power * inverse_of<T>(reduce_segments<T, Step, false>(power)));
    }
  } else {
    for (int64_t begin = 0; begin < layout.lanes; begin += layout.step) {
      Vec<T> top = load(row + begin);
      for (int64_t z = width<T>; z < layout.step; z += width<T>) top = larger(load(row + begin + z), top);
      top = reduce_segments<T, width<T>, true>(top);
      Vec<T> total{};
      for (int64_t z = 0; z < layout.step; z += width<T>) {
        const Vec<T> power = exp2<T>(load(row + begin + z) - top);
        store(row + begin + z, power);
        total += power;
      }
      const Vec<T> inverse = T(1) / reduce_segments<T, width<T>, false>(total);
      for (int64_t z = 0; z < layout.step; z += width<T>) store(row + begin + z, load(row + begin + z) * inverse);
    }
  }
}

template <class T>
OBJSLOT_INLINE void copy_lanes(const T* row, const Layout& layout, T* out) {
  for (int64_t z = 0; z < layout.lanes; z += width<T>) store(out + z, load(row + z));
}

// sums over the lanes of each group, in every lane of the group
template <class T, int Step>
OBJSLOT_INLINE void sum_groups(const T* row, const Layout& layout, T* sums) {
  if constexpr (Step > 0) {
    for (int64_t z = 0; z < layout.lanes; z += width<T>)
      store(sums + z, reduce_segments<T, Step, false>(load(row + z)));
  } else {
    for (int64_t begin = 0; begin < layout.lanes; begin += layout.step) {
      Vec<T> total{};
      for (int64_t z = 0; z < layout.step; z += width<T>) total += load(row + begin + z);
      total = reduce_segments<T, width<T>, false>(total);
      for (int64_t z = 0; z < layout.step; z += width<T>) store(sums + begin + z, total);
    }
  }
}

// Calls body with the step of the layout as a constant.
template <class T, class Body>
OBJSLOT_INLINE void with_step(const Layout& layout, const Body& body) {
  switch (layout.step) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 4:
      if constexpr (width<T> >= 4) return body(std::integral_constant<int, 4>());
      break;
    case 8:
      if constexpr (width<T> >= 8) return body(std::integral_constant<int, 8>());
      break;
    case 16:
      if constexpr (width<T> >= 16) return body(std::integral_constant<int, 16>());
      break;
  }
  body(std::integral_constant<int, 0>());
}

template <class T, int Step, int... lane>
OBJSLOT_INLINE Vec<T> repeated(Vec<T> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane / Step)...);
}
// lanes: the value of every group in all its lanes, zero past the last group. Reads whole vectors of values.
template <class T, int Step>
OBJSLOT_INLINE void spread_groups(T* values, const Layout& layout, T* lanes) {
  if constexpr (Step > 0) {
    for (int64_t g = layout.groups; g < layout.lanes / Step; ++g) values[g] = T(0);
    for (int64_t z = 0; z < layout.lanes; z += width<T>)
      store(lanes + z, repeated<T, Step>(load(values + z / Step), std::make_integer_sequence<int, width<T>>()));
  } else {
    for (int64_t z = 0; z < layout.lanes; z += width<T>) store(lanes + z, broadcast(values[z / layout.step]));
  }
}

}  // namespace objslot::OBJSLOT_ISA
