// The Python module objslot._cuda: addresses, sizes and a stream go in, an exception with CUDA's words comes out.
#include "../bindings.h"
#include "objslot/cuda.h"

namespace py = pybind11;
namespace objslot::cuda {
namespace {

using Address = std::uintptr_t;

Element element_of(int index) {
  if (index < 0 || index > 2) throw std::invalid_argument("element: expected 0 to 2, got " + std::to_string(index));
  return static_cast<Element>(index);
}

void check(const char* what) {
  if (what) throw std::runtime_error(std::string("CUDA: ") + what);
}

History history_of(const std::array<Address, 3>& addresses, bool required) {
  return {pointer<float>("history_f", addresses[0], required), pointer<float>("history_g", addresses[1], required),
          pointer<int64_t>("count", addresses[2], required)};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of objslot. Nothing touches a GPU before the first launch.";
  module.attr("most_side") = most_side;
  py::class_<Problem>(module, "SinkhornProblem")
      .def(py::init([](Address scores, int type, const std::array<int64_t, 6>& layout, Address a, int64_t a_stride,
                       Address b, int64_t b_stride, double eps, int64_t n_iters, double tol) {
        const auto [batch, n, m, batch_stride, row_stride, column_stride] = layout;
        if (batch < 0 || n < 1 || n > most_side || m < 1 || m > most_side || n_iters < 1 || !(eps > 0))
          throw std::invalid_argument("SinkhornProblem: sizes out of range");
        return Problem{pointer<const char>("scores", scores, batch > 0),
                       element_of(type),
                       batch,
                       static_cast<int>(n),
                       static_cast<int>(m),
                       batch_stride,
                       row_stride,
                       column_stride,
                       pointer<const float>("a", a, false),
                       a_stride,
                       pointer<const float>("b", b, false),
                       b_stride,
                       eps,
                       n_iters,
                       tol};
      }));
  module.def("sinkhorn_forward", [](const Problem& problem, Address plan, Address f, Address g, Address error,
                                    const std::array<Address, 3>& history, Address stream) {
    check(sinkhorn_forward(
        problem,
        {pointer<char>("plan", plan, false), pointer<float>("f", f, false), pointer<float>("g", g, false),
         pointer<float>("error", error, false), history_of(history, false)},
        reinterpret_cast<void*>(stream)));
  });
  module.def(
      "sinkhorn_backward", [](const Problem& problem, Address grad_plan, const std::array<int64_t, 3>& grad_strides,
                              Address grad_f, Address grad_g, const std::array<Address, 3>& history, Address factors,
                              Address shares, Address grad_scores, Address grad_a, Address grad_b, Address stream) {
        const bool some = problem.batch > 0;
        check(sinkhorn_backward(
            problem,
            {pointer<const char>("grad_plan", grad_plan, false), grad_strides[0], grad_strides[1], grad_strides[2],
             pointer<const float>("grad_f", grad_f, false), pointer<const float>("grad_g", grad_g, false),
             history_of(history, some), pointer<float>("factors", factors, some),
             pointer<float>("shares", shares, some), pointer<char>("grad_scores", grad_scores, some),
             pointer<float>("grad_a", grad_a, false), pointer<float>("grad_b", grad_b, false)},
            reinterpret_cast<void*>(stream)));
      });
}

}  // namespace objslot::cuda
