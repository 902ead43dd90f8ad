// Sinkhorn transport of values between two sets of tokens: scores and plan exist for one element of the batch and
// thread at a time.
#pragma once

#include <cstdint>

#include "objslot/sinkhorn.h"

namespace objslot {

// Tokens have one type, values and results one that is computed in the same; marginals and start are of the type that
// is computed in. A stride leads from one element
// of the batch to the next; within one everything is contiguous.
struct TransportProblem {
  Element element, value_element;
  const void* x;  // (batch, n, features)
  int64_t x_stride;
  const void* y;  // (batch, m, features)
  int64_t y_stride;
  const void* values;  // (batch, m, channels)
  int64_t values_stride;
  const void* a;  // as in SinkhornProblem
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  const void* start;
  int64_t start_stride;
  int64_t batch, n, m, features, channels;
  bool cosine;      // scores are cosines, otherwise dot products
  double shortest;  // tokens shorter than this count as zero
  double eps;
  int64_t n_iters;
  double tol;
};

struct TransportResult {
  void* out;    // (batch, n, channels)
  void* error;  // (batch) or null
};

struct TransportGradient {
  const void* grad;  // (batch, n, channels)
  void* x;
  void* y;
  void* values;
  void* a;  // (batch, n) or null
  void* b;
};

// The kernels of Sinkhorn that run on one element.
struct SinkhornTables {
  const SinkhornKernels& forward;
  const SinkhornBackwardKernels& backward;
};

// `tiles`: whether products may use them.
struct TransportKernels {
  int64_t (*workspace)(const TransportProblem&, const SinkhornTables&, bool tiles, int threads);
  void (*run)(const TransportProblem&, const TransportResult&, const SinkhornTables&, bool tiles, void* workspace,
              int threads);
};

struct TransportBackwardKernels {
  int64_t (*workspace)(const TransportProblem&, const SinkhornTables&, bool tiles, int threads);
  void (*run)(const TransportProblem&, const TransportGradient&, const SinkhornTables&, bool tiles, void* workspace,
              int threads);
};

// Whether products of float32 and the half types use tiles.
bool multiplies_on_tiles();

void transport_forward(const TransportProblem&, const TransportResult&, int threads);
void transport_backward(const TransportProblem&, const TransportGradient&, int threads);

}  // namespace objslot
