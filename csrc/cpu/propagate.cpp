#include "objslot/propagate.h"

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

void propagate(PropagateProblem p, void* out, int threads) {
  if (p.batch == 0) return;
  p.tiles = has_tiles() && p.element != Element::float64;
  const PropagateKernels& table = kernels<PropagateKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.run(p, out, workspace.data(), threads);
}

}  // namespace objslot
