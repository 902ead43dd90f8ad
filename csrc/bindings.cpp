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
  module.def(
      "best_isa", [] { return objslot::name(objslot::best_isa()); },
      "The best instruction set this processor and this build offer.");
}

// ---- sinkhorn ----

using Address = std::uintptr_t;
using objslot::SinkhornProblem;

// Contiguous results and gradients: (batch, n, m), (batch, n), (batch, m), histories.
struct SinkhornMemory {
  const SinkhornProblem& problem;
  int64_t bytes = objslot::bytes_of(problem.element), arithmetic = objslot::arithmetic_bytes_of(problem.element);
  bool some = problem.batch > 0;

  char* plans(const char* name, Address address, bool required = false) const {
    objslot::check_dense(name, address, bytes, {problem.batch, problem.n, problem.m});
    return objslot::elements(name, address, bytes, required);
  }
  char* vectors(const char* name, Address address, int64_t size) const {
    objslot::check_dense(name, address, arithmetic, {problem.batch, size});
    return objslot::elements(name, address, arithmetic, false);
  }
  objslot::SinkhornHistory history(Address f, Address g, Address count, bool required) const {
    if ((f == 0) != (g == 0) || (f == 0) != (count == 0))
      throw std::invalid_argument("history: expected f, g and count, or none of them");
    objslot::check_dense("history_f", f, arithmetic, {problem.n_iters, problem.batch, problem.n});
    objslot::check_dense("history_g", g, arithmetic, {problem.n_iters, problem.batch, problem.m});
    return {objslot::elements("history_f", f, arithmetic, required && some),
            objslot::elements("history_g", g, arithmetic, required && some),
            pointer<int64_t>("count", count, required && some)};
  }
};

void bind_sinkhorn(py::module_& module) {
  py::class_<SinkhornProblem>(module, "SinkhornProblem")
      .def(py::init([](Address scores, int type, std::array<int64_t, 5> layout, Address a, int64_t a_stride, Address b,
                       int64_t b_stride, Address start, int64_t start_stride, double eps, int64_t n_iters, double tol) {
        const auto [batch, n, m, batch_stride, row_stride] = layout;
        if (batch < 0 || n < 1 || m < 1 || n_iters < 1)
          throw std::invalid_argument("SinkhornProblem: sizes out of range");
        const int64_t bytes = objslot::bytes_of(element(type)),
                      arithmetic = objslot::arithmetic_bytes_of(element(type));
        objslot::check_span("scores", scores, bytes, {{batch, batch_stride}, {n, row_stride}, {m, 1}});
        objslot::check_span("a", a, arithmetic, {{batch, a_stride}, {n, 1}});
        objslot::check_span("b", b, arithmetic, {{batch, b_stride}, {m, 1}});
        objslot::check_span("start", start, arithmetic, {{batch, start_stride}, {m, 1}});
        return SinkhornProblem{objslot::elements("scores", scores, bytes, batch > 0),
                               element(type),
                               batch,
                               n,
                               m,
                               batch_stride,
                               row_stride,
                               objslot::elements("a", a, arithmetic, false),
                               a_stride,
                               objslot::elements("b", b, arithmetic, false),
                               b_stride,
                               objslot::elements("start", start, arithmetic, false),
                               start_stride,
                               eps,
                               n_iters,
                               tol};
      }));
  module.def(
      "sinkhorn_forward",
      [](const SinkhornProblem& problem, Address plan, Address f, Address g, Address error, Address history_f,
         Address history_g, Address count, int threads) {
        const SinkhornMemory memory{problem};
        if ((f == 0) != (g == 0)) throw std::invalid_argument("f, g: expected both or neither");
        objslot::sinkhorn_forward(
            problem,
            {memory.plans("plan", plan), memory.vectors("f", f, problem.n), memory.vectors("g", g, problem.m),
             memory.vectors("error", error, 1), memory.history(history_f, history_g, count, false)},
            objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "sinkhorn_backward",
      [](const SinkhornProblem& problem, Address grad_plan, int64_t grad_batch_stride, int64_t grad_row_stride,
         Address grad_f, Address grad_g, Address plan, Address history_f, Address history_g, Address count,
         Address grad_scores, Address grad_a, Address grad_b, int threads) {
        const SinkhornMemory memory{problem};
        objslot::check_span("grad_plan", grad_plan, memory.bytes,
                            {{problem.batch, grad_batch_stride}, {problem.n, grad_row_stride}, {problem.m, 1}});
        objslot::sinkhorn_backward(
            problem,
            {objslot::elements("grad_plan", grad_plan, memory.bytes, false), grad_batch_stride, grad_row_stride,
             memory.vectors("grad_f", grad_f, problem.n), memory.vectors("grad_g", grad_g, problem.m),
             memory.plans("plan", plan), memory.history(history_f, history_g, count, true),
             memory.plans("grad_scores", grad_scores, memory.some), memory.vectors("grad_a", grad_a, problem.n),
             memory.vectors("grad_b", grad_b, problem.m)},
            objslot::checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of objslot. Import torch first: its OpenMP runtime is shared.";
  bind_dispatch(module);
  bind_sinkhorn(module);
  objslot::bind_slot_attention(module);
  objslot::bind_slot_loop(module);
  objslot::bind_assign(module);
  objslot::bind_propagate(module);
  objslot::bind_transport(module);
  objslot::bind_tensors(module);
}
