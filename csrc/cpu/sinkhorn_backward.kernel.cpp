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
#include "sinkhorn_correction.h"
#include "sinkhorn_undo_scores.h"

namespace objslot::OBJSLOT_ISA {

// What iteration t needs before its sweep: q and s' of the columns.
template <class T>
static void prepare(const Gradients<T>& g, Work<T>& w, int64_t t) {
  const Matrix<T>& matrix = g.matrix;
  const int64_t m = matrix.m, columns = matrix.columns;
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
}

// `rows` rows of iteration t, from the first of a group on: from the products of a whole group with q to r and p. The
// address of p.
template <class T>
OBJSLOT_INLINE const T* undo_rows(const Gradients<T>& g, Work<T>& w, int64_t t, int64_t i, int64_t rows,
                                  const T* products) {
  const Matrix<T>& matrix = g.matrix;
  const T *x_now = g.x(t) + i, *x_last = g.x(g.count - 1) + i;
  T* moves = w.left + i * 2 * g.count + 2 * t * sweep_rows;
  T* factors = moves + sweep_rows;
  for (int64_t r = 0; r < rows; r += width<T>) {
    const int64_t left = rows - r;
    // The lanes beyond the end are masked too.
    const Vec<T> end = load_upto(x_last + r, left);
    const Bits<T> masked = end == T(0);
    const Vec<T> mass = matrix.a ? load_upto(matrix.a + i + r, left) : broadcast(matrix.a0);
    const Vec<T> moved = none_where<T>(masked, load_upto(x_now + r, left) / end);
    const Vec<T> start = t == g.count - 1 ? load_upto(w.grad_f + i + r, left) : Vec<T>{};
    const Vec<T> share = (start - moved * load(products + r)) * none_where<T>(masked, T(1) / mass);
    store(w.grad_a + i + r, load(w.grad_a + i + r) + share);
    store(w.share + i + r, share);
    store(moves + r, moved);
    store(factors + r, share * moved);
  }
  return factors;
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
    T* buffer = w.rows + team.worker * (sweep_rows + 1) * columns;
    for (int64_t i = chunk * chunk_rows; i < end; i += sweep_rows) {
      const int64_t rows = end - i < sweep_rows ? end - i : sweep_rows;
      T products[sweep_rows] = {};
      dot_block(plan.at(i), plan.stride, rows, w.right, m, products, g);
      undo_rows(g, w, 0, i, rows, products);
      const T *plan_rows[sweep_rows], *gradient_rows[sweep_rows];
      T* out[sweep_rows];
      for (int64_t r = 0; r < rows; ++r) {
        plan_rows[r] = plan.at(i + r);
        gradient_rows[r] = gradient.at(i + r);
        out[r] = direct ? static_cast<T*>(g.out.grad_scores) + (g.index * matrix.n + i + r) * m : buffer + r * columns;
      }
      const T* left = w.left + i * rank;
      const int64_t ahead = direct ? sweep_rows * m : 0;
      if (direct && streamed)
        correct_rows<T, true>(plan_rows, gradient_rows, rows, left, w.right, rank, matrix, inverse_eps, out, g, ahead);
      else
        correct_rows<T, false>(plan_rows, gradient_rows, rows, left, w.right, rank, matrix, inverse_eps, out, g, ahead);
      for (int64_t r = 0; r < rows && !direct; ++r) {
        const int64_t offset = (g.index * matrix.n + i + r) * m;
        if (holes)
          fill_holes(matrix.row(i + r, buffer + sweep_rows * columns), matrix, g.offset()[i + r],
                     -w.share[i + r] * g.x(0)[i + r], w.first, w.holes, out[r]);
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
  if (gaps && !(largest_loss(g, moved) <= most_lost<T>)) return false;
  alone(team, [&] { prepare(g, w, g.count - 1); });
  const Balance<T> balance = Balance<T>::of(g);
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
        T products[sweep_rows] = {};
        dot_block(plan.at(i), plan.stride, rows, q, m, products, g);
        const T* factors = undo_rows(g, w, t, i, rows, products);
        add_block(plan.at(i), plan.stride, rows, factors, m, sums, g);
      }
    });
    alone(team, [&] {
      const T shift = balance.shift_rows(g, w);
      balance.shift_factors(g, w, t, shift);
      add_columns(matrix, w.sums, w.grad_g);
      for (int64_t j = 0; j < columns; j += width<T>) store(w.grad_g + j, -load(w.grad_g + j) * load(q + columns + j));
      balance.shift_columns(g, w, t, shift);
      prepare(g, w, t - 1);
    });
  }
  finish(g, w, plan, gradient, !backwards, team);
  alone(team, [&] { balance.shift_rows(g, w); });
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
    const int64_t vectors = sweeps_ahead(count) * vectors_of_sweep<T>(p);
    ahead[0] = Prefetch::of(static_cast<const char*>(out.plan) + (index + 1) * bytes, bytes, vectors);
    ahead[1] = Prefetch::of(static_cast<const char*>(out.grad_plan) + (index + 1) * out.grad_batch_stride * size, bytes,
                            vectors);
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
