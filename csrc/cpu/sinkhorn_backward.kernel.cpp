// The exact gradient of the truncated iteration, without exponentials of matrices.
//
// Iterations t = L .. 1 are undone in turn, with r, s, s' the scalings relative to the last ones (r = x_t /
// x_L, s = y_t / y_L, s' = y_{t-1} / y_L) and the gradients of the logarithms of the scalings:
//
//     q = grad_g / b * s        grad_f -= r * (plan q)
//     p = grad_f / a * r        grad_g  = -s' * (plan' p)
//     grad_scores = plan / eps * (grad_plan - sum over t of (r q' + p s''))
//
// so every iteration is one sweep over the plan and a correction of rank two.
#include "sinkhorn_undo.h"

namespace objslot::OBJSLOT_ISA {

// What iteration t needs before its sweep: 1 / a, and q and s' of the columns.
template <class T>
static void prepare(const Gradients<T>& g, Work<T>& w, int64_t t) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t n = matrix.n, m = matrix.m, columns = matrix.columns;
  T* q = w.right + 2 * t * columns;
  T* earlier = q + columns;
  const T *now = g.y(t), *last = g.y(g.count - 1), *before = t ? g.y(t - 1) : w.first;
  for (int64_t j = 0; j < m; j += width<T>) {
    const int64_t left = m - j;
    const Vec<T> end = load_upto(last + j, left);
    const Vec<T> mass = matrix.b ? load_upto(matrix.b + j, left) : broadcast(matrix.b0);
    const Vec<T> start = load_upto(before + j, left);
    const Bits<T> masked = end == T(0);
    // The lanes beyond the end are masked too.
    const Vec<T> share = none_where<T>(masked, load(w.grad_g + j) / mass);
    store(w.grad_b + j, load(w.grad_b + j) + share);
    store(q + j, none_where<T>(masked, share * (load_upto(now + j, left) / end)));
    store(earlier + j, none_where<T>(masked, start / end));
  }
  const T *x_now = g.x(t), *x_last = g.x(g.count - 1);
  const int64_t rank = 2 * g.count;
  for (int64_t i = 0; i < n; i += width<T>) {
    const int64_t left = n - i < width<T> ? n - i : width<T>;
    const Vec<T> end = load_upto(x_last + i, left);
    const Vec<T> mass = matrix.a ? load_upto(matrix.a + i, left) : broadcast(matrix.a0);
    T moved[width<T>], inverse[width<T>];
    store(moved, none_where<T>(end == T(0), load_upto(x_now + i, left) / end));
    store(inverse, none_where<T>(end == T(0), T(1) / mass));
    for (int64_t lane = 0; lane < left; ++lane) {
      w.left[(i + lane) * rank + 2 * t] = moved[lane];
      w.inverse[i + lane] = inverse[lane];
    }
  }
}

// Rows of iteration t: from the products with q to p.
template <class T>
OBJSLOT_INLINE void undo_rows(const Gradients<T>& g, Work<T>& w, int64_t t, int64_t i, int64_t rows, const T* products,
                              T* factors) {
  const int64_t rank = 2 * g.count;
  for (int64_t r = 0; r < rows; ++r) {
    T* left = w.left + (i + r) * rank + 2 * t;
    const T gradient = (t == g.count - 1 ? w.grad_f[i + r] : T(0)) - left[0] * products[r];
    const T share = gradient * w.inverse[i + r];
    w.grad_a[i + r] += share;
    w.inverse[i + r] = share;
    factors[r] = left[1] = share * left[0];
  }
}

template <class T>
OBJSLOT_INLINE void multiply_weights(const Rows<T>& plan, int64_t i, int64_t rows, const T* weights, int64_t m,
                                     T* products) {
  if (rows == sweep_rows)
    dot_rows<T, sweep_rows>(plan.at(i), plan.stride, weights, m, products);
  else if (rows == block)
    dot_rows<T, block>(plan.at(i), plan.stride, weights, m, products);
  else
    for (int64_t r = 0; r < rows; ++r) dot_rows<T, 1>(plan.at(i + r), plan.stride, weights, m, products + r);
}

