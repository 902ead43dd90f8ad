// The log-domain iteration, for matrices whose scalings leave the range of the arithmetic type.
//
// Two exponentials an entry and iteration, one sweep over the scores: the column sums are kept relative to
// the largest term seen so far. Potentials are natural logarithms, used exactly as they are handed out:
// converted ones would no longer have columns that sum to b, which the gradient feels.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct LogState {
  T* f;     // (n) potentials
  T* g;     // (columns)
  T* tops;  // (chunks, columns) largest term of a column so far
  T* sums;  // (chunks, columns) sum of the terms relative to it
  T* rows;  // (threads, block, columns) rows in the arithmetic type
};

template <class T>
constexpr T lowest_finite = std::numeric_limits<T>::lowest();

// e^x and ln x.
template <class T>
OBJSLOT_INLINE Vec<T> exponential(Vec<T> x) {
  return exp2<T>(x * log2_e<T>);
}
template <class T>
OBJSLOT_INLINE Vec<T> logarithm(Vec<T> x) {
  return log2<T>(x) * ln2<T>;
}

// The potential of a row, log_mass - ln of the sum of e^(row * scale + g) over j; minus infinity where nothing is left.
// Numbers of the size of the potentials are rounded: as few as can be, and those that nearly cancel meet first.
template <class T>
OBJSLOT_INLINE T row_potential(const T* row, T scale, const T* g, int64_t m, T log_mass) {
  Vec<T> tops = broadcast(lowest_finite<T>);
  const Vec<T> scales = broadcast(scale);
  const int64_t whole = m / width<T> * width<T>;
  for (int64_t j = 0; j < whole; j += width<T>) tops = larger(fused(load(row + j), scales, load(g + j)), tops);
  // The padding of g is minus infinity.
  if (whole < m) tops = larger(fused(load_first(row + whole, m - whole), scales, load(g + whole)), tops);
  const T top = largest_lane<T>(tops);
  const Vec<T> base = broadcast(-top);
  Vec<T> sum{};
  for (int64_t j = 0; j < whole; j += width<T>) sum += exponential<T>(fused(load(row + j), scales, base) + load(g + j));
  if (whole < m) sum += exponential<T>(fused(load_first(row + whole, m - whole), scales, base) + load(g + whole));
  const T total = sum_lanes<T>(sum);
  if (total == T(0)) return -std::numeric_limits<T>::infinity();
  return (log_mass - logarithm<T>(broadcast(total))[0]) - top;
}

template <class T>
OBJSLOT_INLINE void log_rows_chunk(const Matrix<T>& matrix, const LogState<T>& state, int64_t chunk, int worker) {
  const T infinity = std::numeric_limits<T>::infinity();
  const int64_t m = matrix.m, columns = matrix.columns;
  T* tops = state.tops + chunk * columns;
  T* sums = state.sums + chunk * columns;
  fill(tops, columns, lowest_finite<T>);
  fill(sums, columns, T(0));
  const int64_t end = end_of_chunk(matrix, chunk);
  for (int64_t i = chunk * chunk_rows; i < end; i += block) {
    const int64_t count = end - i < block ? end - i : block;
    const T* row[block];
    Vec<T> f[block];
    for (int64_t r = 0; r < count; ++r) {
      row[r] = matrix.row(i + r, state.rows + (worker * block + r) * columns);
      const T mass = matrix.a_at(i + r);
      T value = row_potential(row[r], matrix.inverse_eps, state.g, m, logarithm<T>(broadcast(mass))[0]);
      if (mass == T(0)) value = -infinity;
      state.f[i + r] = value;
      f[r] = broadcast(value);
    }
    for (int64_t j = 0; j < m; j += width<T>) {
      const int64_t left = m - j;
      const Vec<T> before = load(tops + j);
      Vec<T> top = before, term[block];
      for (int64_t r = 0; r < count; ++r) {
        const Vec<T> scores = left < width<T> ? load_first(row[r] + j, left) : load(row[r] + j);
        term[r] = fused(scores, broadcast(matrix.inverse_eps), f[r]);
        top = larger(term[r], top);
      }
      Vec<T> sum = load(sums + j) * exponential<T>(before - top);
      for (int64_t r = 0; r < count; ++r) sum += exponential<T>(term[r] - top);
      store(tops + j, top);
      store(sums + j, sum);
    }
  }
}

template <class T>
OBJSLOT_INLINE void log_columns(const Matrix<T>& matrix, const LogState<T>& state) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < matrix.columns; j += width<T>) {
    Vec<T> top = load(state.tops + j);
    for (int64_t c = 1; c < matrix.chunks(); ++c) top = larger(load(state.tops + c * matrix.columns + j), top);
    Vec<T> sum{};
    for (int64_t c = 0; c < matrix.chunks(); ++c)
      sum +=
          load(state.sums + c * matrix.columns + j) * exponential<T>(load(state.tops + c * matrix.columns + j) - top);
    const int64_t left = matrix.m - j;
    Vec<T> mass = broadcast(matrix.b0);
    if (matrix.b) mass = left < width<T> ? load_first(matrix.b + j, left) : load(matrix.b + j);
    Vec<T> value = (logarithm<T>(mass) - logarithm<T>(sum)) - top;
    // No mass, or no row to take it from; a NaN stays.
    value = mass == T(0) ? broadcast(-infinity) : value;
    value = sum == T(0) ? broadcast(-infinity) : value;
    store(state.g + j, value);
  }
  fill(state.g + matrix.m, matrix.columns - matrix.m, -infinity);
}

template <class T>
OBJSLOT_INLINE void log_iteration(const Matrix<T>& matrix, const LogState<T>& state, const Team& team) {
  for_chunks(matrix, team, [&](int64_t chunk) { log_rows_chunk(matrix, state, chunk, team.worker); });
  alone(team, [&] { log_columns(matrix, state); });
}

// One row of the plan, e^(row * scale + f + g), into padded memory. Scores and f nearly cancel, so they meet
// first.
template <class T>
OBJSLOT_INLINE void plan_row(const T* row, T scale, T f, const T* g, int64_t m, T* out) {
  const Vec<T> scales = broadcast(scale), offset = broadcast(f);
  for (int64_t j = 0; j < m; j += width<T>)
    store(out + j, exponential<T>(fused(load_upto(row + j, m - j), scales, offset) + load(g + j)));
}

}  // namespace objslot::OBJSLOT_ISA
