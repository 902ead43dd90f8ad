// Names, checks and casts for all iterations of slot attention.
#include <vector>

#include "bindings.h"
#include "objslot/slot_loop.h"
#include "objslot/transport.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// Addresses of the elements of one problem.
struct LoopMemory {
  const objslot::SlotLoopProblem& problem;
  int64_t bytes = objslot::arithmetic_bytes_of(problem.element);
  bool some = problem.positions > 0;

  char* at(const char* name, Address address, bool required = true) const {
    return objslot::elements(name, address, bytes, required);
  }
  objslot::SlotLoopKept kept(const std::array<Address, 4>& a) const {
    return {at("slots", a[0]), at("means", a[1]), at("mass", a[2]),
            at("gates", a[3], problem.layers.input_gates != nullptr)};
  }
};

// Every matrix that the kernels read, write or make is one that an address can hold the end of.
void check_sizes(int64_t bytes, const std::array<int64_t, 7>& sizes) {
  const auto [batch, groups, slots, positions, width, input_width, hidden] = sizes;
  for (const int64_t size : {width, input_width, hidden}) objslot::check_dense("layers", 0, bytes, {size, 64});
  objslot::check_dense("logits", 0, bytes, {batch, groups, slots, positions});
  objslot::check_dense("statistics", 0, bytes, {batch, positions});
  // The widest row is that of the gates; packed layers are padded to whole vectors.
  const int64_t widest = 4 * width + input_width + hidden + 32;
  objslot::check_dense("slots", 0, bytes, {batch, groups, slots, widest});
  objslot::check_dense("packed", 0, bytes, {32, width, 2 * widest});
}

}  // namespace