// R rows by C vectors of plan / eps * (gradient - left right).
template <class T, int R, int C, bool Streamed>
OBJSLOT_INLINE void correct_tile(const T* const* plan, const T* const* gradient, const T* left, const T* right,
                                 int64_t rank, int64_t columns, int64_t j, Vec<T> inverse_eps, T* const* out) {
  Vec<T> value[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[r][c] = -load(gradient[r] + j + c * width<T>);
  for (int64_t k = 0; k < rank; ++k) {
    Vec<T> factor[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) factor[c] = load(right + k * columns + j + c * width<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(left[r * rank + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[r][c] = fused(weight, factor[c], value[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vec<T> result = -inverse_eps * load(plan[r] + j + c * width<T>) * value[r][c];
      if (Streamed)
        stream(out[r] + j + c * width<T>, result);
      else
        store(out[r] + j + c * width<T>, result);
    }
}

template <class T, int R, bool Streamed>
OBJSLOT_INLINE void correct_rows(const T* const* plan, const T* const* gradient, const T* left, const T* right,
                                 int64_t rank, const Matrix<T>& matrix, Vec<T> inverse_eps, T* const* out) {
  constexpr int C = OBJSLOT_VECTOR_BYTES == 64 ? 4 : 2;
  const int64_t m = matrix.m, columns = matrix.columns;
  int64_t j = 0;
  for (; j + C * width<T> <= m; j += C * width<T>)
    correct_tile<T, R, C, Streamed>(plan, gradient, left, right, rank, columns, j, inverse_eps, out);
  for (; j + width<T> <= m; j += width<T>)
    correct_tile<T, R, 1, Streamed>(plan, gradient, left, right, rank, columns, j, inverse_eps, out);
  if (j == m) return;
  Vec<T> value[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) value[r] = -load_first(gradient[r] + j, m - j);
  for (int64_t k = 0; k < rank; ++k) {
    const Vec<T> factor = load(right + k * columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) value[r] = fused(broadcast(left[r * rank + k]), factor, value[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store_first(out[r] + j, -inverse_eps * load_first(plan[r] + j, m - j) * value[r], m - j);
}

// A masked column has no plan, but its scores counted when the rows were first set, with the first y.
template <class T>
OBJSLOT_INLINE void fill_holes(const T* row, const Matrix<T>& matrix, T offset, T factor, const T* first,
                               const T* holes, T* out) {
  for (int64_t j = 0; j < matrix.m; j += width<T>) {
    const Vec<T> scores = load_upto(row + j, matrix.m - j);
    const Vec<T> value = factor * matrix.inverse_eps * load(first + j) *
                         exp2<T>(fused(scores, broadcast(matrix.scale), broadcast(offset)));
    store(out + j, load(holes + j) == T(0) ? load(out + j) : value);
  }
}

// The last sweep: iteration 0 and the gradient of the scores.
template <class T>
static void finish(const Gradients<T>& g, Work<T>& w, const Rows<T>& plan, const Rows<T>& gradient, bool backwards,
                   const Team& team) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t m = matrix.m, columns = matrix.columns, rank = 2 * g.count;
  const bool streamed = goes_past_caches<T>(g.p, true);
  bool holes = false;
  for (int64_t j = 0; j < m; ++j) holes |= w.holes[j] != T(0);
  const bool aligned = m == columns && reinterpret_cast<uintptr_t>(g.out.grad_scores) % OBJSLOT_VECTOR_BYTES == 0;
  const bool direct = !g.half() && !holes && (aligned || !streamed);
  const Vec<T> inverse_eps = broadcast(matrix.inverse_eps);
  for_chunks(matrix, team, backwards, [&](int64_t chunk) {
    const int64_t end = end_of_chunk(matrix, chunk);
    T* buffer = w.rows + team.worker * (block + 1) * columns;
    for (int64_t i = chunk * chunk_rows; i < end; i += block) {
      const int64_t rows = end - i < block ? end - i : block;
      T products[block], factors[block];
      multiply_weights(plan, i, rows, w.right, m, products);
      undo_rows(g, w, 0, i, rows, products, factors);
      const T *plan_rows[block], *gradient_rows[block];
      T* out[block];
      for (int64_t r = 0; r < rows; ++r) {
        plan_rows[r] = plan.at(i + r);
        gradient_rows[r] = gradient.at(i + r);
        out[r] = direct ? static_cast<T*>(g.out.grad_scores) + (g.index * matrix.n + i + r) * m : buffer + r * columns;
      }
      const T* left = w.left + i * rank;
      if (rows == block && direct && streamed)
        correct_rows<T, block, true>(plan_rows, gradient_rows, left, w.right, rank, matrix, inverse_eps, out);
      else if (rows == block)
        correct_rows<T, block, false>(plan_rows, gradient_rows, left, w.right, rank, matrix, inverse_eps, out);
      else
        for (int64_t r = 0; r < rows; ++r)
          correct_rows<T, 1, false>(plan_rows + r, gradient_rows + r, left + r * rank, w.right, rank, matrix,
                                    inverse_eps, out + r);
      g.advance();
      for (int64_t r = 0; r < rows && !direct; ++r) {
        const int64_t offset = (g.index * matrix.n + i + r) * m;
        if (holes)
          fill_holes(matrix.row(i + r, buffer + block * columns), matrix, g.offset()[i + r],
                     -w.inverse[i + r] * g.x(0)[i + r], w.first, w.holes, out[r]);
        if constexpr (sizeof(T) == 4)
          if (g.half()) {
            write_half_row(out[r], g.out.grad_scores, matrix.element, offset, m);
            continue;
          }
        copy_row(static_cast<T*>(g.out.grad_scores) + offset, out[r], m, streamed);
      }
    }
    if (streamed) end_of_stream();
  });
}

template <class T>
static bool undo_by_plan(const Gradients<T>& g, Work<T>& w, const Rows<T>& plan, const Rows<T>& gradient,
                         const Team& team) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t m = matrix.m, columns = matrix.columns;
  if (g.logarithms) return false;
  const T moved = furthest_move(g, w.first);
  if (!(moved <= most_moved<T>)) return false;
  alone(team, [&] { start(g, w); });
  multiply(g, w, plan, gradient, team);
  bool gaps = false;
  for (int64_t c = 0; c < matrix.chunks(); ++c) gaps |= w.gaps[c];
  if (gaps && moved > most_moved_with_gaps<T>) return false;
  alone(team, [&] { prepare(g, w, g.count - 1); });
  bool backwards = false;
  for (int64_t t = g.count - 1; t > 0; --t) {
    const T* q = w.right + 2 * t * columns;
    backwards = !backwards;
    for_chunks(matrix, team, backwards, [&](int64_t chunk) {
      T* sums = w.sums + chunk * columns;
      fill(sums, columns, T(0));
      const int64_t end = end_of_chunk(matrix, chunk);
      for (int64_t i = chunk * chunk_rows; i < end; i += sweep_rows) {
        const int64_t rows = end - i < sweep_rows ? end - i : sweep_rows;
        T products[sweep_rows], factors[sweep_rows];
        multiply_weights(plan, i, rows, q, m, products);
        undo_rows(g, w, t, i, rows, products, factors);
        if (rows == sweep_rows)
          add_rows<T, sweep_rows>(plan.at(i), plan.stride, factors, m, sums);
        else
          for (int64_t r = 0; r < rows; ++r) add_rows<T, 1>(plan.at(i + r), plan.stride, factors + r, m, sums);
        g.advance();
      }
    });
    alone(team, [&] {
      add_columns(matrix, w.sums, w.grad_g);
      for (int64_t j = 0; j < columns; j += width<T>) store(w.grad_g + j, -load(w.grad_g + j) * load(q + columns + j));
      prepare(g, w, t - 1);
    });
  }
  finish(g, w, plan, gradient, !backwards, team);
  return true;
}

template <class T>
static void undo(const SinkhornProblem& p, const SinkhornGradient& out, int64_t index, bool more, Arena arena,
                 int threads, const Team& team) {
  const Matrix<T> matrix = element_of<T>(p, index);
  Work<T> w = lay_out(arena, matrix, p.n_iters, threads);
  const int64_t count = out.history.count[index];
  Prefetch ahead[2];
  const int64_t size = sizeof(T), bytes = p.n * p.m * size;
  const bool half = size == 4 && p.element != Element::float32;
  if (more && !half && bytes <= prefetch_bytes && out.plan && out.grad_plan && out.grad_row_stride == p.m) {
    const int64_t blocks = (p.n + sweep_rows - 1) / sweep_rows;
    ahead[0] = Prefetch::of(static_cast<const char*>(out.plan) + (index + 1) * bytes, bytes, count, blocks);
    ahead[1] = Prefetch::of(static_cast<const char*>(out.grad_plan) + (index + 1) * out.grad_batch_stride * size, bytes,
                            count, blocks);
  }
  const Gradients<T> g{matrix, p, out, index, count < 0 ? -count : count, count < 0, ahead};
  alone(team, [&] {
    if (g.logarithms && matrix.start)
      __builtin_memcpy(w.first, matrix.start, p.m * sizeof(T));
    else if (g.logarithms)
      fill(w.first, p.m, T(0));
    else
      first_scaling(matrix, w.first);
  });
  Rows<T> plan{w.plan, matrix.columns}, gradient{w.gradient, matrix.columns};
  if (out.plan && !g.half()) plan = {static_cast<const T*>(out.plan) + index * p.n * p.m, p.m};
  if (!out.grad_plan)
    gradient = {w.zeros, 0};
  else if (!g.half())
    gradient = {static_cast<const T*>(out.grad_plan) + index * out.grad_batch_stride, out.grad_row_stride};
  if (!undo_by_plan(g, w, plan, gradient, team)) undo_by_scores(g, w, gradient, team);
  if (team.worker != 0) return;
  if (out.grad_a) __builtin_memcpy(static_cast<T*>(out.grad_a) + index * p.n, w.grad_a, p.n * sizeof(T));
  if (out.grad_b) __builtin_memcpy(static_cast<T*>(out.grad_b) + index * p.m, w.grad_b, p.m * sizeof(T));
}

template <class T>
static int64_t workspace_of(const SinkhornProblem& p, int threads) {
  Arena arena{nullptr};
  lay_out(arena, element_of<T>(p, 0), p.n_iters, p.batch < threads ? threads : 1);
  return p.batch < threads ? arena.used : arena.used * threads;
}

template <class T>
static void solve(const SinkhornProblem& p, const SinkhornGradient& out, void* workspace, int threads) {
  char* base = static_cast<char*>(workspace);
  if (p.batch < threads) {
    run_team(threads, [&](const Team& team) {
      const FlushSubnormals flush;
      for (int64_t index = 0; index < p.batch; ++index) {
        undo<T>(p, out, index, false, Arena{base}, threads, team);
        team.wait();
      }
    });
    return;
  }
  const int64_t share = workspace_of<T>(p, 1);
  parallel_for(p.batch, threads, [&](int64_t begin, int64_t end, int worker) {
    const FlushSubnormals flush;
    for (int64_t index = begin; index < end; ++index)
      undo<T>(p, out, index, index + 1 < end, Arena{base + worker * share}, 1, Team{});
  });
}

static int64_t backward_workspace(const SinkhornProblem& p, int threads) {
  threads = useful_threads(p, threads);
  return p.element == Element::float64 ? workspace_of<double>(p, threads) : workspace_of<float>(p, threads);
}

static void backward(const SinkhornProblem& p, const SinkhornGradient& out, void* workspace, int threads) {
  threads = useful_threads(p, threads);
  p.element == Element::float64 ? solve<double>(p, out, workspace, threads) : solve<float>(p, out, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SinkhornBackwardKernels, backward_workspace, backward)
