// The module objslot._native: one bind_<op> for each op, nothing but names, checks and casts.
//
// Tensors arrive as addresses, sizes and strides in elements, so that no torch header is needed. The Python side
// owns the memory and has checked shapes and types; what could still crash the process is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "objslot/dispatch.h"

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

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of objslot. Import torch first: its OpenMP runtime is shared.";
  bind_dispatch(module);
}
