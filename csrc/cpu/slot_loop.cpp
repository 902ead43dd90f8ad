#include "objslot/slot_loop.h"

#include <cstring>
#include <vector>

#include "objslot/dispatch.h"
#include "objslot/workspace.h"

namespace objslot {

namespace {

// Bytes of what is not bfloat16.
int64_t size_of(Element element) { return element == Element::float64 ? 8 : 4; }

// Parts of one workspace, at multiples of 64 bytes.
class Parts {
 public:
  int64_t take(int64_t bytes) {
    const int64_t begin = used_;
    used_ += (bytes + 63) / 64 * 64;
    return begin;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// The rows of slots with their weights yet to be packed, and the matrices to pack.
struct Plan {
  SlotRows rows;
  std::vector<PackedMatrix> matrices;
  int64_t packed = 0;
};

Plan plan_rows(const SlotLoopProblem& p, bool backward) {
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  Plan plan{};
  const int64_t width = p.width, input = p.input_width, hidden = p.hidden;
  SlotRows& r = plan.rows;
  r.half = p.element == Element::bfloat16;
  r.element = r.half ? Element::float32 : p.element;
  const int64_t size = r.half ? 2 : size_of(p.element);
  r.rows = p.rows();
  r.width = width;
  r.input_width = input;
  r.hidden = hidden;
  r.scale = p.scale;
  r.slots_eps = p.slots_eps;
  r.mlp_eps = p.mlp_eps;
  r.layers = p.layers;
  r.tiles = table.tiles(p.element, r.rows);
  // Products with the transpose of a layer's matrix (outputs, inputs), from one of its rows on; `back`: with the
  // matrix itself, whose rows are then the inner dimension.
  const auto add = [&](const void* data, int64_t row, int64_t outputs, int64_t inputs, bool back) {
    const void* from = static_cast<const char*>(data) + row * inputs * size;
    const PackedMatrix m = back ? PackedMatrix{from, inputs, outputs, 1, inputs, plan.packed}
                                : PackedMatrix{from, outputs, inputs, inputs, 1, plan.packed};
    plan.matrices.push_back(m);
    plan.packed += (table.packed_size(p.element, m.outer, m.inner, r.tiles) + 15) / 16 * 16;
    return m;
  };
  const SlotLayers& l = p.layers;
  r.query = add(l.query, 0, input, width, false);
  r.value = add(l.value, 0, width, input, false);
  r.mlp_in = add(l.mlp_in, 0, hidden, width, false);
  if (!backward) {
    r.mlp_out = add(l.mlp_out, 0, width, hidden, false);
    for (int g = 0; g < 3 && l.input_gates; ++g) {
      r.input_gates[g] = add(l.input_gates, g * width, width, width, false);
      r.hidden_gates[g] = add(l.hidden_gates, g * width, width, width, false);
    }
    return plan;
  }
  r.query_back = add(l.query, 0, input, width, true);
  r.value_back = add(l.value, 0, width, input, true);
  r.mlp_in_back = add(l.mlp_in, 0, hidden, width, true);
  r.mlp_out_back = add(l.mlp_out, 0, width, hidden, true);
  if (l.input_gates) {
    r.input_gates_back = add(l.input_gates, 0, 3 * width, width, true);
    r.hidden_gates_back[0] = add(l.hidden_gates, 0, 2 * width, width, true);
    r.hidden_gates_back[1] = add(l.hidden_gates, 2 * width, width, width, true);
  }
  return plan;
}

SlotAttentionProblem core(const SlotLoopProblem& p, const void* query, const void* constant, const void* mean,
                          const void* inverse) {
  const int64_t slots = p.groups * p.slots;
  SlotAttentionProblem q{p.element,
                         p.batch,
                         p.groups,
                         p.slots,
                         p.positions,
                         p.input_width,
                         p.input_width,
                         query,
                         slots * p.input_width,
                         p.x,
                         p.x_stride,
                         p.x_row_stride,
                         nullptr,
                         0,
                         0,
                         p.mask,
                         p.mask_stride,
                         constant,
                         slots,
                         p.scale,
                         p.eps};
  q.row_mean = mean;
  q.row_inverse = inverse;
  if (p.element == Element::bfloat16) q.slot_element = Element::float32;
  return q;
}

int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

void slot_loop_forward(const SlotLoopProblem& p, const SlotLoopForward& f, int threads) {
  if (p.batch == 0) return;
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  const SlotAttentionKernels& attention = kernels<SlotAttentionKernels>();
  Plan plan = plan_rows(p, false);
  const int64_t size = size_of(p.element), rows = p.rows();
  const SlotAttentionProblem shape = core(p, nullptr, nullptr, f.mean, f.inverse);
  Parts parts;
  const int64_t packed = parts.take(plan.packed * size);
  const int64_t query = parts.take(rows * p.input_width * size), constant = parts.take(rows * size);
  const int64_t means = parts.take(rows * p.input_width * size), mass = parts.take(rows * size);
  const int64_t slots[2] = {parts.take(rows * p.width * size), parts.take(rows * p.width * size)};
  const int64_t rest = parts.take(larger_of(table.workspace(plan.rows, threads), attention.workspace(shape, threads)));
  const Workspace workspace(parts.used());
  const auto at = [&](int64_t place) { return static_cast<char*>(workspace.data()) + place; };

  table.pack(p.element, plan.matrices.data(), static_cast<int64_t>(plan.matrices.size()), at(packed), plan.rows.tiles,
             threads);
  plan.rows.packed = at(packed);
  if (f.mean) table.statistics(p, f.x_eps, f.mean, f.inverse, threads);
  const auto kept = [&](int64_t iteration) {
    return iteration >= f.kept_from && iteration < f.iterations ? &f.kept[iteration - f.kept_from] : nullptr;
  };
  const void* from = f.initial;
  if (kept(0)) {
    std::memcpy(kept(0)->slots, f.initial, static_cast<size_t>(rows * p.width * size));
    from = kept(0)->slots;
  }
  table.advance(plan.rows, nullptr, from, nullptr, at(query), at(constant), at(rest), threads);
  for (int64_t iteration = 0; iteration < f.iterations; ++iteration) {
    const SlotLoopKept* keep = kept(iteration);
    const SlotLoopKept passing{const_cast<void*>(from), at(means), at(mass), nullptr};
    const SlotLoopKept& now = keep ? *keep : passing;
    const bool last = iteration + 1 == f.iterations;
    attention.forward(core(p, at(query), at(constant), f.mean, f.inverse),
                      {now.means, f.logits ? f.logits[iteration] : nullptr, now.mass}, at(rest), threads);
    void* to = last ? f.slots : kept(iteration + 1) ? kept(iteration + 1)->slots : at(slots[iteration % 2]);
    table.advance(plan.rows, &now, from, to, last ? nullptr : at(query), at(constant), at(rest), threads);
    from = to;
  }
}

int64_t slot_loop_packed_size(const SlotLoopProblem& p) { return plan_rows(p, true).packed; }

void slot_loop_backward(const SlotLoopProblem& p, const SlotLoopBackward& b, int threads) {
  if (p.batch == 0) return;
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  const SlotRowsBackwardKernels& back = kernels<SlotRowsBackwardKernels>();
  const SlotAttentionBackwardKernels& attention = kernels<SlotAttentionBackwardKernels>();
  Plan plan = plan_rows(p, true);
  const int64_t size = size_of(p.element), rows = p.rows(), chunks = back.chunks(rows);
  const SlotAttentionProblem shape = core(p, nullptr, nullptr, b.mean, b.inverse);
  Parts parts;
  const int64_t query = parts.take(rows * p.input_width * size), constant = parts.take(rows * size);
  int64_t sums[4];
  for (int64_t& place : sums) place = parts.take(chunks * p.width * size);
  const int64_t rest = parts.take(larger_of(back.workspace(plan.rows, threads), attention.workspace(shape, threads)));
  const Workspace workspace(parts.used());
  const auto at = [&](int64_t place) { return static_cast<char*>(workspace.data()) + place; };

  if (b.pack)
    table.pack(p.element, plan.matrices.data(), static_cast<int64_t>(plan.matrices.size()), b.packed, plan.rows.tiles,
               threads);
  plan.rows.packed = b.packed;
  void* const mlp_sums[2] = {at(sums[0]), at(sums[1])};
  void* const slots_sums[2] = {at(sums[2]), at(sums[3])};
  // The gradient of the averages lies where that of the queries will.
  back.to_means(plan.rows, b, b.grad_query, at(query), at(constant), mlp_sums, at(rest), threads);
  SlotAttentionGradient gradient{b.grad_query, b.grad_logits, b.kept.means, b.kept.mass,    b.grad_query,
                                 b.grad_x,     nullptr,       b.grad_mask,  b.grad_constant};
  gradient.add_to_k = b.add_to_x;
  gradient.through_norm = b.finish_x;
  gradient.add_to_mask = b.add_to_mask;
  attention.backward(core(p, at(query), at(constant), b.mean, b.inverse), gradient, at(rest), threads);
  back.to_start(plan.rows, b, slots_sums, at(rest), threads);

  std::vector<RowSum> list;
  const auto sum = [&](const void* data, int64_t count, int64_t columns, void* out, int64_t offset = 0) {
    if (out) list.push_back({data, count, columns, columns, static_cast<char*>(out) + offset * size});
  };
  sum(b.grad_query, rows, p.input_width, b.query_bias);
  sum(b.grad_constant, rows, 1, b.query_bias, p.input_width);
  sum(b.grad_updates, rows, p.width, b.value_bias);
  sum(b.grad_gates, rows, 4 * p.width, b.gates_bias);
  sum(b.grad_hidden, rows, p.hidden, b.mlp_in_bias);
  sum(b.grad_slots, rows, p.width, b.mlp_out_bias);
  sum(mlp_sums[0], chunks, p.width, b.norm_mlp);
  sum(mlp_sums[1], chunks, p.width, b.norm_mlp_bias);
  sum(slots_sums[0], chunks, p.width, b.norm_slots);
  sum(slots_sums[1], chunks, p.width, b.norm_slots_bias);
  back.sum_rows(p.element, list.data(), static_cast<int64_t>(list.size()), threads);
}

}  // namespace objslot
