// What the files of bindings share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "objslot/sinkhorn.h"

namespace objslot {

// No address of a real process is as high.
constexpr int64_t end_of_memory = int64_t{1} << 56;

inline void check_address(const char* name, std::uintptr_t address, std::uintptr_t alignment, bool required) {
  if (address % alignment != 0 || address >= static_cast<std::uintptr_t>(end_of_memory) || (required && address == 0))
    throw std::invalid_argument(std::string(name) + ": expected the address of aligned memory, got " +
                                std::to_string(address));
}

// The typed pointer behind an address; null where `required` is false and the address is 0.
template <class T>
T* pointer(const char* name, std::uintptr_t address, bool required = true) {
  check_address(name, address, alignof(T), required);
  return reinterpret_cast<T*>(address);
}

// A dimension: its size, and its stride in elements.
struct Dimension {
  int64_t size, stride;
};

// What no dimension of a real tensor is: negative, or so large that an address would not hold its end.
inline void check_span(const char* name, std::uintptr_t address, int64_t bytes,
                       std::initializer_list<Dimension> dimensions) {
  int64_t last = 0;
  bool empty = false, fits = true;
  for (const auto [size, stride] : dimensions) {
    int64_t reach = 0;
    fits = fits && size >= 0 && stride >= 0 && size <= end_of_memory &&
           !__builtin_mul_overflow(size > 0 ? size - 1 : 0, stride, &reach) &&
           !__builtin_add_overflow(last, reach, &last);
    empty = empty || size == 0;
  }
  if (!fits || (!empty && last >= (end_of_memory - static_cast<int64_t>(address % end_of_memory)) / bytes))
    throw std::invalid_argument(std::string(name) + ": sizes or strides out of range");
}

// The same for contiguous memory of these sizes; where one is zero, the product of the others has to fit all the same.
inline void check_dense(const char* name, std::uintptr_t address, int64_t bytes, std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  bool fits = true;
  for (const int64_t size : sizes)
    fits = fits && size >= 0 && !__builtin_mul_overflow(count, size > 0 ? size : 1, &count);
  if (!fits) throw std::invalid_argument(std::string(name) + ": sizes out of range");
  check_span(name, address, bytes, {{count, 1}});
}

// The address of elements, aligned to their size; null where `required` is false and the address is 0.
inline char* elements(const char* name, std::uintptr_t address, int64_t bytes, bool required = true) {
  check_address(name, address, static_cast<std::uintptr_t>(bytes), required);
  return reinterpret_cast<char*>(address);
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  return threads;
}

inline Element element(int index) {
  constexpr Element all[] = {Element::float16, Element::bfloat16, Element::float32, Element::float64};
  if (index < 0 || index > 3) throw std::invalid_argument("element: expected 0 to 3, got " + std::to_string(index));
  return all[index];
}

void bind_slot_attention(pybind11::module_& module);
void bind_slot_loop(pybind11::module_& module);
void bind_assign(pybind11::module_& module);
void bind_propagate(pybind11::module_& module);
void bind_transport(pybind11::module_& module);
void bind_tensors(pybind11::module_& module);

}  // namespace objslot
