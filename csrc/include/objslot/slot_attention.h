// Slot attention: softmax over the slots of a group, mask, mean over positions; forward and backward.
//
// The arithmetic type is double for float64 and float otherwise; mass has the arithmetic type, everything else the
// element type. Strides count elements. The rows of k and v are contiguous, everything else is contiguous in each
// element of the batch; outputs are contiguous altogether.
#pragma once

#include <cstdint>

#include "objslot/sinkhorn.h"

namespace objslot {

struct SlotAttentionProblem {
  Element element;
  int64_t batch, groups, slots, positions, width, value_width;
  const void* q;  // (batch, groups, slots, width)
  int64_t q_stride;
  const void* k;  // (batch, positions, width)
  int64_t k_stride, k_row_stride;
  const void* v;  // (batch, positions, value_width), null: the keys
  int64_t v_stride, v_row_stride;
  const void* mask;  // (batch, groups, positions) or null
  int64_t mask_stride;
  const void* bias;  // (batch, groups, slots) or null
  int64_t bias_stride;
  double scale, eps;
  // Statistics of the keys (batch, positions), arithmetic type, or null: k stands for (k - mean) * inverse.
  const void* row_mean = nullptr;
  const void* row_inverse = nullptr;
  // Of q, bias and updates, where it is not that of the keys; forward alone.
  Element slot_element = element;
};

struct SlotAttentionResult {
  void* updates;  // (batch, groups, slots, value_width)
  void* logits;   // (batch, groups, slots, positions) or null
  void* mass;     // (batch, groups, slots)
  // Softmax over the slots (batch, positions, lanes of the kernels), arithmetic type, or null. Positions that no group
  // reads are left as they are.
  void* probabilities = nullptr;
};

// The gradients of the results, and those wanted; null: zero, or not wanted.
struct SlotAttentionGradient {
  const void* grad_updates;
  const void* grad_logits;
  const void* updates;
  const void* mass;
  void* grad_q;
  void* grad_k;  // holds the part of the values too where v is null
  void* grad_v;
  void* grad_mask;
  void* grad_bias;
  bool add_to_k = false;  // grad_k is added to what is there
  // The sum is passed back through the normalisation of the rows, mean and deviation included.
  bool through_norm = false;
  bool add_to_mask = false;
  // What the forward pass wrote, or null: they are made again.
  const void* probabilities = nullptr;
};

struct SlotAttentionKernels {
  // Bytes of memory, aligned to 64, that the call needs to work in.
  int64_t (*workspace)(const SlotAttentionProblem&, int threads);
  void (*forward)(const SlotAttentionProblem&, const SlotAttentionResult&, void* workspace, int threads);
  // Entries of a position's row of probabilities.
  int64_t (*lanes)(const SlotAttentionProblem&);
};

struct SlotAttentionBackwardKernels {
  int64_t (*workspace)(const SlotAttentionProblem&, int threads);
  void (*backward)(const SlotAttentionProblem&, const SlotAttentionGradient&, void* workspace, int threads);
};

struct SlotSoftmaxProblem {
  Element element;
  int64_t count, slots, positions;  // count: batch times groups
  const void* logits;               // (count, slots, positions)
  const void* mask;                 // (count, positions) or null
  double eps;
};

struct SlotSoftmaxKernels {
  int64_t (*workspace)(const SlotSoftmaxProblem&, int threads);
  void (*forward)(const SlotSoftmaxProblem&, void* weights, void* mass, void* workspace, int threads);
  void (*backward)(const SlotSoftmaxProblem&, const void* grad, const void* mass, void* grad_logits, void* grad_mask,
                   void* workspace, int threads);
};

// The kernels of the active instruction set, with a workspace of their own.
void slot_attention_forward(const SlotAttentionProblem&, const SlotAttentionResult&, int threads);
int64_t slot_attention_lanes(const SlotAttentionProblem&);
void slot_attention_backward(const SlotAttentionProblem&, const SlotAttentionGradient&, int threads);
void slot_softmax_forward(const SlotSoftmaxProblem&, void* weights, void* mass, int threads);
void slot_softmax_backward(const SlotSoftmaxProblem&, const void* grad, const void* mass, void* grad_logits,
                           void* grad_mask, int threads);

}  // namespace objslot
