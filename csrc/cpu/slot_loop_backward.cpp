#include <algorithm>
#include <cstring>

#include "objslot/dispatch.h"
#include "objslot/workspace.h"
#include "slot_loop_parts.h"

namespace objslot {

namespace {

// The matrices of a part of the batch, in the order of SlotRowsGradient from `upper` on, and sums over chunks of rows.
struct BackwardPlaces {
  int64_t query, constant, upper, normed_slots, grad_query, grad_constant, updates, grad_updates, grad_gates;
  int64_t normed_mlp, hidden, grad_hidden, norm_sums[4];
};

BackwardPlaces backward_places(const SlotLoopProblem& p, int64_t rows, int64_t chunks, Parts& parts) {
  const auto take = [&](int64_t columns) { return parts.take(rows * columns * arithmetic_bytes_of(p.element)); };
  BackwardPlaces s;
  s.query = take(p.input_width);
  s.constant = take(1);
  s.upper = take(p.width);
  s.normed_slots = take(p.width);
  s.grad_query = take(p.input_width);
  s.grad_constant = take(1);
  s.updates = take(p.width);
  s.grad_updates = take(p.width);
  s.grad_gates = take(p.layers.input_gates ? 4 * p.width : 0);
  s.normed_mlp = take(p.width);
  s.hidden = take(p.hidden);
  s.grad_hidden = take(p.hidden);
  for (int64_t& place : s.norm_sums) place = parts.take(chunks * p.width * arithmetic_bytes_of(p.element));
  return s;
}

// Adds what rows of an iteration give to the gradients of the layers.
void add_to_layers(const SlotLoopProblem& p, const SlotRows& r, const SlotRowsGradient& g, void* const* norm_sums,
                   int64_t chunks, const SlotLayerGradients& to, void* workspace, int threads) {
  const int64_t width = p.width, input = p.input_width, size = arithmetic_bytes_of(p.element);
  std::vector<RowProduct> products;
  const auto multiply = [&](const void* upper, int64_t from, int64_t outer, int64_t stride, const void* lower,
                            int64_t inner, void* out, int64_t row = 0) {
    if (out)
      products.push_back(
          {advanced(upper, from, size), outer, stride, lower, inner, inner, advanced(out, row * inner, size)});
  };
  const void* const upper = g.upper ? g.upper : g.grad_slots;
  multiply(g.grad_query, 0, input, input, g.normed_slots, width, to.query);
  multiply(g.grad_constant, 0, 1, 1, g.normed_slots, width, to.query, input);
  multiply(g.grad_updates, 0, width, width, g.kept.means, input, to.value);
  multiply(g.grad_gates, 0, 3 * width, 4 * width, g.updates, width, to.input_gates);
  multiply(g.grad_gates, 0, 2 * width, 4 * width, g.kept.slots, width, to.hidden_gates);
  multiply(g.grad_gates, 3 * width, width, 4 * width, g.kept.slots, width, to.hidden_gates, 2 * width);
  multiply(g.grad_hidden, 0, p.hidden, p.hidden, g.normed_mlp, width, to.mlp_in);
  multiply(upper, 0, width, width, g.hidden, p.hidden, to.mlp_out);

  std::vector<RowSum> sums;
  const auto sum = [&](const void* data, int64_t from, int64_t columns, int64_t stride, void* out, int64_t place = 0) {
    if (out)
      sums.push_back({advanced(data, from, size), r.rows, row_step, columns, stride, advanced(out, place, size)});
  };
  sum(g.grad_query, 0, input, input, to.query_bias);
  sum(g.grad_constant, 0, 1, 1, to.query_bias, input);
  sum(g.grad_updates, 0, width, width, to.value_bias);
  sum(g.grad_gates, 0, 3 * width, 4 * width, to.input_gates_bias);
  sum(g.grad_gates, 0, 2 * width, 4 * width, to.hidden_gates_bias);
  sum(g.grad_gates, 3 * width, width, 4 * width, to.hidden_gates_bias, 2 * width);
  sum(g.grad_hidden, 0, p.hidden, p.hidden, to.mlp_in_bias);
  sum(upper, 0, width, width, to.mlp_out_bias);
  void* const norms[4] = {to.norm_mlp, to.norm_mlp_bias, to.norm_slots, to.norm_slots_bias};
  for (int k = 0; k < 4; ++k)
    if (norms[k]) sums.push_back({norm_sums[k], chunks, 1, width, width, norms[k]});

  const SlotRowSumsKernels& table = kernels<SlotRowSumsKernels>();
  table.add_products(p.element, r.rows, products.data(), static_cast<int64_t>(products.size()), r.tiles, workspace,
                     threads);
  table.add_rows(p.element, sums.data(), static_cast<int64_t>(sums.size()), threads);
}

// Passes the gradient of normalised inputs back to those that the loop did not read, but the call did that the
// gradient is from.
template <class T>
void finish_unread(const SlotLoopProblem& p, const SlotLoopBackward& b) {
  const int64_t width = p.input_width;
  for (int64_t at = 0; at < p.batch * p.positions; ++at) {
    const int64_t batch = at / p.positions, position = at % p.positions;
    const T* const mask = static_cast<const T*>(p.mask) + batch * p.mask_stride + position;
    bool read = false;
    for (int64_t g = 0; g < p.groups; ++g) read |= mask[g * p.positions] != T(0);
    T* const grad = static_cast<T*>(b.grad_x) + at * width;
    if (read || std::all_of(grad, grad + width, [](T value) { return value == T(0); })) continue;
    const T* const x = static_cast<const T*>(p.x) + batch * p.x_stride + position * p.x_row_stride;
    const T mean = static_cast<const T*>(b.mean)[at], inverse = static_cast<const T*>(b.inverse)[at];
    T sum = 0, inner = 0;
    for (int64_t d = 0; d < width; ++d) {
      sum += grad[d];
      inner += grad[d] * (x[d] - mean) * inverse;
    }
    sum /= static_cast<T>(width);
    inner /= static_cast<T>(width);
    for (int64_t d = 0; d < width; ++d) grad[d] = (grad[d] - sum - (x[d] - mean) * inverse * inner) * inverse;
  }
}

}  // namespace

void slot_loop_backward(const SlotLoopProblem& p, const SlotLoopBackward& b, int threads) {
  if (p.batch == 0) return;
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  const SlotRowsBackwardKernels& back = kernels<SlotRowsBackwardKernels>();
  const SlotAttentionBackwardKernels& attention = kernels<SlotAttentionBackwardKernels>();
  Plan plan = plan_rows(p, true);
  const int64_t size = arithmetic_bytes_of(p.element), slots = p.groups * p.slots;
  const int64_t together = elements_together(p, threads), most_rows = together * slots;
  plan.rows.rows = most_rows;
  const int64_t longest = std::max({p.width, p.input_width, p.hidden});
  Parts parts;
  const int64_t packed = parts.take(plan.packed * size);
  const BackwardPlaces places = backward_places(p, most_rows, back.chunks(most_rows), parts);
  const int64_t rest = parts.take(
      std::max({kernels<SlotRowSumsKernels>().workspace(most_rows, longest, plan.rows.tiles, threads),
                back.workspace(plan.rows, threads),
                attention.workspace(core(part_of(p, 0, together), nullptr, nullptr, b.mean, b.inverse), threads)}));
  const Workspace workspace(parts.used());
  const auto at = [&](int64_t place) { return static_cast<char*>(workspace.data()) + place; };

  table.pack(p.element, plan.matrices.data(), static_cast<int64_t>(plan.matrices.size()), at(packed), plan.rows.tiles,
             threads);
  plan.rows.packed = at(packed);
  if (!b.grad_slots) std::memset(b.grad_initial, 0, static_cast<size_t>(p.rows() * p.width * size));
  void* norm_sums[4];
  for (int k = 0; k < 4; ++k) norm_sums[k] = at(places.norm_sums[k]);
  for (int64_t iteration = b.iterations - 1; iteration >= 0; --iteration)
    for (int64_t begin = 0; begin < p.batch; begin += together) {
      const bool last = iteration + 1 == b.iterations;
      const SlotLoopProblem part = part_of(p, begin, p.batch - begin < together ? p.batch - begin : together);
      const int64_t row = begin * slots, inputs = begin * p.positions * p.input_width;
      const int64_t entries = begin * p.groups * p.positions;
      plan.rows.rows = part.rows();
      void* const grad_start = advanced(b.grad_initial, row * p.width, size);
      const bool given = last && b.grad_slots;
      SlotRowsGradient g{};
      g.kept = kept_from(p, b.kept[iteration], row);
      g.grad_slots = given ? advanced(b.grad_slots, row * p.width, size) : grad_start;
      g.upper = given ? nullptr : at(places.upper);
      g.grad_start = grad_start;
      g.normed_slots = at(places.normed_slots);
      g.grad_query = at(places.grad_query);
      g.grad_constant = at(places.grad_constant);
      g.updates = at(places.updates);
      g.grad_updates = at(places.grad_updates);
      g.grad_gates = p.layers.input_gates ? at(places.grad_gates) : nullptr;
      g.normed_mlp = at(places.normed_mlp);
      g.hidden = at(places.hidden);
      g.grad_hidden = at(places.grad_hidden);
      // The gradient of the averages lies where that of the queries will.
      back.to_means(plan.rows, g, g.grad_query, at(places.query), at(places.constant), norm_sums, at(rest), threads);
      SlotAttentionGradient gradient{g.grad_query,   last ? advanced(b.grad_logits, row * p.positions, size) : nullptr,
                                     g.kept.means,   g.kept.mass,
                                     g.grad_query,   advanced(b.grad_x, inputs, size),
                                     nullptr,        advanced(b.grad_mask, entries, size),
                                     g.grad_constant};
      gradient.add_to_k = !last || b.add_to_x;
      gradient.add_to_mask = !last;
      gradient.through_norm = iteration == 0 && b.finish_x;
      attention.backward(core(part, at(places.query), at(places.constant), advanced(b.mean, begin * p.positions, size),
                              advanced(b.inverse, begin * p.positions, size)),
                         gradient, at(rest), threads);
      back.to_start(plan.rows, g, norm_sums + 2, at(rest), threads);
      add_to_layers(p, plan.rows, g, norm_sums, back.chunks(part.rows()), b.layers, at(rest), threads);
    }
  if (!b.grad_x || !b.add_to_x || !b.finish_x || !p.mask) return;
  if (p.element == Element::float64)
    finish_unread<double>(p, b);
  else
    finish_unread<float>(p, b);
}

}  // namespace objslot
