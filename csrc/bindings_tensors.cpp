// What every call asks about tensors: the memory of large results, and whether the kernels may be called at once.
//
// A small kernel takes less time than the interpreter does to find this out, once the kernels of others have driven
// its code out of the caches.
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "bindings.h"
#include "objslot/workspace.h"

namespace py = pybind11;

namespace objslot {

namespace {

// The structures of a DLPack capsule, dlpack.h version 1: how libraries hand tensors to each other.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
constexpr int32_t cpu_device = 1;
constexpr uint8_t float_type = 2, bfloat_type = 4;
constexpr const char* unused_capsule = "dltensor";

// A contiguous tensor on memory of `take_result`.
struct Result {
  DlManagedTensor managed;
  int64_t bytes;
  int64_t layout[2 * 64];
};
static_assert(offsetof(Result, managed) == 0, "the deleter gets the first member");

void give_back(DlManagedTensor* managed) {
  Result* const result = reinterpret_cast<Result*>(managed);
  give_result(managed->tensor.data, result->bytes);
  delete result;
}

void forget(PyObject* capsule) {
  // Whoever takes the tensor renames the capsule.
  if (!PyCapsule_IsValid(capsule, unused_capsule)) return;
  auto* const managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, unused_capsule));
  managed->deleter(managed);
}

py::object result(const py::tuple& sizes, int type) {
  const int64_t size = bytes_of(element(type));
  const auto dimensions = static_cast<int32_t>(sizes.size());
  if (dimensions > 64) throw std::invalid_argument("result: expected at most 64 dimensions");
  auto held = std::make_unique<Result>();
  DlTensor& tensor = held->managed.tensor;
  int64_t* const shape = held->layout;
  int64_t* const strides = shape + 64;
  int64_t count = 1;
  for (int32_t k = dimensions - 1; k >= 0; --k) {
    shape[k] = py::cast<int64_t>(sizes[k]);
    strides[k] = count;
    if (shape[k] < 1 || __builtin_mul_overflow(count, shape[k], &count) || count > end_of_memory / size)
      throw std::invalid_argument("result: sizes out of range");
  }
  held->bytes = count * size;
  tensor = {take_result(held->bytes),
            cpu_device,
            0,
            dimensions,
            element(type) == Element::bfloat16 ? bfloat_type : float_type,
            static_cast<uint8_t>(8 * size),
            1,
            shape,
            strides,
            0};
  held->managed.context = nullptr;
  held->managed.deleter = give_back;
  // From here on the capsule owns it.
  auto* const managed = &held.release()->managed;
  PyObject* const capsule = PyCapsule_New(managed, unused_capsule, forget);
  if (!capsule) {
    give_back(managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

// What `plain` looks at: kept for as long as the process lives.
struct Plain {
  std::vector<py::object> types, questions;
  py::object is_cpu, backend;
};
const Plain* asked = nullptr;

bool truth(PyObject* value) {
  const int found = value ? PyObject_IsTrue(value) : -1;
  Py_XDECREF(value);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

bool plain(const py::args& tensors) {
  if (!asked) throw std::invalid_argument("plain: expected watch_for before it");
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    bool known = false;
    for (const py::object& type : asked->types)
      known = known || reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == type.ptr();
    if (!known || !truth(PyObject_GetAttr(tensor.ptr(), asked->is_cpu.ptr()))) return false;
  }
  for (const py::object& question : asked->questions)
    if (truth(PyObject_CallNoArgs(question.ptr()))) return false;
  PyObject* backend = nullptr;
  if (PyContextVar_Get(asked->backend.ptr(), Py_None, &backend) < 0) throw py::error_already_set();
  if (truth(backend)) return false;
  const char* const named = std::getenv("OBJSLOT_BACKEND");
  return !named || !*named;
}

}  // namespace

void bind_tensors(py::module_& module) {
  module.def("result", &result, "A DLPack capsule with an uninitialised contiguous tensor on the CPU.");
  module.def("release_results", &release_results, "Hands the kept memory of large results back to the system.");
  module.def(
      "watch_for",
      [](std::vector<py::object> types, std::vector<py::object> questions, py::object backend) {
        // Not changed in place: another thread may be reading the one before.
        asked = new Plain{std::move(types), std::move(questions), py::str("is_cpu"), std::move(backend)};
      },
      "The types of ordinary tensors, functions that tell whether somebody watches, the backend of the context.");
  module.def("plain", &plain, "Whether all are ordinary CPU tensors or None, nobody watches, and no backend is named.");
}

}  // namespace objslot
