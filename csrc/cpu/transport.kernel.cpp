// Sinkhorn transport forward: scores by one product, the iteration, and rows of the plan that are applied to the
// values as soon as they are made.
#include "transport_move.h"

namespace objslot::OBJSLOT_ISA {

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
