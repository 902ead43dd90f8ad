// What rounding takes from the gradients of the scalings' logarithms, put back.
//
// A factor moved from x to y changes no plan, so that the gradients of one iteration have a sum that is known
// beforehand: that of the rows is what the gradients of the potentials that were handed out differ by, and that of the
// columns its negative. Where a row or a column holds nearly all of the mass, its gradient is a small difference of
// large numbers; what rounding leaves of it grows with every iteration, and masses that nearly vanish see nothing else.
// So both sums are set right, by a shift of all gradients in proportion to the masses. For scalings, not for
// logarithms.
#pragma once

#include "sinkhorn_undo.h"

namespace objslot::OBJSLOT_ISA {

// Masses of one side; null for `uniform` each.
template <class T>
struct Masses {
  const T* at;
  T uniform;
  int64_t count;
  OBJSLOT_INLINE_MEMBER Vec<T> load(int64_t i) const {
    const Vec<T> mass = at ? load_upto(at + i, count - i) : broadcast(uniform);
    return count - i < width<T> ? keep_first<T>(mass, count - i) : mass;
  }
};

template <class T>
struct Balance {
  Masses<T> a, b;
  T total_a, total_b, surplus;  // surplus: the sum of the gradients of the rows

  static OBJSLOT_INLINE_MEMBER Balance of(const Gradients<T>& g) {
    const Matrix<T>& matrix = g.matrix;
    Balance found{{matrix.a, matrix.a0, matrix.n}, {matrix.b, matrix.b0, matrix.m}, 0, 0, 0};
    const auto side = [&](const Masses<T>& masses, const void* gradient, const T* last, T* total) {
      Vec<T> mass{}, upper{};
      for (int64_t i = 0; i < masses.count; i += width<T>) {
        mass += masses.load(i);
        if (!gradient) continue;
        const int64_t left = masses.count - i;
        const Bits<T> masked = load_upto(last + i, left) == T(0);
        upper += none_where<T>(masked, load_upto(static_cast<const T*>(gradient) + g.index * masses.count + i, left));
      }
      *total = sum_lanes<T>(mass);
      return sum_lanes<T>(upper);
    };
    found.surplus = side(found.a, g.out.grad_f, g.x(g.count - 1), &found.total_a);
    found.surplus -= side(found.b, g.out.grad_g, g.y(g.count - 1), &found.total_b);
    return found;
  }

  // Infinity and NaN stay where they are.
  static OBJSLOT_INLINE_MEMBER T usable(T shift) { return shift - shift == T(0) ? shift : T(0); }

  // The shift of the rows, whose gradients relative to the masses are in w.share: first of what they added to grad_a.
  OBJSLOT_INLINE_MEMBER T shift_rows(const Gradients<T>& g, Work<T>& w) const {
    Vec<T> sum{};
    for (int64_t i = 0; i < a.count; i += width<T>) sum = fused(load_upto(w.share + i, a.count - i), a.load(i), sum);
    const T shift = usable((sum_lanes<T>(sum) - surplus) / total_a);
    const T* last = g.x(g.count - 1);
    for (int64_t i = 0; i < a.count; i += width<T>) {
      const Bits<T> masked = load_upto(last + i, a.count - i) == T(0);
      store(w.grad_a + i, load(w.grad_a + i) - none_where<T>(masked, broadcast(shift)));
    }
    return shift;
  }

  // Then of what the plan's correction takes from them.
  OBJSLOT_INLINE_MEMBER void shift_factors(const Gradients<T>& g, Work<T>& w, int64_t t, T shift) const {
    for (int64_t i = 0; i < a.count; i += sweep_rows) {
      T* moves = w.left + i * 2 * g.count + 2 * t * sweep_rows;
      T* factors = moves + sweep_rows;
      for (int64_t r = 0; r < sweep_rows; r += width<T>)
        store(factors + r, load(factors + r) - shift * load(moves + r));
    }
  }

  // The gradients of the columns after iteration t, whose rows were shifted.
  OBJSLOT_INLINE_MEMBER void shift_columns(const Gradients<T>& g, Work<T>& w, int64_t t, T shift) const {
    const T *now = g.y(t), *before = g.y(t - 1);
    Vec<T> sum{};
    for (int64_t j = 0; j < b.count; j += width<T>) {
      const int64_t left = b.count - j;
      const Vec<T> one = load_upto(before + j, left), other = load_upto(now + j, left);
      const Vec<T> moved = none_where<T>(other == T(0), one / other);
      const Vec<T> value = load(w.grad_g + j) + shift * (b.load(j) * moved);
      store(w.grad_g + j, value);
      sum += value;
    }
    const T rest = usable((sum_lanes<T>(sum) + surplus) / total_b);
    for (int64_t j = 0; j < b.count; j += width<T>) store(w.grad_g + j, load(w.grad_g + j) - rest * b.load(j));
  }
};

}  // namespace objslot::OBJSLOT_ISA
