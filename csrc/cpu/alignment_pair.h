// Both plans of a pair of frames from one kernel matrix, applied to the values and never stored.
//
// With K = exp(scores / eps), one plan sets the rows first, the other one, on the transposed scores, the columns.
// Both iterations are sums over the rows and the columns of the same K, so that one sweep serves both, and K is
// exponentiated once, with the maximum of every row taken out: the second plan then starts from x = e^maximum
// in place of x = 1. The last sweep moves the values while its rows are in the first-level cache.
#pragma once

#include "alignment_sweeps.h"

namespace objslot::OBJSLOT_ISA {

// One of the two plans: x of the rows, y of the columns.
template <class T>
struct Scaling {
  T* x;     // (n)
  T* y;     // (columns)
  T* sums;  // (columns)
};

// Where a pair is worked on; n and columns are rounded up to whole tiles.
template <class T>
struct PairWork {
  T* offset;      // (n): minus the scaled maximum of the row
  T* weights;     // (columns, lanes of the channels): values of the second frame times y
  T* collected;   // (columns, lanes of the channels): what the second frame gets
  T* row_values;  // (value_rows, lanes of the channels): values of the first frame times x
  Scaling<T> forth, back;
};

// What is moved between the frames of a pair, and by which scores.
template <class T>
struct Pair {
  T* kernel;  // (n, stride): scores, then 2^(scores * scale + offset)
  int64_t stride, n, channels, n_iters;
  T scale;
  const T *row_mass, *column_mass;      // (n), null for 1 / n each
  const T *row_values, *column_values;  // (n, channels)
  T *forth, *back;                      // (n, channels): what the rows get, and the columns

  OBJSLOT_INLINE_MEMBER T* row(int64_t i) const { return kernel + i * stride; }
  OBJSLOT_INLINE_MEMBER int64_t columns() const { return padded<T>(n); }
};

// Calls visit(first, count) for up to R rows at a time.
template <int R, class Visit>
OBJSLOT_INLINE void for_rows(int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n; i += R) visit(i, n - i < R ? n - i : int64_t{R});
}

// x of one row; false where its sum is too small to be exact.
template <class T>
OBJSLOT_INLINE bool set_row(const Pair<T>& p, T* x, int64_t i, T total, T limit) {
  const T mass = p.row_mass ? p.row_mass[i] : T(1) / T(p.n);
  x[i] = mass == T(0) ? T(0) : mass / total;
  return total > limit || mass == T(0);
}

template <class T>
OBJSLOT_INLINE void add_pair(const Pair<T>& p, const PairWork<T>& w, int64_t i, int64_t count) {
  const Scaling<T>&one = w.forth, &other = w.back;
  if (count == pair_rows) {
    add_twice<T, pair_rows>(p.row(i), p.stride, one.x + i, other.x + i, p.columns(), one.sums, other.sums);
    return;
  }
  for (int64_t r = i; r < i + count; ++r)
    add_twice<T, 1>(p.row(r), p.stride, one.x + r, other.x + r, p.columns(), one.sums, other.sums);
}

template <class T>
OBJSLOT_INLINE bool set_pair_columns(const Pair<T>& p, const PairWork<T>& w) {
  bool safe = true;
  const auto set = [&](const Scaling<T>& s) {
    safe &= divide(p.column_mass, T(1) / T(p.n), s.sums, least(s.x, p.n), p.n, s.y);
    fill(s.sums, p.columns(), T(0));
  };
  set(w.forth);
  set(w.back);
  return safe;
}

// The kernel, and the first iteration.
template <class T>
static bool begin_pair(const Pair<T>& p, const PairWork<T>& w) {
  // The first x of the plan back; the largest is 1.
  T lowest = w.offset[0];
  for (int64_t i = 1; i < p.n; ++i) lowest = w.offset[i] < lowest ? w.offset[i] : lowest;
  for (int64_t i = 0; i < p.n; i += width<T>)
    store(w.back.x + i, exp2<T>(broadcast(lowest) - load_upto(w.offset + i, p.n - i)));
  fill(w.forth.sums, p.columns(), T(0));
  fill(w.back.sums, p.columns(), T(0));
  bool safe = true;
  for_rows<pair_rows>(p.n, [&](int64_t i, int64_t count) {
    for (int64_t r = i; r < i + count; ++r) {
      const Vec<T> parts = exponentiate_row<T, false>(p.row(r), p.scale, w.offset[r], p.n, nullptr, p.row(r));
      safe &= set_row(p, w.forth.x, r, sum_lanes<T>(parts), T(0.25));
    }
    add_pair(p, w, i, count);
  });
  return set_pair_columns(p, w) && safe;
}

