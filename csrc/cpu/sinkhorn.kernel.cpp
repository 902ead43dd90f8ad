// Sinkhorn's algorithm forward: exponentiate once with the row maximum taken out, then scale.
//
// A kernel that fits a second-level cache is kept, and the plan of one matrix is written while the next one is
// exponentiated. A larger kernel is made anew in every sweep: that takes no longer than fetching it would.
#include "sinkhorn_scaling.h"

namespace objslot::OBJSLOT_ISA {

// Where the results of one matrix go.
template <class T>
struct Keeper {
  const SinkhornProblem& p;
  const SinkhornResult& result;
  int64_t index;

  OBJSLOT_INLINE_MEMBER bool history() const { return result.history.f; }
  OBJSLOT_INLINE_MEMBER void keep(int64_t count, const T* f, const T* g) const {
    if (!history()) return;
    keep_rows(count, f);
    T* target = static_cast<T*>(result.history.g) + ((count - 1) * p.batch + index) * p.m;
    __builtin_memcpy(target, g, p.m * sizeof(T));
  }
  OBJSLOT_INLINE_MEMBER void keep_rows(int64_t slot, const T* f) const {
    T* target = static_cast<T*>(result.history.f) + (slot * p.batch + index) * p.n;
    __builtin_memcpy(target, f, p.n * sizeof(T));
  }
  OBJSLOT_INLINE_MEMBER T* f() const { return static_cast<T*>(result.f) + index * p.n; }
  OBJSLOT_INLINE_MEMBER T* g() const { return static_cast<T*>(result.g) + index * p.m; }
  OBJSLOT_INLINE_MEMBER void finish(int64_t count, T error) const {
    if (result.history.count) result.history.count[index] = count;
    if (result.error) static_cast<T*>(result.error)[index] = error;
  }
};

// The whole of one matrix by scalings, but for a plan that can wait. Returns false, with nothing usable written,
// when they leave the range.
template <class T>
static bool solve_by_scaling(const Matrix<T>& matrix, State<T>& s, const Keeper<T>& keeper, Prefetch ahead,
                             Pending<T>& pending, const Team& team) {
  const SinkhornProblem& p = keeper.p;
  const SinkhornResult& result = keeper.result;
  const bool early = p.tol >= 0;
  T* rows = s.rows + team.worker * (sweep_rows + 1) * matrix.columns;
  if (matrix.start) alone(team, [&] { first_scaling(matrix, s.y); });
  for_chunks(matrix, team,
             [&](int64_t chunk) __attribute__((always_inline)) { first_chunk(matrix, s, chunk, rows, pending); });
  pending.finish();
  if (!set_columns(matrix, s, s.x, team)) return false;

  int64_t count = 1;
  T error = 0;
  const bool first = team.worker == 0;
  if (first && keeper.history()) keeper.keep_rows(0, s.offset);
  if (first) keeper.keep(1, s.x, s.y);
  bool backwards = false;
  while (count < p.n_iters || early || result.error) {
    const T limit = least_sum(largest(s.y, matrix.m), matrix.m);
    backwards = !backwards;
    for_chunks(matrix, team, backwards,
               [&](int64_t chunk) __attribute__((always_inline)) { next_chunk(matrix, s, chunk, limit, rows, ahead); });
    error = add_up(s.gaps, matrix.chunks());
    if (count == p.n_iters || (early && !(error > T(p.tol)))) break;
    // The sums belong to the next iteration already.
    T* swap = s.x;
    s.x = s.next_x;
    s.next_x = swap;
    if (!set_columns(matrix, s, s.x, team)) return false;
    ++count;
    if (first) keeper.keep(count, s.x, s.y);
  }
  if (first && result.f) {
    potentials(s.x, s.offset, matrix.n, keeper.f());
    potentials<T>(s.y, nullptr, matrix.m, keeper.g());
  }
  if (first) keeper.finish(count, error);
  if (!result.plan) return true;
  const bool streamed = goes_past_caches<T>(p, keeper.history());
  const int64_t size = p.element == Element::float64 ? 8 : p.element == Element::float32 ? 4 : 2;
  const PlanRows<T> plan{&matrix, s.kernel, s.offset,
                         s.x,     s.y,      static_cast<char*>(result.plan) + keeper.index * p.n * p.m * size,
                         streamed};
  if (s.kernel && team.size == 1) {
    pending = {plan, 0, matrix.n, rows};
    return true;
  }
  for_chunks(matrix, team, !backwards, [&](int64_t chunk) {
    for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) plan.write(i, rows);
  });
  return true;
}

