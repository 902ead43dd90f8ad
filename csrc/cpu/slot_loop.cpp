#include <algorithm>
#include <cstring>
#include <numeric>

#include "objslot/dispatch.h"
#include "objslot/workspace.h"
#include "slot_loop_parts.h"

namespace objslot {

Plan plan_rows(const SlotLoopProblem& p, bool backward) {
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  Plan plan{};
  const int64_t width = p.width, input = p.input_width, hidden = p.hidden;
  SlotRows& r = plan.rows;
  r.half = p.element == Element::bfloat16;
  r.element = r.half ? Element::float32 : p.element;
  const int64_t size = bytes_of(p.element);
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

SlotLoopProblem part_of(const SlotLoopProblem& p, int64_t begin, int64_t count) {
  SlotLoopProblem part = p;
  part.batch = count;
  part.x = advanced(p.x, begin * p.x_stride, bytes_of(p.element));
  part.mask = advanced(p.mask, begin * p.mask_stride, bytes_of(p.element));
  return part;
}

int64_t elements_together(const SlotLoopProblem& p, int threads) {
  const int64_t slots = p.groups * p.slots, unit = row_step / std::gcd(row_step, slots);
  const int64_t units = (threads * rows_in_cache + unit * slots - 1) / (unit * slots);
  return p.batch < units * unit ? p.batch : units * unit;
}

SlotLoopKept kept_from(const SlotLoopProblem& p, const SlotLoopKept& kept, int64_t row) {
  const int64_t size = arithmetic_bytes_of(p.element);
  return {advanced(kept.slots, row * p.width, size), advanced(kept.means, row * p.input_width, size),
          advanced(kept.mass, row, size), advanced(kept.gates, row * 4 * p.width, size)};
}

void slot_loop_forward(const SlotLoopProblem& p, const SlotLoopForward& f, int threads) {
  if (p.batch == 0) return;
  const SlotRowsKernels& table = kernels<SlotRowsKernels>();
  const SlotAttentionKernels& attention = kernels<SlotAttentionKernels>();
  Plan plan = plan_rows(p, false);
  const int64_t size = arithmetic_bytes_of(p.element), slots = p.groups * p.slots;
  const int64_t together = elements_together(p, threads), rows = together * slots;
  plan.rows.rows = rows;
  Parts parts;
  const int64_t packed = parts.take(plan.packed * size);
  const int64_t query = parts.take(rows * p.input_width * size), constant = parts.take(rows * size);
  const int64_t means = parts.take(rows * p.input_width * size), mass = parts.take(rows * size);
  const int64_t passing[2] = {parts.take(rows * p.width * size), parts.take(rows * p.width * size)};
  const int64_t rest = parts.take(
      std::max(table.workspace(plan.rows, threads),
               attention.workspace(core(part_of(p, 0, together), nullptr, nullptr, f.mean, f.inverse), threads)));
  const Workspace workspace(parts.used());
  const auto at = [&](int64_t place) { return static_cast<char*>(workspace.data()) + place; };

  table.pack(p.element, plan.matrices.data(), static_cast<int64_t>(plan.matrices.size()), at(packed), plan.rows.tiles,
             threads);
  plan.rows.packed = at(packed);
  for (int64_t begin = 0; begin < p.batch; begin += together) {
    const SlotLoopProblem part = part_of(p, begin, p.batch - begin < together ? p.batch - begin : together);
    const int64_t row = begin * slots;
    plan.rows.rows = part.rows();
    void* const mean = advanced(f.mean, begin * p.positions, size);
    void* const inverse = advanced(f.inverse, begin * p.positions, size);
    if (mean && !f.measured) table.statistics(part, f.x_eps, mean, inverse, threads);
    const auto kept = [&](int64_t iteration) {
      return iteration >= f.kept_from && iteration < f.iterations ? kept_from(p, f.kept[iteration - f.kept_from], row)
                                                                  : SlotLoopKept{};
    };
    const void* from = advanced(f.initial, begin * f.initial_stride, size);
    void* start = kept(0).slots;
    if (!start && f.initial_stride != slots * p.width) start = at(passing[1]);
    if (start) {
      for (int64_t k = 0; k < part.batch; ++k)
        std::memcpy(advanced(start, k * slots * p.width, size), advanced(from, k * f.initial_stride, size),
                    static_cast<size_t>(slots * p.width * size));
      from = start;
    }
    table.advance(plan.rows, nullptr, from, nullptr, at(query), at(constant), at(rest), threads);
    for (int64_t iteration = 0; iteration < f.iterations; ++iteration) {
      SlotLoopKept now = kept(iteration);
      if (!now.slots) now = {const_cast<void*>(from), at(means), at(mass), nullptr};
      const bool last = iteration + 1 == f.iterations;
      void* const logits = f.logits ? advanced(f.logits[iteration], row * p.positions, bytes_of(p.element)) : nullptr;
      attention.forward(core(part, at(query), at(constant), mean, inverse), {now.means, logits, now.mass}, at(rest),
                        threads);
      void* to = last ? advanced(f.slots, row * p.width, size) : kept(iteration + 1).slots;
      if (!to) to = at(passing[iteration % 2]);
      table.advance(plan.rows, &now, from, to, last ? nullptr : at(query), at(constant), at(rest), threads);
      from = to;
    }
  }
}

}  // namespace objslot