template <class T>
static bool iterate_pair(const Pair<T>& p, const PairWork<T>& w) {
  const T limit = least(w.forth.y, p.n), back_limit = least(w.back.y, p.n);
  bool safe = true;
  for_rows<pair_rows>(p.n, [&](int64_t i, int64_t count) {
    T totals[pair_rows], back_totals[pair_rows];
    if (count == pair_rows)
      dot_twice<T, pair_rows>(p.row(i), p.stride, w.forth.y, w.back.y, p.columns(), totals, back_totals);
    else
      for (int64_t r = 0; r < count; ++r)
        dot_twice<T, 1>(p.row(i + r), p.stride, w.forth.y, w.back.y, p.columns(), totals + r, back_totals + r);
    for (int64_t r = 0; r < count; ++r) {
      safe &= set_row(p, w.forth.x, i + r, totals[r], limit);
      safe &= set_row(p, w.back.x, i + r, back_totals[r], back_limit);
    }
    add_pair(p, w, i, count);
  });
  return set_pair_columns(p, w) && safe;
}

// What R rows get, and what the columns get from them.
template <class T, int R>
OBJSLOT_INLINE void move_rows(const Pair<T>& p, const PairWork<T>& w, int64_t i) {
  const int64_t lanes = padded<T>(p.channels);
  for (int64_t c = 0; c < p.channels; c += width<T>) {
    const int64_t left = p.channels - c;
    Vec<T> totals[R];
    move_both_ways<T, R>(p.row(i), p.stride, w.weights + c, w.row_values + c, lanes, p.n, w.collected + c, totals);
    for (int64_t r = 0; r < R; ++r) {
      const Vec<T> value = broadcast(w.forth.x[i + r]) * totals[r];
      T* target = p.forth + (i + r) * p.channels + c;
      if (left < width<T>)
        store_first(target, value, left);
      else
        store(target, value);
    }
  }
}

// The rows of the plan back are its columns: they are set last.
template <class T>
static bool move_pair_values(const Pair<T>& p, const PairWork<T>& w) {
  const T limit = least(w.back.y, p.n);
  bool safe = true;
  scale_values(p.column_values, w.forth.y, p.n, p.channels, w.weights);
  fill(w.collected, p.n * padded<T>(p.channels), T(0));
  for_rows<value_rows>(p.n, [&](int64_t i, int64_t count) {
    T totals[value_rows];
    if (count == value_rows)
      dot_rows<T, value_rows>(p.row(i), p.stride, w.back.y, p.columns(), totals);
    else
      for (int64_t r = 0; r < count; ++r) dot_rows<T, 1>(p.row(i + r), p.stride, w.back.y, p.columns(), totals + r);
    for (int64_t r = 0; r < count; ++r) safe &= set_row(p, w.back.x, i + r, totals[r], limit);
    if (count == value_rows) {
      scale_values(p.row_values + i * p.channels, w.back.x + i, count, p.channels, w.row_values);
      move_rows<T, value_rows>(p, w, i);
      return;
    }
    for (int64_t r = i; r < i + count; ++r) {
      scale_values(p.row_values + r * p.channels, w.back.x + r, 1, p.channels, w.row_values);
      move_rows<T, 1>(p, w, r);
    }
  });
  scale_rows(w.collected, w.back.y, p.n, p.channels, p.back);
  return safe;
}

// All of a pair whose offsets are in the work; false where the scalings leave the range.
template <class T>
static bool solve_pair(const Pair<T>& p, const PairWork<T>& w) {
  if (!begin_pair(p, w)) return false;
  for (int64_t t = 1; t < p.n_iters; ++t)
    if (!iterate_pair(p, w)) return false;
  return move_pair_values(p, w);
}

}  // namespace objslot::OBJSLOT_ISA
