// The stages of one element after its scores: rows of the plan, and the way forward.
#pragma once

#include "transport_scores.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
static SinkhornHistory history_of(Stage<T>& s) {
  return {s.history_f, s.history_g, &s.count};
}

// Rows of the plan from the scalings, or their logarithms, that the iteration ended with.
template <class T>
struct Plan {
  T scale, inverse_eps;
  bool logarithms;
  const T *offset, *x, *y;

  static OBJSLOT_INLINE_MEMBER Plan of(const TransportProblem& p, const Stage<T>& s) {
    const int64_t count = s.count < 0 ? -s.count : s.count;
    return {T(1.44269504088896340736 / p.eps), T(1 / p.eps), s.count < 0, s.history_f, s.history_f + count * p.n,
            s.history_g + (count - 1) * p.m};
  }

  // Row i of `row` scores into padded memory.
  OBJSLOT_INLINE_MEMBER void make(const T* row, int64_t i, int64_t m, T* out) const {
    const Vec<T> factor = broadcast(x[i]), scales = broadcast(logarithms ? inverse_eps : scale);
    const Vec<T> shift = broadcast(logarithms ? x[i] : offset[i]);
    for (int64_t j = 0; j < m; j += width<T>) {
      const int64_t left = m - j;
      const Vec<T> scores = load_upto(row + j, left), other = load_upto(y + j, left);
      Vec<T> value;
      if (logarithms)
        value = exponential<T>(fused(scores, scales, shift) + other);
      else
        value = factor * (exp2<T>(fused(scores, scales, shift)) * other);
      if (left < width<T>) value = keep_first<T>(value, left);
      store(out + j, value);
    }
  }
};

// Row i of values or gradients padded, in the arithmetic type.
template <class T>
OBJSLOT_INLINE void read_channel_row(const TransportProblem& p, const void* base, int64_t i, T* out, T* buffer) {
  const T* row = read_row<T>(base, p.value_element, i * p.channels, p.channels, buffer);
  for (int64_t c = 0; c < padded<T>(p.channels); ++c) out[c] = c < p.channels ? row[c] : T(0);
}

// Values (m, channels) in panels.
template <class T>
static void read_values(const TransportProblem& p, const Stage<T>& s, const void* base, const Team& team) {
  T* buffer = s.rows + team.worker * s.rows_size;
  T* row = buffer + padded<T>(p.channels);
  for (int64_t j = team.begin(p.m); j < team.end(p.m); ++j) {
    read_channel_row(p, base, j, row, buffer);
    lay_panel_row(row, j, p.m, p.channels, s.values);
  }
}

template <class T>
static void apply(const TransportProblem& p, const Stage<T>& s, void* out, const Team& team) {
  const int64_t columns = padded<T>(p.m), lanes = padded<T>(p.channels);
  T* rows = s.rows + team.worker * s.rows_size;
  T* moved = rows + plan_rows * columns;
  const Plan<T> plan = Plan<T>::of(p, s);
  for_groups(p.n, plan_rows, team, [&](int64_t first, int64_t count) {
    {
      const FlushSubnormals flush;
      for (int64_t r = 0; r < count; ++r)
        plan.make(s.scores + (first + r) * s.stride, first + r, p.m, rows + r * columns);
    }
    multiply<T>({rows, columns, 1}, count, s.values, p.m, moved, lanes, lanes, nullptr);
    for (int64_t r = 0; r < count; ++r)
      write_element_row(p.value_element, out, first + r, p.channels, moved + r * lanes);
  });
}

// One element; run(stage) calls stage(team) on the threads that work on it.
template <class T, class Run>
static void move(const TransportProblem& p, const TransportResult& result, const SinkhornTables& sinkhorn,
                 int64_t index, Stage<T> s, bool tiles, int threads, const Run& run) {
  const int64_t size = size_of(p.value_element);
  point_at(p, index, s);
  make_scores(p, s, tiles, false, run);
  const SinkhornResult found{nullptr, nullptr, nullptr, result.error ? static_cast<T*>(result.error) + index : nullptr,
                             history_of(s)};
  sinkhorn.forward.forward(scores_problem<T>(p, index, s.scores, s.stride), found, s.sinkhorn, threads);
  if (p.channels == 0) return;
  run([&](const Team& team) {
    read_values(p, s, static_cast<const char*>(p.values) + index * p.values_stride * size, team);
    team.wait();
    apply(p, s, static_cast<char*>(result.out) + index * p.n * p.channels * size, team);
  });
}

}  // namespace objslot::OBJSLOT_ISA
