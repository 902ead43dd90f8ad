// Sinkhorn's algorithm on a batch of score matrices: forward, and the exact backward of the truncated
// iteration.
//
// The arithmetic type is double for float64 scores and float otherwise. Marginals, potentials and errors have
// the arithmetic type, scores, plans and their gradients the element type. Strides count elements; the last
// dimension is contiguous everywhere, and outputs are contiguous altogether.
#pragma once

#include <cstdint>

namespace objslot {

enum class Element { float16, bfloat16, float32, float64 };

static constexpr int64_t bytes_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

// Bytes of the type that elements are computed in.
static constexpr int64_t arithmetic_bytes_of(Element element) { return element == Element::float64 ? 8 : 4; }

struct SinkhornProblem {
  const void* scores;  // (batch, n, m)
  Element element;
  int64_t batch, n, m, batch_stride, row_stride;
  const void* a;  // (batch, n), null for 1 / n each
  int64_t a_stride;
  const void* b;  // (batch, m), null for 1 / m each
  int64_t b_stride;
  const void* start;  // (batch, m) natural logarithms of the first y, null for y = 1
  int64_t start_stride;
  double eps;
  int64_t n_iters;
  double tol;  // negative: none
};

// What a backward needs of the iterations. Where the scalings stayed in range, f holds the offset of the rows
// (log2) and then x after every iteration, g holds y, and count is positive. Otherwise f holds nothing and
// then the natural logarithms of the scalings, g likewise, and count is negative.
struct SinkhornHistory {
  void* f;         // (1 + n_iters, batch, n) or null
  void* g;         // (n_iters, batch, m) or null
  int64_t* count;  // (batch) or null: iterations made
};

struct SinkhornResult {
  void* plan;   // (batch, n, m) or null
  void* f;      // (batch, n) or null, natural logarithms
  void* g;      // (batch, m) or null
  void* error;  // (batch) or null
  SinkhornHistory history;
};

struct SinkhornGradient {
  const void* grad_plan;  // (batch, n, m) or null
  int64_t grad_batch_stride, grad_row_stride;
  const void* grad_f;  // (batch, n) or null
  const void* grad_g;  // (batch, m) or null
  const void* plan;    // (batch, n, m), null: made anew from the scores
  SinkhornHistory history;
  void* grad_scores;  // (batch, n, m); may be grad_plan where that has the arithmetic type and is contiguous
  void* grad_a;       // (batch, n) or null
  void* grad_b;       // (batch, m) or null
};

struct SinkhornKernels {
  // Bytes of memory, aligned to 64, that the call needs to work in.
  int64_t (*forward_workspace)(const SinkhornProblem&, int threads);
  void (*forward)(const SinkhornProblem&, const SinkhornResult&, void* workspace, int threads);
};

struct SinkhornBackwardKernels {
  int64_t (*workspace)(const SinkhornProblem&, int threads);
  void (*run)(const SinkhornProblem&, const SinkhornGradient&, void* workspace, int threads);
};

void sinkhorn_forward(const SinkhornProblem&, const SinkhornResult&, int threads);
void sinkhorn_backward(const SinkhornProblem&, const SinkhornGradient&, int threads);

}  // namespace objslot
