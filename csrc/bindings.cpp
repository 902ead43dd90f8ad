// The module objslot._native: one bind_<op> for each op, nothing but names, checks and casts.
//
// Tensors arrive as addresses, sizes and strides in elements, so that no torch header is needed. The Python side
// owns the memory and has checked shapes and types; what could still crash the process is checked again here.
#include "bindings.h"
#include "objslot/dispatch.h"
#include "objslot/sinkhorn.h"

namespace py = pybind11;
using objslot::element;
using objslot::pointer;

namespace {

void bind_dispatch(py::module_& module) {
  module.def("isa", [] { return objslot::name(objslot::active_isa()); }, "The instruction set in use.");
  module.def("best_isa", [] { return objslot::name(objslot::best_isa()); },
             "The best instruction set this processor and this build offer.");
}

// ---- sinkhorn ----

objslot::SinkhornHistory history(std::uintptr_t f, std::uintptr_t g, std::uintptr_t count) {
  return {pointer<float>("history_f", f, false), pointer<float>("history_g", g, false),
          pointer<int64_t>("count", count, false)};
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
      [](const SinkhornProblem& problem, Address plan, Address f, Address g, Address error, Address history_f,
         Address history_g, Address count, int threads) {
        objslot::sinkhorn_forward(
            problem,
            {pointer<char>("plan", plan, false), pointer<float>("f", f, false), pointer<float>("g", g, false),
             pointer<float>("error", error, false), history(history_f, history_g, count)},
            threads);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "sinkhorn_backward",
      [](const SinkhornProblem& problem, Address grad_plan, int64_t grad_batch_stride, int64_t grad_row_stride,
         Address grad_f, Address grad_g, Address plan, Address history_f, Address history_g, Address count,
         Address grad_scores, Address grad_a, Address grad_b, int threads) {
        const bool some = problem.batch > 0;
        pointer<const float>("history_f", history_f, some);
        pointer<const float>("history_g", history_g, some);
        pointer<const int64_t>("count", count, some);
        objslot::sinkhorn_backward(
            problem,
            {pointer<const char>("grad_plan", grad_plan, false), grad_batch_stride, grad_row_stride,
             pointer<const float>("grad_f", grad_f, false), pointer<const float>("grad_g", grad_g, false),
             pointer<const char>("plan", plan, false), history(history_f, history_g, count),
             pointer<char>("grad_scores", grad_scores, some), pointer<float>("grad_a", grad_a, false),
             pointer<float>("grad_b", grad_b, false)},
            threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of objslot. Import torch first: its OpenMP runtime is shared.";
  bind_dispatch(module);
  bind_sinkhorn(module);
  objslot::bind_slot_attention(module);
  objslot::bind_assign(module);
  objslot::bind_propagate(module);
}
