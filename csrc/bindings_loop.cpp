// Names, checks and casts for all iterations of slot attention.
#include <vector>

#include "bindings.h"
#include "objslot/slot_loop.h"

namespace py = pybind11;
using objslot::pointer;

namespace {

using Address = std::uintptr_t;

objslot::SlotLoopKept kept(const std::array<Address, 4>& a) {
  return {pointer<char>("slots", a[0]), pointer<char>("means", a[1]), pointer<char>("mass", a[2]),
          pointer<char>("gates", a[3], false)};
}

}  // namespace

void objslot::bind_slot_loop(py::module_& module) {
  py::class_<SlotLoopProblem>(module, "SlotLoopProblem")
      .def(py::init([](int type, std::array<int64_t, 7> sizes, Address x, std::array<int64_t, 2> x_strides, Address mask,
                       int64_t mask_stride, std::array<double, 4> numbers, std::array<Address, 16> layers) {
        const auto [batch, groups, slots, positions, width, input_width, hidden] = sizes;
        if (batch < 0 || groups < 1 || slots < 1 || positions < 0 || width < 1 || input_width < 1 || hidden < 1)
          throw std::invalid_argument("SlotLoopProblem: sizes out of range");
        if (element(type) != Element::float32 && element(type) != Element::float64)
          throw std::invalid_argument("SlotLoopProblem: expected float32 or float64");
        SlotLoopProblem p{element(type), batch, groups, slots, positions, width, input_width, hidden,
                          pointer<const char>("x", x, batch * positions > 0), x_strides[0], x_strides[1],
                          pointer<const char>("mask", mask, false), mask_stride, numbers[0], numbers[1], numbers[2],
                          numbers[3], {}};
        // Which may be missing: biases of the projections and of the gates, and the gates.
        constexpr bool needed[16] = {true, false, true, false, true, true, true, true,
                                     false, false, false, false, true, true, true, true};
        const void** layer = reinterpret_cast<const void**>(&p.layers);
        static_assert(sizeof(SlotLayers) == 16 * sizeof(void*));
        for (int k = 0; k < 16; ++k) layer[k] = pointer<const char>("layers", layers[k], needed[k]);
        return p;
      }));
  module.def(
      "slot_loop_forward",
      [](const SlotLoopProblem& p, Address initial, int64_t iterations, int64_t kept_from,
         const std::vector<std::array<Address, 4>>& given, std::array<Address, 2> statistics, double x_eps,
         const std::vector<Address>& logits, Address slots, int threads) {
        if (p.batch == 0) return;
        if (iterations < 1 || kept_from < 0 || kept_from + static_cast<int64_t>(given.size()) < iterations)
          throw std::invalid_argument("slot_loop_forward: iterations out of range");
        if (static_cast<int64_t>(logits.size()) != iterations)
          throw std::invalid_argument("slot_loop_forward: expected the logits of every iteration");
        std::vector<SlotLoopKept> keep;
        for (const auto& one : given) keep.push_back(kept(one));
        std::vector<void*> targets;
        for (Address one : logits) targets.push_back(pointer<char>("logits", one, false));
        slot_loop_forward(p,
                          {pointer<const char>("initial", initial), iterations, kept_from, keep.data(),
                           pointer<char>("mean", statistics[0], p.positions > 0),
                           pointer<char>("inverse", statistics[1], p.positions > 0), x_eps, targets.data(),
                           pointer<char>("slots", slots)},
                          threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def("slot_loop_packed_size", &slot_loop_packed_size);
  module.def(
      "slot_loop_backward",
      [](const SlotLoopProblem& p, Address packed, bool pack, std::array<Address, 4> one,
         std::array<Address, 2> statistics, std::array<Address, 2> upper, Address grad_start, Address grad_x,
         bool add_to_x, bool finish_x, Address grad_mask, bool add_to_mask, std::array<Address, 9> matrices,
         std::array<Address, 9> sums, int threads) {
        if (p.batch == 0) return;
        if (grad_mask && !p.mask) throw std::invalid_argument("grad_mask: wanted without a mask");
        SlotLoopBackward b{};
        b.packed = pointer<char>("packed", packed);
        b.pack = pack;
        b.kept = kept(one);
        b.mean = pointer<const char>("mean", statistics[0], p.positions > 0);
        b.inverse = pointer<const char>("inverse", statistics[1], p.positions > 0);
        b.grad_slots = pointer<const char>("grad_slots", upper[0]);
        b.grad_logits = pointer<const char>("grad_logits", upper[1], false);
        b.grad_start = pointer<char>("grad_start", grad_start);
        b.grad_x = pointer<char>("grad_x", grad_x, false);
        b.add_to_x = add_to_x;
        b.finish_x = finish_x;
        b.grad_mask = pointer<char>("grad_mask", grad_mask, false);
        b.add_to_mask = add_to_mask;
        void** const matrix[9] = {&b.normed_slots, &b.grad_query, &b.grad_constant, &b.updates, &b.grad_updates,
                                  &b.grad_gates, &b.normed_mlp, &b.hidden, &b.grad_hidden};
        const bool gated = p.layers.input_gates != nullptr;
        for (int k = 0; k < 9; ++k) *matrix[k] = pointer<char>("matrices", matrices[k], gated || k != 5);
        void** const sum[9] = {&b.norm_slots, &b.norm_slots_bias, &b.norm_mlp, &b.norm_mlp_bias, &b.query_bias,
                               &b.value_bias, &b.gates_bias, &b.mlp_in_bias, &b.mlp_out_bias};
        for (int k = 0; k < 9; ++k) *sum[k] = pointer<char>("sums", sums[k], false);
        slot_loop_backward(p, b, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
