#include "objslot/transport.h"

#include <stdexcept>

#include "objslot/dispatch.h"
#include "objslot/transport_pairs.h"
#include "objslot/workspace.h"

namespace objslot {

namespace {

template <class Table, class Result>
void run(const TransportProblem& p, const Result& result, int threads) {
  if (p.batch == 0) return;
  const Table& table = kernels<Table>();
  const SinkhornTables sinkhorn{kernels<SinkhornKernels>(), kernels<SinkhornBackwardKernels>()};
  const Workspace workspace(table.workspace(p, sinkhorn, has_tiles(), threads));
  table.run(p, result, sinkhorn, has_tiles(), workspace.data(), threads);
}

}  // namespace

void transport_forward(const TransportProblem& p, const TransportResult& result, int threads) {
  run<TransportKernels>(p, result, threads);
}

void transport_backward(const TransportProblem& p, const TransportGradient& gradient, int threads) {
  run<TransportBackwardKernels>(p, gradient, threads);
}

bool multiplies_tokens() { return has_tiles(); }

void transport_pairs(const PairsProblem& p, const PairsResult& result, int threads) {
  if (p.pairs == 0) return;
  if (!p.scores && !multiplies_tokens()) throw std::invalid_argument("transport_pairs: expected scores");
  const PairsKernels& table = kernels<PairsKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.run(p, result, workspace.data(), threads);
}

}  // namespace objslot
