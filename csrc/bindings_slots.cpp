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
            (v == 0 && batch > 0 && positions > 0 && width != value_width))
          throw std::invalid_argument("SlotAttentionProblem: sizes out of range");
        const int64_t bytes = objslot::bytes_of(element(type));
        const bool some = batch > 0 && positions > 0;
        objslot::check_dense("slots", 0, bytes, {batch, groups, slots, width});
        objslot::check_dense("updates", 0, bytes, {batch, groups, slots, value_width});
        objslot::check_dense("logits", 0, bytes, {batch, groups, slots, positions});
        objslot::check_span("q", q, bytes, {{batch, strides[0]}, {groups * slots * width, 1}});
        objslot::check_span("k", k, bytes, {{batch, strides[1]}, {positions, strides[2]}, {width, 1}});
        objslot::check_span("v", v, bytes, {{batch, strides[3]}, {positions, strides[4]}, {value_width, 1}});
        objslot::check_span("mask", mask, bytes, {{batch, strides[5]}, {groups * positions, 1}});
        objslot::check_span("bias", bias, bytes, {{batch, strides[6]}, {groups * slots, 1}});
        return SlotAttentionProblem{element(type),
                                    batch,
                                    groups,
                                    slots,
                                    positions,
                                    width,
                                    value_width,
                                    objslot::elements("q", q, bytes, batch > 0),
                                    strides[0],
                                    objslot::elements("k", k, bytes, some),
                                    strides[1],
                                    strides[2],
                                    objslot::elements("v", v, bytes, false),
                                    strides[3],
                                    strides[4],
                                    objslot::elements("mask", mask, bytes, false),
                                    strides[5],
                                    objslot::elements("bias", bias, bytes, false),
                                    strides[6],
                                    scale,
                                    eps};
      }))
      .def_property_readonly("lanes", &objslot::slot_attention_lanes);
  const auto probabilities_at = [](const SlotAttentionProblem& problem, Address address) {
    const int64_t bytes = objslot::arithmetic_bytes_of(problem.element);
    objslot::check_dense("probabilities", address, bytes,
                         {problem.batch, problem.positions, objslot::slot_attention_lanes(problem)});
    return objslot::elements("probabilities", address, bytes, false);
  };
  module.def(
      "slot_attention_forward",
      [=](const SlotAttentionProblem& problem, Address updates, Address logits, Address mass, Address probabilities,
          int threads) {
        const bool some = problem.batch > 0;
        const int64_t bytes = objslot::bytes_of(problem.element);
        const int64_t arithmetic = objslot::arithmetic_bytes_of(problem.element);
        objslot::slot_attention_forward(
            problem,
            {objslot::elements("updates", updates, bytes, some), objslot::elements("logits", logits, bytes, false),
             objslot::elements("mass", mass, arithmetic, some), probabilities_at(problem, probabilities)},
            objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "slot_attention_backward",
      [=](const SlotAttentionProblem& problem, std::array<Address, 5> given, std::array<Address, 5> wanted,
          int threads) {
        const bool some = problem.batch > 0;
        if (wanted[3] && !problem.mask) throw std::invalid_argument("grad_mask: wanted without a mask");
        const int64_t bytes = objslot::bytes_of(problem.element);
        const int64_t arithmetic = objslot::arithmetic_bytes_of(problem.element);
        objslot::SlotAttentionGradient gradient{objslot::elements("grad_updates", given[0], bytes, false),
                                                objslot::elements("grad_logits", given[1], bytes, false),
                                                objslot::elements("updates", given[2], bytes, some),
                                                objslot::elements("mass", given[3], arithmetic, some),
                                                objslot::elements("grad_q", wanted[0], bytes, false),
                                                objslot::elements("grad_k", wanted[1], bytes, false),
                                                objslot::elements("grad_v", wanted[2], bytes, false),
                                                objslot::elements("grad_mask", wanted[3], bytes, false),
                                                objslot::elements("grad_bias", wanted[4], bytes, false)};
        gradient.probabilities = probabilities_at(problem, given[4]);
        objslot::slot_attention_backward(problem, gradient, objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<SlotSoftmaxProblem>(module, "SlotSoftmaxProblem")
      .def(py::init(
          [](int type, int64_t count, int64_t slots, int64_t positions, Address logits, Address mask, double eps) {
            if (count < 0 || slots < 1 || positions < 0)
              throw std::invalid_argument("SlotSoftmaxProblem: sizes out of range");
            const int64_t bytes = objslot::bytes_of(element(type));
            objslot::check_dense("logits", logits, bytes, {count, slots, positions});
            objslot::check_dense("mask", mask, bytes, {count, positions});
            return SlotSoftmaxProblem{element(type),
                                      count,
                                      slots,
                                      positions,
                                      objslot::elements("logits", logits, bytes, count > 0 && positions > 0),
                                      objslot::elements("mask", mask, bytes, false),
                                      eps};
          }));
  module.def(
      "slot_softmax_forward",
      [](const SlotSoftmaxProblem& problem, Address weights, Address mass, int threads) {
        const int64_t bytes = objslot::bytes_of(problem.element);
        const int64_t arithmetic = objslot::arithmetic_bytes_of(problem.element);
        const bool some = problem.count > 0 && problem.positions > 0;
        objslot::slot_softmax_forward(problem, objslot::elements("weights", weights, bytes, some),
                                      objslot::elements("mass", mass, arithmetic, problem.count > 0),
                                      objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "slot_softmax_backward",
      [](const SlotSoftmaxProblem& problem, Address grad, Address mass, Address grad_logits, Address grad_mask,
         int threads) {
        const int64_t bytes = objslot::bytes_of(problem.element);
        const int64_t arithmetic = objslot::arithmetic_bytes_of(problem.element);
        const bool some = problem.count > 0 && problem.positions > 0;
        if (grad_mask && !problem.mask) throw std::invalid_argument("grad_mask: wanted without a mask");
        objslot::slot_softmax_backward(problem, objslot::elements("grad", grad, bytes, some),
                                       objslot::elements("mass", mass, arithmetic, problem.count > 0),
                                       objslot::elements("grad_logits", grad_logits, bytes, some),
                                       objslot::elements("grad_mask", grad_mask, bytes, false),
                                       objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}

// ---- assign ----

void objslot::bind_assign(py::module_& module) {
  module.def(
      "assign",
      [](std::uintptr_t scores, int64_t count, int64_t rows, int64_t columns, std::uintptr_t index, int threads) {
        if (count < 0 || rows < 1 || rows > columns) throw std::invalid_argument("assign: sizes out of range");
        objslot::check_dense("scores", scores, 8, {count, rows, columns});
        objslot::check_dense("index", index, 8, {count, rows});
        objslot::assign(pointer<const double>("scores", scores, count > 0), count, rows, columns,
                        pointer<int64_t>("index", index, count > 0), objslot::checked_threads(threads));
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
        const int64_t bytes = objslot::bytes_of(element(types[0])), label_bytes = objslot::bytes_of(element(types[1]));
        objslot::check_dense("query", tensors[0], bytes, {batch, height, width, features});
        objslot::check_dense("keys", tensors[1], bytes, {batch, frames, height, width, features});
        objslot::check_dense("labels", tensors[2], label_bytes, {batch, frames, height, width, classes});
        if (radius > height + width || topk > frames * height * width || n_global < 0 || n_global > frames)
          throw std::invalid_argument("propagate: radius, topk or n_global out of range");
        objslot::propagate(
            {element(types[0]), element(types[1]), batch, frames, height, width, features, classes,
             objslot::elements("query", tensors[0], bytes, some), objslot::elements("keys", tensors[1], bytes, some),
             objslot::elements("labels", tensors[2], label_bytes, some && classes > 0), radius, topk, n_global,
             temperature, /*tiles=*/false},
            objslot::elements("out", tensors[3], label_bytes, some && classes > 0), objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}
