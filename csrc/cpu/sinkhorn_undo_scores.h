// The way back through Sinkhorn's iteration from the scores, with exponentials in every iteration: for potentials that
// moved far, and where only their logarithms are known.
#pragma once

#include "sinkhorn_balance.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
static void undo_by_scores(const Gradients<T>& g, Work<T>& w, const Rows<T>& gradient, const Team& team) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t m = matrix.m, columns = matrix.columns;
  alone(team, [&] { start(g, w); });
  multiply(g, w, Rows<T>{w.plan, columns}, gradient, team);
  // From here on w.plan collects eps * grad_scores, and w.sums starts with the column sums of the plan.
  for_chunks(matrix, team, [&](int64_t chunk) {
    T* sums = w.sums + chunk * columns;
    fill(sums, columns, T(0));
    for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i)
      for (int64_t j = 0; j < m; j += width<T>) {
        T* entry = w.plan + i * columns + j;
        const Vec<T> plan = load(entry);
        store(sums + j, load(sums + j) + plan);
        store(entry, plan * load_upto(gradient.at(i) + j, m - j));
      }
  });
  // Where nothing is: the value of a masked scaling, or of its logarithm.
  const T nothing = g.logarithms ? minus_infinity<T> : T(0);
  const Balance<T> balance = Balance<T>::of(g);
  const auto columns_of = [&](int64_t t, T* target) {
    fill(target, columns, nothing);
    if (t < 0)
      __builtin_memcpy(target, w.first, m * sizeof(T));
    else
      __builtin_memcpy(target, g.y(t), m * sizeof(T));
  };
  const auto make_row = [&](const T* row, int64_t t, int64_t i, const T* weights, T* out) {
    if (g.logarithms)
      plan_row(row, matrix.inverse_eps, g.x(t)[i], weights, m, out);
    else
      scaled_row(row, matrix.scale, g.offset()[i], g.x(t)[i], weights, m, out);
  };
  for (int64_t t = g.count - 1; t >= 0; --t) {
    T* share = w.right;
    alone(team, [&] {
      columns_of(t, w.scaled_g);
      columns_of(t - 1, w.earlier_g);
    });
    if (t < g.count - 1)
      for_chunks(matrix, team, [&](int64_t chunk) {
        T* sums = w.sums + chunk * columns;
        fill(sums, columns, T(0));
        T* buffer = w.rows + team.worker * (sweep_rows + 1) * columns;
        const T one = 1;
        for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) {
          make_row(matrix.row(i, buffer), t, i, w.scaled_g, buffer + columns);
          add_rows<T, 1>(buffer + columns, columns, &one, columns, sums);
        }
      });
    alone(team, [&] {
      add_columns(matrix, w.sums, share);
      for (int64_t j = 0; j < columns; ++j) {
        const bool masked = w.scaled_g[j] == nothing;
        w.grad_b[j] += masked ? T(0) : w.grad_g[j] / (matrix.b ? matrix.b[j] : matrix.b0);
        // Not by b: a column of weights that sum to one exactly cancels exactly, however its potential was rounded.
        share[j] = masked || share[j] == T(0) ? T(0) : w.grad_g[j] / share[j];
      }
    });
    for_chunks(matrix, team, [&](int64_t chunk) {
      T* sums = w.sums + chunk * columns;
      fill(sums, columns, T(0));
      T* buffer = w.rows + team.worker * (sweep_rows + 1) * columns;
      T* now = buffer + columns;
      T* before = now + columns;
      for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) {
        const T* row = matrix.row(i, buffer);
        make_row(row, t, i, w.scaled_g, now);
        make_row(row, t, i, w.earlier_g, before);
        T product;
        dot_rows<T, 1>(now, columns, share, columns, &product);
        Vec<T> total{};
        for (int64_t j = 0; j < m; j += width<T>) total += load_upto(before + j, m - j);
        const T start = t == g.count - 1 ? w.grad_f[i] : T(0);
        const bool masked = g.x(t)[i] == nothing;
        w.share[i] = masked ? T(0) : (start - product) / matrix.a_at(i);
        w.grad_a[i] += w.share[i];
        // Not by a: weights that sum to one exactly keep rounding from growing with the iterations.
        const T factor = masked ? T(0) : (start - product) / sum_lanes<T>(total);
        add_rows<T, 1>(before, columns, &factor, columns, sums);
        for (int64_t j = 0; j < columns; j += width<T>) {
          T* entry = w.plan + i * columns + j;
          store(entry, load(entry) - load(now + j) * load(share + j) - factor * load(before + j));
        }
      }
    });
    alone(team, [&] {
      // Logarithms are rounded by more than what the balance would put right.
      const T shift = g.logarithms ? T(0) : balance.shift_rows(g, w);
      add_columns(matrix, w.sums, w.grad_g);
      for (int64_t j = 0; j < columns; ++j) w.grad_g[j] = -w.grad_g[j];
      if (t > 0 && !g.logarithms) balance.shift_columns(g, w, t, shift);
    });
  }
  for_chunks(matrix, team, [&](int64_t chunk) {
    for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) {
      T* row = w.plan + i * columns;
      const int64_t offset = (g.index * matrix.n + i) * m;
      for (int64_t j = 0; j < columns; ++j) row[j] *= matrix.inverse_eps;
      if constexpr (sizeof(T) == 4)
        if (g.half()) {
          write_half_row(row, g.out.grad_scores, matrix.element, offset, m);
          continue;
        }
      copy_row(static_cast<T*>(g.out.grad_scores) + offset, row, m, false);
    }
  });
}

}  // namespace objslot::OBJSLOT_ISA
