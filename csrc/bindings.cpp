// The module objslot._native: one bind_<op> for each op, nothing but names, checks and casts.
//
// Tensors arrive as addresses, sizes and strides in elements, so that no torch header is needed. The Python side
// owns the memory and has checked shapes and types; what could still crash the process is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "objslot/assign.h"
#include "objslot/dispatch.h"
#include "objslot/sinkhorn.h"
#include "objslot/slot_attention.h"

namespace py = pybind11;

namespace {

// The typed pointer behind an address; null where `required` is false and the address is 0.
template <class T>
[[maybe_unused]] T* pointer(const char* name, std::uintptr_t address, bool required = true) {
  if (address % alignof(T) != 0 || (required && address == 0))
    throw std::invalid_argument(std::string(name) + ": expected the address of aligned memory, got " +
                                std::to_string(address));
  return reinterpret_cast<T*>(address);
}

void bind_dispatch(py::module_& module) {
  module.def("isa", [] { return objslot::name(objslot::active_isa()); }, "The instruction set in use.");
  module.def("best_isa", [] { return objslot::name(objslot::best_isa()); },
             "The best instruction set this processor and this build offer.");
}

// ---- sinkhorn ----

objslot::Element element(int index) {
  if (index < 0 || index > 3) throw std::invalid_argument("element: expected 0 to 3, got " + std::to_string(index));
  return static_cast<objslot::Element>(index);
}

void bind_sinkhorn(py::module_& module) {
  using Address = std::uintptr_t;
  using objslot::SinkhornProblem;
  py::class_<SinkhornProblem>(module, "SinkhornProblem")
      .def(py::init([](Address scores, int type, std::array<int64_t, 5> layout, Address a, int64_t a_stride, Address b,
                       int64_t b_stride, double eps, int64_t n_iters, double tol) {
        const auto [batch, n, m, batch_stride, row_stride] = layout;
        if (batch < 0 || n < 1 || m < 1 || n_iters < 1) throw std::invalid_argument("SinkhornProblem: sizes out of range");
        return SinkhornProblem{pointer<const char>("scores", scores, batch > 0), element(type), batch, n, m, batch_stride,
                               row_stride, pointer<const float>("a", a, false), a_stride,
                               pointer<const float>("b", b, false), b_stride, eps, n_iters, tol};
      }));
  module.def(
      "sinkhorn_forward",
      [](const SinkhornProblem& problem, Address plan, Address f, Address g, bool history, Address count, Address error,
         int threads) {
        objslot::sinkhorn_forward(problem,
                                  {pointer<char>("plan", plan, false), pointer<float>("f", f, false),
                                   pointer<float>("g", g, false), history, pointer<int64_t>("count", count, false),
                                   pointer<float>("error", error, false)},
                                  threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "sinkhorn_backward",
      [](const SinkhornProblem& problem, Address grad_plan, int64_t grad_batch_stride, int64_t grad_row_stride,
         Address grad_f, Address grad_g, Address plan, Address f, Address g, Address count, Address grad_scores,
         Address grad_a, Address grad_b, int threads) {
        objslot::sinkhorn_backward(
            problem,
            {pointer<const char>("grad_plan", grad_plan, false), grad_batch_stride, grad_row_stride,
             pointer<const float>("grad_f", grad_f, false), pointer<const float>("grad_g", grad_g, false),
             pointer<const char>("plan", plan, false), pointer<const float>("f", f), pointer<const float>("g", g),
             pointer<const int64_t>("count", count, false), pointer<char>("grad_scores", grad_scores),
             pointer<float>("grad_a", grad_a, false), pointer<float>("grad_b", grad_b, false)},
            threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

// ---- slot attention ----

void bind_slot_attention(py::module_& module) {
  using Address = std::uintptr_t;
  using objslot::SlotAttentionProblem;
  using objslot::SlotSoftmaxProblem;
  py::class_<SlotAttentionProblem>(module, "SlotAttentionProblem")
      .def(py::init([](int type, std::array<int64_t, 6> sizes, std::array<Address, 5> tensors,
                       std::array<int64_t, 7> strides, double scale, double eps) {
        const auto [batch, groups, slots, positions, width, value_width] = sizes;
        const auto [q, k, v, mask, bias] = tensors;
        if (batch < 0 || groups < 1 || slots < 1 || positions < 0 || width < 1 || value_width < 1 ||
            (v == 0 && width != value_width))
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

void bind_assign(py::module_& module) {
  module.def(
      "assign",
      [](std::uintptr_t scores, int64_t count, int64_t rows, int64_t columns, std::uintptr_t index, int threads) {
        if (count < 0 || rows < 1 || rows > columns) throw std::invalid_argument("assign: sizes out of range");
        objslot::assign(pointer<const double>("scores", scores, count > 0), count, rows, columns,
                        pointer<int64_t>("index", index, count > 0), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of objslot. Import torch first: its OpenMP runtime is shared.";
  bind_dispatch(module);
  bind_sinkhorn(module);
  bind_slot_attention(module);
  bind_assign(module);
}
