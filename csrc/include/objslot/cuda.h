// Sinkhorn on NVIDIA GPUs, resident in shared memory: pointers, sizes and a stream; neither Python nor torch.
#pragma once

#include <cstdint>

namespace objslot::cuda {

// The most rows and columns of a matrix.
constexpr int most_side = 256;

enum class Element : int { float16 = 0, bfloat16 = 1, float32 = 2 };

// A batch of matrices of scores (batch, n, m) with any strides, counted in elements. Marginals (batch, n) and
// (batch, m) are float32 with rows of any stride; null stands for 1 / n and 1 / m.
struct Problem {
  const void* scores;
  Element element;
  int64_t batch;
  int n, m;
  int64_t batch_stride, row_stride, column_stride;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  double eps;
  int64_t n_iters;
  double tol;  // below zero: make all iterations
};

// Potentials in base 2 after every iteration: f (n_iters, batch, n), g (n_iters, batch, m), and how many of them
// an element made. All null, or none.
struct History {
  float* f;
  float* g;
  int64_t* count;
};

// What is null is not wanted. The plan is contiguous; f and g are natural logarithms.
struct Result {
  void* plan;
  float* f;
  float* g;
  float* error;
  History history;
};

// grad_plan has strides of its own, in elements, or is null, as may be grad_f and grad_g. `factors` (n_iters,
// batch, n) and `shares` (n_iters, batch, m) are memory to work in. grad_a and grad_b may be null.
struct Gradient {
  const void* grad_plan;
  int64_t grad_batch_stride, grad_row_stride, grad_column_stride;
  const float* grad_f;
  const float* grad_g;
  History history;
  float* factors;
  float* shares;
  void* grad_scores;
  float* grad_a;
  float* grad_b;
};

// Launch on `stream` (a cudaStream_t) of the current device. Returns null, or what CUDA says went wrong.
const char* sinkhorn_forward(const Problem& problem, const Result& result, void* stream);
const char* sinkhorn_backward(const Problem& problem, const Gradient& gradient, void* stream);

}  // namespace objslot::cuda