// The whole of one matrix in the log domain.
template <class T>
static void solve_by_logarithms(const Matrix<T>& matrix, State<T>& s, const Keeper<T>& keeper, const Team& team) {
  const SinkhornProblem& p = keeper.p;
  const SinkhornResult& result = keeper.result;
  const bool early = p.tol >= 0;
  const int64_t chunks = matrix.chunks(), columns = matrix.columns;
  const bool first = team.worker == 0;
  alone(team, [&] {
    if (matrix.start)
      __builtin_memcpy(s.log.g, matrix.start, matrix.m * sizeof(T));
    else
      fill(s.log.g, matrix.m, T(0));
    fill(s.log.g + matrix.m, columns - matrix.m, -std::numeric_limits<T>::infinity());
  });

  const auto visit_plan = [&](auto&& use) {
    for_chunks(matrix, team, [&](int64_t chunk) {
      T* buffer = s.log.rows + team.worker * (sweep_rows + 1) * columns;
      s.gaps[chunk] = 0;
      for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) {
        plan_row(matrix.row(i, buffer), matrix.inverse_eps, s.log.f[i], s.log.g, matrix.m, buffer + columns);
        use(chunk, i, buffer + columns);
      }
    });
  };
  const auto measure = [&](int64_t chunk, int64_t i, T* row) {
    T total = 0;
    for (int64_t j = 0; j < matrix.m; ++j) total += row[j];
    const T missing = total - matrix.a_at(i);
    s.gaps[chunk] += missing < T(0) ? -missing : missing;
  };

  int64_t count = 0;
  T error = 0;
  while (count < p.n_iters) {
    log_iteration(matrix, s.log, team);
    ++count;
    alone(team, [&] { keeper.keep(count, s.log.f, s.log.g); });
    if (!early) continue;
    visit_plan(measure);
    error = add_up(s.gaps, chunks);
    if (!(error > T(p.tol))) break;
  }
  if (first && result.f) {
    __builtin_memcpy(keeper.f(), s.log.f, matrix.n * sizeof(T));
    __builtin_memcpy(keeper.g(), s.log.g, matrix.m * sizeof(T));
  }
  if (result.error && !early) {
    visit_plan(measure);
    error = add_up(s.gaps, chunks);
    team.wait();
  }
  if (first) keeper.finish(-count, error);
  if (!result.plan) return;
  visit_plan([&](int64_t, int64_t i, T* row) {
    const int64_t offset = (keeper.index * matrix.n + i) * matrix.m;
    if constexpr (sizeof(T) == 4)
      if (matrix.element != Element::float32) return write_half_row(row, result.plan, matrix.element, offset, matrix.m);
    copy_row(static_cast<T*>(result.plan) + offset, row, matrix.m, false);
  });
}

// Bytes of what the threads share, or of what each of them has.
template <class T>
static int64_t share_of_workspace(const SinkhornProblem& p, int threads) {
  Arena arena{nullptr};
  lay_out<T>(arena, p, threads, p.batch < threads ? threads : 1);
  return arena.used;
}

// A thread with several matrices begins one while it writes the one before.
static int64_t states(const SinkhornProblem& p, int threads) { return p.batch > threads ? 2 : 1; }

template <class T>
static int64_t workspace_of(const SinkhornProblem& p, int threads) {
  const int64_t count = p.batch < threads ? 1 : threads * states(p, threads);
  return count * share_of_workspace<T>(p, threads);
}

template <class T>
static Prefetch fetch_next(const SinkhornProblem& p, int64_t index) {
  Prefetch ahead;
  const int64_t size = sizeof(T);
  if (p.n * padded<T>(p.m) * size > prefetch_bytes || p.element == Element::float16 || p.element == Element::bfloat16)
    return ahead;
  return Prefetch::of(static_cast<const char*>(p.scores) + (index + 1) * p.batch_stride * size,
                      ((p.n - 1) * p.row_stride + p.m) * size, sweeps_ahead(p.n_iters - 1) * vectors_of_sweep<T>(p));
}

template <class T>
static void solve(const SinkhornProblem& p, const SinkhornResult& result, void* workspace, int threads) {
  const int64_t share = share_of_workspace<T>(p, threads);
  char* base = static_cast<char*>(workspace);
  if (p.batch < threads) {
    run_team(threads, [&](const Team& team) {
      const FlushSubnormals flush;
      for (int64_t index = 0; index < p.batch; ++index) {
        const Matrix<T> matrix = element_of<T>(p, index);
        Arena arena{base};
        State<T> s = lay_out<T>(arena, p, threads, threads);
        const Keeper<T> keeper{p, result, index};
        Pending<T> pending{};
        if (!solve_by_scaling(matrix, s, keeper, Prefetch{}, pending, team))
          solve_by_logarithms(matrix, s, keeper, team);
        pending.finish();
        end_of_stream();
        team.wait();
      }
    });
    return;
  }
  const int64_t both = states(p, threads);
  parallel_for(p.batch, threads, [&](int64_t begin, int64_t end, int worker) {
    const FlushSubnormals flush;
    Matrix<T> matrices[2];
    Pending<T> pending{};
    for (int64_t index = begin; index < end; ++index) {
      const int64_t turn = (index - begin) % both;
      Matrix<T>& matrix = matrices[turn];
      matrix = element_of<T>(p, index);
      Arena arena{base + (worker * both + turn) * share};
      State<T> s = lay_out<T>(arena, p, threads, 1);
      const Keeper<T> keeper{p, result, index};
      const Prefetch ahead = index + 1 < end ? fetch_next<T>(p, index) : Prefetch{};
      if (!solve_by_scaling(matrix, s, keeper, ahead, pending, Team{})) solve_by_logarithms(matrix, s, keeper, Team{});
      // The only state is used again.
      if (both == 1) pending.finish();
    }
    pending.finish();
    end_of_stream();
  });
}

static int64_t forward_workspace(const SinkhornProblem& p, int threads) {
  threads = useful_threads(p, threads);
  return p.element == Element::float64 ? workspace_of<double>(p, threads) : workspace_of<float>(p, threads);
}

static void forward(const SinkhornProblem& p, const SinkhornResult& result, void* workspace, int threads) {
  threads = useful_threads(p, threads);
  p.element == Element::float64 ? solve<double>(p, result, workspace, threads)
                                : solve<float>(p, result, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SinkhornKernels, forward_workspace, forward)
