// All iterations of slot attention on normalised inputs: projections folded into the side of the slots, the core of
// slot_attention.h, a GRU or a residual sum, and a residual MLP; forward and backward.
//
// Everything is float32 or float64, or, forward and on tiles alone, bfloat16: x, mask, logits and the matrices of the
// layers are, everything else is float32. Everything is contiguous where no stride is named. R = batch * groups * slots
// rows of slots, W their width, E that of the inputs, H that of the hidden layer.
#pragma once

#include <cstdint>

#include "objslot/slot_attention.h"

namespace objslot {

// Layers as torch holds them, (outputs, inputs). Null: that bias is zero; all four of the gates: no GRU.
struct SlotLayers {
  const void *query, *query_bias;  // (E + 1, W), (E + 1): the last row gives the constant of the logits
  const void *value, *value_bias;  // (W, E), (W)
  const void *norm_slots, *norm_slots_bias, *norm_mlp, *norm_mlp_bias;            // (W) each
  const void *input_gates, *hidden_gates, *input_gates_bias, *hidden_gates_bias;  // (3W, W) twice, (3W) twice
  const void *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;                      // (H, W), (H), (W, H), (W)
};

struct SlotLoopProblem {
  Element element;
  int64_t batch, groups, slots, positions, width, input_width, hidden;
  const void* x;  // (batch, positions, E)
  int64_t x_stride, x_row_stride;
  const void* mask;  // (batch, groups, positions) or null
  int64_t mask_stride;
  double scale, eps, slots_eps, mlp_eps;
  SlotLayers layers;
  int64_t rows() const { return batch * groups * slots; }
};

// What one iteration leaves for its backward pass.
struct SlotLoopKept {
  void* slots;  // (R, W): what it started from
  void* means;  // (R, E): averages of the normalised inputs
  void* mass;   // (R)
  void* gates;  // (R, 4W): r, z, n and the hidden part of n; null without a GRU
};

struct SlotLoopForward {
  const void* initial;  // (batch, groups * slots, W)
  int64_t initial_stride;
  int64_t iterations;
  int64_t kept_from;         // the first iteration that is kept
  const SlotLoopKept* kept;  // one for each from there on
  // (batch, positions): statistics of the rows of x; null: x is normalised.
  void* mean;
  void* inverse;
  bool measured;  // whether they are there, or yet to be found
  double x_eps;
  void* const* logits;  // one (batch, groups, slots, positions) for every iteration, or null
  void* slots;          // (R, W)
};

// What gradients of the layers, of their shapes, are added to; null: not wanted.
struct SlotLayerGradients {
  void *query, *query_bias, *value, *value_bias, *norm_slots, *norm_slots_bias, *norm_mlp, *norm_mlp_bias;
  void *input_gates, *hidden_gates, *input_gates_bias, *hidden_gates_bias;
  void *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;
};

struct SlotLoopBackward {
  int64_t iterations;        // that are gone back through
  const SlotLoopKept* kept;  // one for each
  const void* mean;
  const void* inverse;
  const void* grad_slots;   // (R, W) or null
  const void* grad_logits;  // or null
  void* grad_initial;       // (R, W): the gradient of what the first of the iterations started from
  void* grad_x;             // (batch, positions, E) or null
  bool add_to_x, finish_x;  // see SlotAttentionGradient: of the first iteration back, and of the last
  void* grad_mask;          // or null
  SlotLayerGradients layers;
};

// One iteration backwards on R rows. Matrices of (R, ...) that the gradients of the layers are products of.
struct SlotRowsGradient {
  SlotLoopKept kept;
  const void* grad_slots;                           // (R, W)
  void* upper;                                      // (R, W): a copy of it where grad_start is the same memory, or null
  void* grad_start;                                 // (R, W): the gradient of what the iteration started from
  void *normed_slots, *grad_query, *grad_constant;  // (R, W), (R, E), (R)
  void *updates, *grad_updates;                     // (R, W) twice
  void* grad_gates;                                 // (R, 4W): r, z, the input part of n, its hidden part
  void *normed_mlp, *hidden, *grad_hidden;          // (R, W), (R, H) twice
};

// ---- rows of slots: what the kernels of an instruction set offer ----

// A matrix of weights and where its packed form begins, in elements.
struct PackedMatrix {
  const void* data;
  int64_t outer, inner, outer_stride, inner_stride, place;
};

struct SlotRows {
  Element element;
  int64_t rows, width, input_width, hidden;
  double scale, slots_eps, mlp_eps;
  SlotLayers layers;
  const void* packed;
  bool tiles;  // whether the matrices are packed for tiles
  bool half;   // whether they are of bfloat16
  // The last six for the backward pass alone.
  PackedMatrix query, value, input_gates[3], hidden_gates[3], mlp_in, mlp_out;
  PackedMatrix query_back, value_back, input_gates_back, hidden_gates_back[2], mlp_in_back, mlp_out_back;
};

struct SlotRowsKernels {
  // Whether so many rows are multiplied on tiles.
  bool (*tiles)(Element, int64_t rows);
  // Elements of the arithmetic type.
  int64_t (*packed_size)(Element, int64_t outer, int64_t inner, bool tiles);
  void (*pack)(Element, const PackedMatrix*, int64_t count, void* packed, bool tiles, int threads);
  // Mean and inverse deviation of the rows of x.
  void (*statistics)(const SlotLoopProblem&, double eps, void* mean, void* inverse, int threads);
  int64_t (*workspace)(const SlotRows&, int threads);
  // The update of the slots from an iteration's averages, where there are any, and the queries of the next
  // iteration, where they are wanted.
  void (*advance)(const SlotRows&, const SlotLoopKept* kept, const void* slots, void* next, void* query, void* constant,
                  void* workspace, int threads);
};

// A matrix (rows, columns) whose rows are added to what is there, `together` of them at a time.
struct RowSum {
  const void* data;
  int64_t rows, together, columns, stride;
  void* out;
};

// A matrix (outer, inner), contiguous, that the product of the transposed `upper` (rows, outer) with `lower` (rows,
// inner) is added to.
struct RowProduct {
  const void* upper;
  int64_t outer, upper_stride;
  const void* lower;
  int64_t inner, lower_stride;
  void* out;
};

// Sums over rows are the same however the rows are cut, at multiples of this, into calls.
constexpr int64_t row_step = 32;

struct SlotRowsBackwardKernels {
  int64_t (*workspace)(const SlotRows&, int threads);
  // Rows of the matrices of partial sums, (chunks, W), that the two passes write for the norms.
  int64_t (*chunks)(int64_t rows);
  // From grad_slots to the gradient of the averages; also makes the queries again. norm_sums: for the weight and
  // the bias of the norm of the MLP.
  void (*to_means)(const SlotRows&, const SlotRowsGradient&, void* grad_means, void* query, void* constant,
                   void* const* norm_sums, void* workspace, int threads);
  // From grad_query and grad_constant, which it scales, to grad_start, which holds the part that went around the
  // attention. norm_sums: for the norm of the slots.
  void (*to_start)(const SlotRows&, const SlotRowsGradient&, void* const* norm_sums, void* workspace, int threads);
};

struct SlotRowSumsKernels {
  // `inner`: the largest of the products.
  int64_t (*workspace)(int64_t rows, int64_t inner, bool tiles, int threads);
  void (*add_rows)(Element, const RowSum*, int64_t count, int threads);
  void (*add_products)(Element, int64_t rows, const RowProduct*, int64_t count, bool tiles, void* workspace,
                       int threads);
};

void slot_loop_forward(const SlotLoopProblem&, const SlotLoopForward&, int threads);
void slot_loop_backward(const SlotLoopProblem&, const SlotLoopBackward&, int threads);

}  // namespace objslot
