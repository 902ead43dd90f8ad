// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "objslot/sinkhorn.h"

namespace objslot {

// The typed pointer behind an address; null where `required` is false and the address is 0.
template <class T>
T* pointer(const char* name, std::uintptr_t address, bool required = true) {
  if (address % alignof(T) != 0 || (required && address == 0))
    throw std::invalid_argument(std::string(name) + ": expected the address of aligned memory, got " +
                                std::to_string(address));
  return reinterpret_cast<T*>(address);
}

inline Element element(int index) {
  if (index < 0 || index > 3) throw std::invalid_argument("element: expected 0 to 3, got " + std::to_string(index));
  return static_cast<Element>(index);
}

void bind_slot_attention(pybind11::module_& module);
void bind_assign(pybind11::module_& module);
void bind_propagate(pybind11::module_& module);

}  // namespace objslot
