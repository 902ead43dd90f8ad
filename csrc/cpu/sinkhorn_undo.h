// What the two ways back through Sinkhorn's iteration share.
#pragma once

#include "sinkhorn_log.h"

namespace objslot::OBJSLOT_ISA {

// Powers of two that the potentials may have moved by.
template <class T>
constexpr T most_moved = sizeof(T) == 4 ? T(60) : T(800);
// The share of a row or column that entries rounded to zero may have, as a power of two: the square of the rounding.
template <class T>
constexpr T most_lost = sizeof(T) == 4 ? T(-48) : T(-106);

template <class T>
struct Gradients {
  const Matrix<T>& matrix;
  const SinkhornProblem& p;
  const SinkhornGradient& out;
  int64_t index, count;
  bool logarithms;  // the history holds potentials, not scalings
  Prefetch* ahead;  // the plan and the gradient of the next matrix

  OBJSLOT_INLINE_MEMBER const T* slot(int64_t s) const {
    return static_cast<const T*>(out.history.f) + (s * p.batch + index) * p.n;
  }
  OBJSLOT_INLINE_MEMBER const T* offset() const { return slot(0); }
  OBJSLOT_INLINE_MEMBER const T* x(int64_t t) const { return slot(t + 1); }
  OBJSLOT_INLINE_MEMBER const T* y(int64_t t) const {
    return static_cast<const T*>(out.history.g) + (t * p.batch + index) * p.m;
  }
  OBJSLOT_INLINE_MEMBER void advance() const {
    ahead[0].advance();
    ahead[1].advance();
  }
  OBJSLOT_INLINE_MEMBER bool half() const { return sizeof(T) == 4 && matrix.element != Element::float32; }
};

template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  OBJSLOT_INLINE_MEMBER const T* at(int64_t i) const { return base + i * stride; }
};

template <class T>
struct Work {
  T* plan;              // (n, columns) where it is made anew; the log-domain path collects the gradient here
  T* gradient;          // (n, columns) where grad_plan has a half type
  T* zeros;             // (columns) in place of a missing grad_plan
  T* grad_f;            // (n)
  T* grad_g;            // (columns)
  T* grad_a;            // (n)
  T* grad_b;            // (columns)
  T* share;             // (n): grad_f / a of the iteration, 0 where the row is masked
  T* left;              // (groups, 2 count, sweep_rows): r, p of every iteration
  T* right;             // (2 count, columns): q, s' of every iteration
  T* holes;             // (columns): 1 where the plan is zero because the column is masked
  T* sums;              // (chunks, columns)
  T* scaled_g;          // (columns)
  T* earlier_g;         // (columns)
  T* first;             // (columns): the y that the iteration started from, or its logarithm
  T* rows;              // (threads, sweep_rows + 1, columns)
  unsigned char* gaps;  // (chunks)
};

template <class T>
static Work<T> lay_out(Arena& arena, const Matrix<T>& matrix, int64_t iterations, int threads) {
  const int64_t n = matrix.n, columns = matrix.columns, chunks = matrix.chunks();
  const int64_t whole = (n + sweep_rows - 1) / sweep_rows * sweep_rows;
  Work<T> w;
  w.plan = arena.take<T>(n * columns);
  w.gradient = arena.take<T>(n * columns);
  w.zeros = arena.take<T>(columns);
  w.grad_f = arena.take<T>(n);
  w.grad_g = arena.take<T>(columns);
  w.grad_a = arena.take<T>(whole);
  w.grad_b = arena.take<T>(columns);
  w.share = arena.take<T>(whole);
  w.left = arena.take<T>(whole * 2 * iterations);
  w.right = arena.take<T>(2 * iterations * columns);
  w.holes = arena.take<T>(columns);
  w.sums = arena.take<T>(chunks * columns);
  w.scaled_g = arena.take<T>(columns);
  w.earlier_g = arena.take<T>(columns);
  w.first = arena.take<T>(columns);
  w.rows = arena.take<T>(threads * (sweep_rows + 1) * columns);
  w.gaps = arena.take<unsigned char>(chunks);
  return w;
}

template <class T>
OBJSLOT_INLINE Vec<T> none_where(Bits<T> condition, Vec<T> value) {
  return condition ? Vec<T>{} : value;
}

template <class T>
constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

