// Sinkhorn transport between pairs of frames.
#include "bindings.h"
#include "objslot/alignment.h"
#include "objslot/transport.h"

namespace py = pybind11;

namespace objslot {

namespace {

using Address = std::uintptr_t;

TransportProblem transport_problem(std::array<Address, 3> tensors, std::array<int64_t, 3> strides, int type,
                                   std::array<Address, 3> masses, std::array<int64_t, 3> mass_strides,
                                   std::array<int64_t, 5> sizes, bool cosine, double shortest, double eps,
                                   int64_t n_iters, double tol) {
  const auto [batch, n, m, features, channels] = sizes;
  if (batch < 0 || n < 1 || m < 1 || features < 1 || channels < 0 || n_iters < 1)
    throw std::invalid_argument("transport: sizes out of range");
  const int64_t bytes = bytes_of(element(type)), arithmetic = arithmetic_bytes_of(element(type));
  const int64_t rows[] = {n, m, m}, widths[] = {features, features, channels}, lengths[] = {n, m, m};
  const char *names[] = {"x", "y", "values"}, *mass_names[] = {"a", "b", "start"};
  for (int k = 0; k < 3; ++k) {
    check_span(names[k], tensors[k], bytes, {{batch, strides[k]}, {rows[k], widths[k]}, {widths[k], 1}});
    check_span(mass_names[k], masses[k], arithmetic, {{batch, mass_strides[k]}, {lengths[k], 1}});
  }
  const auto tensor = [&](int k, bool some) { return elements(names[k], tensors[k], bytes, some); };
  const auto mass = [&](int k) { return elements(mass_names[k], masses[k], arithmetic, false); };
  const bool some = batch > 0;
  return {element(type),
          element(type),
          tensor(0, some),
          strides[0],
          tensor(1, some),
          strides[1],
          tensor(2, some && channels > 0),
          strides[2],
          mass(0),
          mass_strides[0],
          mass(1),
          mass_strides[1],
          mass(2),
          mass_strides[2],
          batch,
          n,
          m,
          features,
          channels,
          cosine,
          shortest,
          eps,
          n_iters,
          tol};
}

}  // namespace

void bind_transport(py::module_& module) {
  py::class_<TransportProblem>(module, "TransportProblem").def(py::init(&transport_problem));
  module.def(
      "transport_forward",
      [](const TransportProblem& p, Address out, Address error, int threads) {
        const int64_t bytes = bytes_of(p.element), arithmetic = arithmetic_bytes_of(p.element);
        check_dense("out", out, bytes, {p.batch, p.n, p.channels});
        check_dense("error", error, arithmetic, {p.batch});
        transport_forward(
            p,
            {elements("out", out, bytes, p.batch > 0 && p.channels > 0), elements("error", error, arithmetic, false)},
            checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "transport_backward",
      [](const TransportProblem& p, Address grad, std::array<Address, 5> grads, int threads) {
        const int64_t bytes = bytes_of(p.element), arithmetic = arithmetic_bytes_of(p.element);
        const bool some = p.batch > 0, moved = some && p.channels > 0;
        check_dense("grad", grad, bytes, {p.batch, p.n, p.channels});
        check_dense("grad_x", grads[0], bytes, {p.batch, p.n, p.features});
        check_dense("grad_y", grads[1], bytes, {p.batch, p.m, p.features});
        check_dense("grad_values", grads[2], bytes, {p.batch, p.m, p.channels});
        check_dense("grad_a", grads[3], arithmetic, {p.batch, p.n});
        check_dense("grad_b", grads[4], arithmetic, {p.batch, p.m});
        transport_backward(
            p,
            {elements("grad", grad, bytes, moved), elements("grad_x", grads[0], bytes, some),
             elements("grad_y", grads[1], bytes, some), elements("grad_values", grads[2], bytes, moved),
             elements("grad_a", grads[3], arithmetic, false), elements("grad_b", grads[4], arithmetic, false)},
            checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
  module.def("multiplies_on_tiles", &multiplies_on_tiles, "Whether products of transport use AMX tiles.");
  module.def(
      "align_frames",
      [](Address tokens, int type, Address values, Address masses, std::array<int64_t, 5> sizes, bool cosine,
         double shortest, double eps, int64_t n_iters, Address out, int threads) {
        const auto [clips, frames, n, features, channels] = sizes;
        if (clips < 0 || frames < 1 || n < 1 || features < 1 || channels < 0 || n_iters < 1)
          throw std::invalid_argument("align_frames: sizes out of range");
        const int64_t bytes = bytes_of(element(type)), arithmetic = arithmetic_bytes_of(element(type));
        check_dense("tokens", tokens, bytes, {clips, frames, n, features});
        check_dense("values", values, arithmetic, {clips, frames, n, channels});
        check_dense("masses", masses, arithmetic, {clips, frames, n});
        check_dense("out", out, arithmetic, {clips, frames, n, channels});
        const bool some = clips > 0, moved = some && channels > 0;
        const AlignmentProblem problem{element(type),
                                       elements("tokens", tokens, bytes, some),
                                       elements("values", values, arithmetic, moved),
                                       elements("masses", masses, arithmetic, false),
                                       clips,
                                       frames,
                                       n,
                                       features,
                                       channels,
                                       cosine,
                                       shortest,
                                       eps,
                                       n_iters};
        align_frames(problem, elements("out", out, arithmetic, moved), checked_threads(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace objslot
