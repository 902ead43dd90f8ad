#include "objslot/transport.h"

#include <stdexcept>

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

bool multiplies_tokens() { return has_tiles(); }

void transport_pairs(const PairsProblem& p, const PairsResult& result, int threads) {
  if (p.pairs == 0) return;
  if (!p.scores && !multiplies_tokens()) throw std::invalid_argument("transport_pairs: expected scores");
  const TransportKernels& table = kernels<TransportKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.run(p, result, workspace.data(), threads);
}

}  // namespace objslot