// The largest ratio of a scaling to its last value, as a power of two; NaN or infinity when unusable.
template <class T>
static T furthest_move(const Gradients<T>& g, const T* first) {
  const auto scan = [](const T* now, const T* last, int64_t size, T most) {
    Vec<T> top = broadcast(most), sum{};
    for (int64_t j = 0; j < size; j += width<T>) {
      const Vec<T> end = load_upto(last + j, size - j);
      const Vec<T> moved = none_where<T>(end == T(0), load_upto(now + j, size - j) / end);
      top = larger(moved, top);
      sum += moved;
    }
    // The maximum passes over NaN, the sum does not; an infinite sum is unusable too.
    const T total = sum_lanes<T>(sum);
    return total - total == T(0) ? largest_lane<T>(top) : total - total;
  };
  const int64_t last = g.count - 1;
  T most_x = 1, most_y = scan(first, g.y(last), g.p.m, T(1));
  for (int64_t t = 0; t < last; ++t) {
    most_x = scan(g.x(t), g.x(last), g.p.n, most_x);
    most_y = scan(g.y(t), g.y(last), g.p.m, most_y);
  }
  return log2<T>(broadcast(most_x))[0] + log2<T>(broadcast(most_y))[0];
}

// What entries of the plan that were rounded to zero can be of a row or column of the plan of an earlier iteration at
// most, as a power of two. Such an entry was less than the smallest number times the scalings of its row and column,
// and the potentials have moved by `moved` since.
template <class T>
static T largest_loss(const Gradients<T>& g, T moved) {
  const int64_t n = g.p.n, m = g.p.m, last = g.count - 1;
  const auto largest_of = [](const T* values, int64_t size) {
    T top = 0;
    for (int64_t j = 0; j < size; ++j) top = values[j] > top ? values[j] : top;
    return top;
  };
  const auto least_of = [](const T* masses, T each, int64_t size) {
    if (!masses) return each;
    T least = std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < size; ++j) least = masses[j] > 0 && masses[j] < least ? masses[j] : least;
    return least;
  };
  const auto power = [](T value) { return log2<T>(broadcast(value))[0]; };
  const T x = power(largest_of(g.x(last), n)), xy = x + power(largest_of(g.y(last), m));
  const T scaling = x > xy ? x : xy;
  const T a = least_of(g.matrix.a, g.matrix.a0, n), b = least_of(g.matrix.b, g.matrix.b0, m);
  const T entries = power(static_cast<T>(n > m ? n : m)), smallest = power(std::numeric_limits<T>::min());
  return entries + smallest + (scaling > 0 ? scaling : T(0)) + moved - power(a < b ? a : b);
}

// Starts every gradient from those of the potentials and finds the masked columns.
template <class T>
static void start(const Gradients<T>& g, Work<T>& w) {
  const int64_t n = g.matrix.n, m = g.matrix.m, columns = g.matrix.columns;
  const T* grad_f = static_cast<const T*>(g.out.grad_f);
  const T* grad_g = static_cast<const T*>(g.out.grad_g);
  fill(w.zeros, columns, T(0));
  fill(w.grad_a, (n + sweep_rows - 1) / sweep_rows * sweep_rows, T(0));
  fill(w.grad_b, columns, T(0));
  fill(w.grad_g, columns, T(0));
  fill(w.holes, columns, T(1));
  for (int64_t i = 0; i < n; ++i) w.grad_f[i] = grad_f ? grad_f[g.index * n + i] : T(0);
  for (int64_t j = 0; j < m; ++j) {
    w.grad_g[j] = grad_g ? grad_g[g.index * m + j] : T(0);
    w.holes[j] = !g.logarithms && g.y(g.count - 1)[j] == T(0) ? T(1) : T(0);
  }
}

template <class T>
OBJSLOT_INLINE void add_columns(const Matrix<T>& matrix, const T* sums, T* total) {
  for (int64_t j = 0; j < matrix.columns; j += width<T>) {
    Vec<T> sum = load(sums + j);
    for (int64_t c = 1; c < matrix.chunks(); ++c) sum += load(sums + c * matrix.columns + j);
    store(total + j, sum);
  }
}

// One row of the plan as the forward wrote it, into padded memory.
template <class T>
OBJSLOT_INLINE void scaled_row(const T* row, T scale, T offset, T x, const T* y, int64_t m, T* out) {
  for (int64_t j = 0; j < m; j += width<T>) {
    const int64_t left = m - j;
    const Vec<T> kernel = exp2<T>(fused(load_upto(row + j, left), broadcast(scale), broadcast(offset)));
    const Vec<T> value = x * (kernel * load(y + j));
    // Beyond the end a row of negative scores has an infinite kernel.
    store(out + j, left < width<T> ? keep_first<T>(value, left) : value);
  }
}

