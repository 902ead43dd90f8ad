// Label propagation: the top k cosines of every query position among context frames, softmax, labels mixed.
//
// The arithmetic type is double for float64 features and float otherwise; float64 labels come with float64 features
// alone. Everything is contiguous.
#pragma once

#include <cstdint>

#include "objslot/sinkhorn.h"

namespace objslot {

struct PropagateProblem {
  Element element, label_element;
  int64_t batch, frames, height, width, features, classes;
  const void* query;   // (batch, height, width, features)
  const void* keys;    // (batch, frames, height, width, features)
  const void* labels;  // (batch, frames, height, width, classes)
  int64_t radius, topk, n_global;
  double temperature;
  bool tiles;  // whether AMX tiles may be used
};

struct PropagateKernels {
  // Bytes of memory, aligned to 64, that the call needs to work in.
  int64_t (*workspace)(const PropagateProblem&, int threads);
  void (*run)(const PropagateProblem&, void* out, void* workspace, int threads);
};

// out (batch, height, width, classes), by the kernels of the active instruction set; `tiles` is set here.
void propagate(PropagateProblem, void* out, int threads);

}  // namespace objslot
