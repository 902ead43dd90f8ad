#include "objslot/slot_attention.h"

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

void slot_attention_forward(const SlotAttentionProblem& p, const SlotAttentionResult& result, int threads) {
  if (p.batch == 0) return;
  const SlotAttentionKernels& table = kernels<SlotAttentionKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.forward(p, result, workspace.data(), threads);
}

int64_t slot_attention_lanes(const SlotAttentionProblem& p) { return kernels<SlotAttentionKernels>().lanes(p); }

void slot_attention_backward(const SlotAttentionProblem& p, const SlotAttentionGradient& gradient, int threads) {
  if (p.batch == 0) return;
  const SlotAttentionBackwardKernels& table = kernels<SlotAttentionBackwardKernels>();
  const Workspace workspace(table.workspace(p, threads));
  const int64_t rows = p.batch * p.positions * bytes_of(p.element);
  if (gradient.grad_k) prefer_huge_pages(gradient.grad_k, rows * p.width);
  if (gradient.grad_v) prefer_huge_pages(gradient.grad_v, rows * p.value_width);
  table.backward(p, gradient, workspace.data(), threads);
}

void slot_softmax_forward(const SlotSoftmaxProblem& p, void* weights, void* mass, int threads) {
  if (p.count == 0) return;
  const SlotSoftmaxKernels& table = kernels<SlotSoftmaxKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.forward(p, weights, mass, workspace.data(), threads);
}

void slot_softmax_backward(const SlotSoftmaxProblem& p, const void* grad, const void* mass, void* grad_logits,
                           void* grad_mask, int threads) {
  if (p.count == 0) return;
  const SlotSoftmaxKernels& table = kernels<SlotSoftmaxKernels>();
  const Workspace workspace(table.workspace(p, threads));
  table.backward(p, grad, mass, grad_logits, grad_mask, workspace.data(), threads);
}

}  // namespace objslot