void objslot::bind_slot_loop(py::module_& module) {
  py::class_<SlotLoopProblem>(module, "SlotLoopProblem")
      .def(py::init([](int type, std::array<int64_t, 7> sizes, Address x, std::array<int64_t, 2> x_strides,
                       Address mask, int64_t mask_stride, std::array<double, 4> numbers,
                       std::array<Address, 16> layers) {
        const auto [batch, groups, slots, positions, width, input_width, hidden] = sizes;
        if (batch < 0 || groups < 1 || slots < 1 || positions < 0 || width < 1 || input_width < 1 || hidden < 1)
          throw std::invalid_argument("SlotLoopProblem: sizes out of range");
        if (element(type) == Element::float16 || (element(type) == Element::bfloat16 && !multiplies_on_tiles()))
          throw std::invalid_argument("SlotLoopProblem: expected float32, float64, or bfloat16 where there are tiles");
        const int64_t bytes = objslot::bytes_of(element(type));
        check_sizes(arithmetic_bytes_of(element(type)), sizes);
        objslot::check_span("x", x, bytes, {{batch, x_strides[0]}, {positions, x_strides[1]}, {input_width, 1}});
        objslot::check_span("mask", mask, bytes, {{batch, mask_stride}, {groups * positions, 1}});
        if ((layers[8] == 0) != (layers[9] == 0))
          throw std::invalid_argument("layers: expected the gates of both the input and the slots, or neither");
        SlotLoopProblem p{element(type), batch,        groups,
                          slots,         positions,    width,
                          input_width,   hidden,       objslot::elements("x", x, bytes, batch > 0 && positions > 0),
                          x_strides[0],  x_strides[1], objslot::elements("mask", mask, bytes, false),
                          mask_stride,   numbers[0],   numbers[1],
                          numbers[2],    numbers[3],   {}};
        // Which may be missing: biases of the projections and of the gates, and the gates.
        constexpr bool needed[16] = {true,  false, true,  false, true, true, true, true,
                                     false, false, false, false, true, true, true, true};
        const void** layer = reinterpret_cast<const void**>(&p.layers);
        static_assert(sizeof(SlotLayers) == 16 * sizeof(void*));
        constexpr bool matrix[16] = {true, false, true,  false, false, false, false, false,
                                     true, true,  false, false, true,  false, true,  false};
        for (int k = 0; k < 16; ++k)
          layer[k] = objslot::elements("layers", layers[k],
                                       matrix[k] ? bytes : objslot::arithmetic_bytes_of(element(type)), needed[k]);
        return p;
      }));
  module.def(
      "slot_loop_forward",
      [](const SlotLoopProblem& p, Address initial, int64_t initial_stride, int64_t iterations, int64_t kept_from,
         const std::vector<std::array<Address, 4>>& given, std::array<Address, 2> statistics, bool measured,
         double x_eps, const std::vector<Address>& logits, Address slots, int threads) {
        if (p.batch == 0) return;
        if (iterations < 1 || kept_from < 0 || kept_from > iterations ||
            static_cast<int64_t>(given.size()) < iterations - kept_from)
          throw std::invalid_argument("slot_loop_forward: iterations out of range");
        const bool half = p.element == Element::bfloat16;
        if (half && !given.empty()) throw std::invalid_argument("slot_loop_forward: bfloat16 keeps nothing");
        if (static_cast<int64_t>(logits.size()) != iterations)
          throw std::invalid_argument("slot_loop_forward: expected the logits of every iteration");
        const LoopMemory memory{p};
        objslot::check_span("initial", initial, memory.bytes,
                            {{p.batch, initial_stride}, {p.groups * p.slots * p.width, 1}});
        std::vector<SlotLoopKept> keep;
        keep.reserve(given.size());
        for (const auto& one : given) keep.push_back(memory.kept(one));
        std::vector<void*> targets;
        targets.reserve(logits.size());
        for (Address one : logits)
          targets.push_back(objslot::elements("logits", one, objslot::bytes_of(p.element), false));
        slot_loop_forward(p,
                          {memory.at("initial", initial), initial_stride, iterations, kept_from, keep.data(),
                           memory.at("mean", statistics[0], memory.some && !half),
                           memory.at("inverse", statistics[1], memory.some && !half), measured, x_eps, targets.data(),
                           memory.at("slots", slots)},
                          objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "slot_loop_backward",
      [](const SlotLoopProblem& p, const std::vector<std::array<Address, 4>>& given, std::array<Address, 2> statistics,
         std::array<Address, 2> upper, Address grad_initial, Address grad_x, bool add_to_x, bool finish_x,
         Address grad_mask, std::array<Address, 16> layers, int threads) {
        if (given.empty()) throw std::invalid_argument("slot_loop_backward: expected what an iteration kept");
        if (p.element == Element::bfloat16) throw std::invalid_argument("slot_loop_backward: not in bfloat16");
        if (grad_mask && !p.mask) throw std::invalid_argument("grad_mask: wanted without a mask");
        const bool gated = p.layers.input_gates != nullptr, some = p.batch > 0;
        for (int k = 8; k < 12; ++k)
          if (layers[k] && !gated) throw std::invalid_argument("layers: wanted of gates that are not there");
        const LoopMemory memory{p};
        std::vector<SlotLoopKept> keep;
        keep.reserve(given.size());
        for (const auto& one : given) keep.push_back(some ? memory.kept(one) : SlotLoopKept{});
        SlotLoopBackward b{static_cast<int64_t>(keep.size()),
                           keep.data(),
                           memory.at("mean", statistics[0], some && memory.some),
                           memory.at("inverse", statistics[1], some && memory.some),
                           memory.at("grad_slots", upper[0], false),
                           memory.at("grad_logits", upper[1], false),
                           memory.at("grad_initial", grad_initial, some),
                           memory.at("grad_x", grad_x, false),
                           add_to_x,
                           finish_x,
                           memory.at("grad_mask", grad_mask, false),
                           {}};
        void** const layer = reinterpret_cast<void**>(&b.layers);
        static_assert(sizeof(SlotLayerGradients) == 16 * sizeof(void*));
        for (int k = 0; k < 16; ++k) layer[k] = memory.at("layers", layers[k], false);
        slot_loop_backward(p, b, objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}