// grad_f and the column sums of plan * grad_plan for R rows; the smallest entry of the plan into `low`.
template <class T, int R>
OBJSLOT_INLINE void multiply_rows(const T* const* plan, const T* const* gradient, const T* holes, int64_t m, T* grad_f,
                                  T* sums, Vec<T>& low) {
  Vec<T> total[R] = {};
  const auto visit = [&](int64_t j, auto&& read) __attribute__((always_inline)) {
    Vec<T> sum = load(sums + j), least = read(plan[0] + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> entry = read(plan[r] + j), upper = read(gradient[r] + j);
      least = smaller(entry, least);
      total[r] = fused(entry, upper, total[r]);
      sum = fused(entry, upper, sum);
    }
    low = smaller(least + load(holes + j), low);
    store(sums + j, sum);
  };
  const int64_t whole = m / width<T> * width<T>;
  for (int64_t j = 0; j < whole; j += width<T>)
    visit(j, [](const T* p) __attribute__((always_inline)) { return load(p); });
  if (whole < m) visit(whole, [&](const T* p) __attribute__((always_inline)) { return load_first(p, m - whole); });
  T found[R];
  sum_lanes_of<T, R>(total, found);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) grad_f[r] += found[r];
}

template <class T>
static void multiply(const Gradients<T>& g, Work<T>& w, const Rows<T>& plan, const Rows<T>& gradient,
                     const Team& team) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t m = matrix.m, columns = matrix.columns;
  const bool made = plan.base == w.plan, converted = gradient.base == w.gradient;
  const T* last_x = g.x(g.count - 1);
  if (made)
    alone(team, [&] {
      const T* last_y = g.y(g.count - 1);
      for (int64_t j = 0; j < columns; ++j) w.scaled_g[j] = j < m ? last_y[j] : g.logarithms ? minus_infinity<T> : T(0);
    });
  const int worker = team.worker;
  for_chunks(matrix, team, [&](int64_t chunk) {
    T* sums = w.sums + chunk * columns;
    fill(sums, columns, T(0));
    Vec<T> low = broadcast(T(1));
    const int64_t end = end_of_chunk(matrix, chunk);
    for (int64_t i = chunk * chunk_rows; i < end; i += block) {
      const int64_t rows = end - i < block ? end - i : block;
      const T *plan_rows[block], *gradient_rows[block];
      bool masked = false;
      for (int64_t r = 0; r < rows; ++r) {
        if (made) {
          const T* row = matrix.row(i + r, w.rows + worker * (sweep_rows + 1) * columns);
          T* target = w.plan + (i + r) * columns;
          if (g.logarithms)
            plan_row(row, matrix.inverse_eps, last_x[i + r], w.scaled_g, m, target);
          else
            scaled_row(row, matrix.scale, g.offset()[i + r], last_x[i + r], w.scaled_g, m, target);
        }
        if (converted) {
          const int64_t offset = g.index * g.out.grad_batch_stride + (i + r) * g.out.grad_row_stride;
          read_row<T>(g.out.grad_plan, matrix.element, offset, m, w.gradient + (i + r) * columns);
        }
        plan_rows[r] = plan.at(i + r);
        gradient_rows[r] = gradient.at(i + r);
        masked |= last_x[i + r] == T(0);
      }
      Vec<T> seen = low;
      if (rows == block)
        multiply_rows<T, block>(plan_rows, gradient_rows, w.holes, m, w.grad_f + i, sums, seen);
      else
        for (int64_t r = 0; r < rows; ++r)
          multiply_rows<T, 1>(plan_rows + r, gradient_rows + r, w.holes, m, w.grad_f + i + r, sums, seen);
      // A block with a masked row tells nothing about gaps; its other rows are checked one by one.
      if (!masked) {
        low = seen;
      } else {
        for (int64_t r = 0; r < rows; ++r)
          if (last_x[i + r] != T(0))
            for (int64_t j = 0; j < m; j += width<T>)
              low = smaller(load_upto(plan_rows[r] + j, m - j) + load(w.holes + j), low);
      }
    }
    w.gaps[chunk] = -largest_lane<T>(-low) < std::numeric_limits<T>::min();
  });
  alone(team, [&] {
    T* total = w.scaled_g;
    add_columns(matrix, w.sums, total);
    for (int64_t j = 0; j < m; ++j) w.grad_g[j] += total[j];
  });
}

}  // namespace objslot::OBJSLOT_ISA
