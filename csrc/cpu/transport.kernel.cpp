// Sinkhorn transport forward: scores by one product, the iteration, and rows of the plan that are applied to the
// values as soon as they are made.
#include "transport_stages.h"

namespace objslot::OBJSLOT_ISA {

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
    multiply<T>({rows, columns, 1}, count, s.values, lanes, p.m, moved, lanes, lanes);
    for (int64_t r = 0; r < count; ++r) write_element_row(p, out, first + r, p.channels, moved + r * lanes);
  });
}

// One element; run(stage) calls stage(team) on the threads that work on it.
template <class T, class Run>
static void move(const TransportProblem& p, const TransportResult& result, const SinkhornTables& sinkhorn,
                 int64_t index, Stage<T> s, bool tiles, int threads, const Run& run) {
  const int64_t size = p.element == Element::float64 ? 8 : p.element == Element::float32 ? 4 : 2;
  point_at(p, index, s);
  make_scores(p, s, tiles, run);
  const SinkhornResult found{nullptr, nullptr, nullptr,
                             result.error ? static_cast<T*>(result.error) + index : nullptr, history_of(s)};
  sinkhorn.forward.forward(scores_problem<T>(p, index, s.scores, s.stride), found, s.sinkhorn, threads);
  if (p.channels == 0) return;
  run([&](const Team& team) {
    read_channels(p, static_cast<const char*>(p.values) + index * p.values_stride * size, p.m, s.values,
                  s.rows + team.worker * s.rows_size, team);
    team.wait();
    apply(p, s, static_cast<char*>(result.out) + index * p.n * p.channels * size, team);
  });
}

template <class T>
static void move_all(const TransportProblem& p, const TransportResult& result, const SinkhornTables& sinkhorn,
                     bool tiles, char* base, int threads) {
  for_elements(p, threads, [&](int64_t index, int worker, int together, const auto& run) {
    const Stage<T> s = stage_of<T>(p, sinkhorn, false, tiles, together, base, worker);
    move(p, result, sinkhorn, index, s, tiles, together, run);
  });
}

static int64_t workspace(const TransportProblem& p, const SinkhornTables& sinkhorn, bool tiles, int threads) {
  threads = useful_threads(p, threads);
  return p.element == Element::float64 ? workspace_of<double>(p, sinkhorn, false, tiles, threads)
                                       : workspace_of<float>(p, sinkhorn, false, tiles, threads);
}

static void run(const TransportProblem& p, const TransportResult& result, const SinkhornTables& sinkhorn, bool tiles,
                void* workspace, int threads) {
  threads = useful_threads(p, threads);
  char* base = static_cast<char*>(workspace);
  p.element == Element::float64 ? move_all<double>(p, result, sinkhorn, tiles, base, threads)
                                : move_all<float>(p, result, sinkhorn, tiles, base, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(TransportKernels, workspace, run)
