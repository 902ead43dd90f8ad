// Rows turned so that each of them is a lane, packed as the right factor of products.
#pragma once

#include <utility>

#include "slot_products.h"

namespace objslot::OBJSLOT_ISA {

// Blocks of `Step` lanes: every other one of a and, behind each of them, that of b; the first ones or the second ones.
template <class T, int Step, bool Second, int... lane>
OBJSLOT_INLINE Vec<T> paired(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
  constexpr int from = Second ? Step : 0;
  return __builtin_shufflevector(a, b, ((lane & Step) ? width<T> + lane - Step + from : lane + from)...);
}

// A square of as many vectors as have lanes.
template <class T, int Step = 1>
OBJSLOT_INLINE void turn_square(Vec<T>* square) {
  if constexpr (Step < width<T>) {
    constexpr auto lanes = std::make_integer_sequence<int, width<T>>();
#pragma GCC unroll 16
    for (int i = 0; i < width<T>; ++i) {
      if (i & Step) continue;
      const Vec<T> a = square[i], b = square[i + Step];
      square[i] = paired<T, Step, false>(a, b, lanes);
      square[i + Step] = paired<T, Step, true>(a, b, lanes);
    }
    turn_square<T, 2 * Step>(square);
  }
}

// packed (terms, lanes) in panels = factor * rows (lanes, terms), turned. offset(lane): where its row begins, negative
// for a row of zeros.
template <class T, class Offset>
static void pack_panels(const void* rows, Element element, int64_t lanes, int64_t terms, T factor, const Offset& offset,
                        T* packed) {
  const int64_t most = panel_lanes<T>(lanes);
  for (int64_t z = 0; z < lanes; z += width<T>) {
    const int64_t begin = z / most * most, step = lanes - begin < most ? lanes - begin : most;
    T* const out = packed + begin * terms + (z - begin);
    int64_t row[width<T>];
    for (int lane = 0; lane < width<T>; ++lane) row[lane] = offset(z + lane);
    for (int64_t d = 0; d < terms; d += width<T>) {
      const int64_t count = terms - d < width<T> ? terms - d : width<T>;
      Vec<T> square[width<T>];
#pragma GCC unroll 16
      for (int lane = 0; lane < width<T>; ++lane) {
        T room[width<T>];
        square[lane] =
            row[lane] < 0 ? Vec<T>{} : load_upto(read_row<T>(rows, element, row[lane] + d, count, room), count);
      }
      turn_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < width<T>; ++i)
        if (i < count) store(out + (d + i) * step, square[i] * factor);
    }
  }
}

}  // namespace objslot::OBJSLOT_ISA
