// Names, checks and casts for the ops on slots.
#include "bindings.h"
#include "objslot/assign.h"
#include "objslot/propagate.h"
#include "objslot/slot_attention.h"

namespace py = pybind11;
using objslot::element;
using objslot::pointer;

// ---- slot attention ----

void objslot::bind_slot_attention(py::module_& module) {
  using Address = std::uintptr_t;
  using objslot::SlotAttentionProblem;
  using objslot::SlotSoftmaxProblem;
  py::class_<SlotAttentionProblem>(module, "SlotAttentionProblem")
      .def(py::init([](int type, std::array<int64_t, 6> sizes, std::array<Address, 5> tensors,
                       std::array<int64_t, 7> strides, double scale, double eps) {
        const auto [batch, groups, slots, positions, width, value_width] = sizes;
        const auto [q, k, v, mask, bias] = tensors;
        if (batch < 0 || groups < 1 || slots < 1 || positions < 0 || width < 1 || value_width < 1 ||
            (v == 0 && batch * positions > 0 && width != value_width))
          throw std::invalid_argument("SlotAttentionProblem: sizes out of range");
        return SlotAttentionProblem{element(type), batch, groups, slots, positions, width, value_width,
                                    pointer<const char>("q", q, batch > 0), strides[0],
                                    pointer<const char>("k", k, batch * positions > 0), strides[1], strides[2],
                                    pointer<const char>("v", v, false), strides[3], strides[4],
                                    pointer<const char>("mask", mask, false), strides[5],
                                    pointer<const char>("bias", bias, false), strides[6], scale, eps};
      }));
  module.def(
      "slot_attention_forward",
      [](const SlotAttentionProblem& problem, Address updates, Address logits, Address mass, int threads) {
        const bool some = problem.batch > 0;
        objslot::slot_attention_forward(problem,
                                        {pointer<char>("updates", updates, some), pointer<char>("logits", logits, false),
                                         pointer<float>("mass", mass, some)},
                                        threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "slot_attention_backward",
      [](const SlotAttentionProblem& problem, std::array<Address, 4> given, std::array<Address, 5> wanted,
         int threads) {
        const bool some = problem.batch > 0;
        if (wanted[3] && !problem.mask) throw std::invalid_argument("grad_mask: wanted without a mask");
        objslot::slot_attention_backward(
            problem,
            {pointer<const char>("grad_updates", given[0], false), pointer<const char>("grad_logits", given[1], false),
             pointer<const char>("updates", given[2], some), pointer<const float>("mass", given[3], some),
             pointer<char>("grad_q", wanted[0], false), pointer<char>("grad_k", wanted[1], false),
             pointer<char>("grad_v", wanted[2], false), pointer<char>("grad_mask", wanted[3], false),
             pointer<char>("grad_bias", wanted[4], false)},
            threads);
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<SlotSoftmaxProblem>(module, "SlotSoftmaxProblem")
      .def(py::init([](int type, int64_t count, int64_t slots, int64_t positions, Address logits, Address mask,
                       double eps) {
        if (count < 0 || slots < 1 || positions < 0) throw std::invalid_argument("SlotSoftmaxProblem: sizes out of range");
        return SlotSoftmaxProblem{element(type), count, slots, positions,
                                  pointer<const char>("logits", logits, count * positions > 0),
                                  pointer<const char>("mask", mask, false), eps};
      }));
  module.def(
      "slot_softmax_forward",
      [](const SlotSoftmaxProblem& problem, Address weights, Address mass, int threads) {
        objslot::slot_softmax_forward(problem, pointer<char>("weights", weights, false),
                                      pointer<float>("mass", mass, problem.count > 0), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "slot_softmax_backward",
      [](const SlotSoftmaxProblem& problem, Address grad, Address mass, Address grad_logits, Address grad_mask,
         int threads) {
        objslot::slot_softmax_backward(problem, pointer<const char>("grad", grad, false),
                                       pointer<const float>("mass", mass, problem.count > 0),
                                       pointer<char>("grad_logits", grad_logits, false),
                                       pointer<char>("grad_mask", grad_mask, false), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

// ---- assign ----

void objslot::bind_assign(py::module_& module) {
  module.def(
      "assign",
      [](std::uintptr_t scores, int64_t count, int64_t rows, int64_t columns, std::uintptr_t index, int threads) {
        if (count < 0 || rows < 1 || rows > columns) throw std::invalid_argument("assign: sizes out of range");
        objslot::assign(pointer<const double>("scores", scores, count > 0), count, rows, columns,
                        pointer<int64_t>("index", index, count > 0), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

// ---- propagate ----

void objslot::bind_propagate(py::module_& module) {
  module.def(
      "propagate",
      [](std::array<int, 2> types, std::array<int64_t, 6> sizes, std::array<std::uintptr_t, 4> tensors,
         std::array<int64_t, 3> settings, double temperature, int threads) {
        const auto [batch, frames, height, width, features, classes] = sizes;
        const auto [radius, topk, n_global] = settings;
        if (batch < 0 || frames < 1 || height < 1 || width < 1 || features < 1 || classes < 0 || radius < 1 || topk < 1)
          throw std::invalid_argument("propagate: sizes out of range");
        if ((types[0] == 3) != (types[1] == 3)) throw std::invalid_argument("propagate: float64 with another type");
        const bool some = batch > 0;
        objslot::propagate({element(types[0]), element(types[1]), batch, frames, height, width, features, classes,
                            pointer<const char>("query", tensors[0], some),
                            pointer<const char>("keys", tensors[1], some),
                            pointer<const char>("labels", tensors[2], some && classes > 0), radius, topk, n_global,
                            temperature},
                           pointer<char>("out", tensors[3], some && classes > 0), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
