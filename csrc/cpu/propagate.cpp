#include "objslot/propagate.h"

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

void propagate(const PropagateProblem& p, void* out, int threads) {
  if (p.batch == 0) return;
  const PropagateKernels& table = kernels<PropagateKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.run(p, out, workspace.data(), threads);
}

}  // namespace objslot
