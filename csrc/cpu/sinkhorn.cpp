#include "objslot/sinkhorn.h"

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

namespace {

int64_t matrix_bytes(const SinkhornProblem& p) {
  const int64_t size = p.element == Element::float64 ? 8 : p.element == Element::float32 ? 4 : 2;
  return p.batch * p.n * p.m * size;
}

}  // namespace

void sinkhorn_forward(const SinkhornProblem& p, const SinkhornResult& result, int threads) {
  if (p.batch == 0) return;
  const SinkhornKernels& table = kernels<SinkhornKernels>();
  const Workspace workspace(table.forward_workspace(p, threads));
  if (result.plan) prefer_huge_pages(result.plan, matrix_bytes(p));
  table.forward(p, result, workspace.data(), threads);
}

void sinkhorn_backward(const SinkhornProblem& p, const SinkhornGradient& gradient, int threads) {
  if (p.batch == 0) return;
  const SinkhornBackwardKernels& table = kernels<SinkhornBackwardKernels>();
  const Workspace workspace(table.workspace(p, threads));
  prefer_huge_pages(gradient.grad_scores, matrix_bytes(p));
  table.run(p, gradient, workspace.data(), threads);
}

}  // namespace objslot
