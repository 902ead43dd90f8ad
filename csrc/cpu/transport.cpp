#include "objslot/transport.h"

#include "objslot/alignment.h"
#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

namespace {

template <class Table, class Problem, class Result>
void run(const Problem& p, const Result& result, int threads) {
  const Table& table = kernels<Table>();
  const SinkhornTables sinkhorn{kernels<SinkhornKernels>(), kernels<SinkhornBackwardKernels>()};
  const Workspace workspace(table.workspace(p, sinkhorn, has_tiles(), threads));
  table.run(p, result, sinkhorn, has_tiles(), workspace.data(), threads);
}

}  // namespace

void transport_forward(const TransportProblem& p, const TransportResult& result, int threads) {
  if (p.batch > 0) run<TransportKernels>(p, result, threads);
}

void transport_backward(const TransportProblem& p, const TransportGradient& gradient, int threads) {
  if (p.batch > 0) run<TransportBackwardKernels>(p, gradient, threads);
}

void align_frames(const AlignmentProblem& p, void* out, int threads) {
  if (p.clips > 0) run<AlignmentKernels>(p, out, threads);
}

bool multiplies_on_tiles() { return has_tiles(); }

}  // namespace objslot
