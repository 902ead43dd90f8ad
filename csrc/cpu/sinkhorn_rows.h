// Rows of the kernel 2^(scores * scale + offset) and rows of the plan.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

// 2^(row * scale + shift) into padded memory; a vector whose lanes sum to the row, weighted by y where
// there is one. In place too.
template <class T, bool Weighted>
OBJSLOT_INLINE Vec<T> exponentiate_row(const T* row, T scale, T shift, int64_t m, const T* y, T* kernel) {
  const Vec<T> scales = broadcast(scale), shifts = broadcast(shift);
  constexpr int W = width<T>;
  Vec<T> even{}, odd{};
  int64_t j = 0;
  for (; j + 2 * W <= m; j += 2 * W) {
    const Vec<T> first = exp2<T>(fused(load(row + j), scales, shifts));
    const Vec<T> second = exp2<T>(fused(load(row + j + W), scales, shifts));
    store(kernel + j, first);
    store(kernel + j + W, second);
    even = Weighted ? fused(first, load(y + j), even) : even + first;
    odd = Weighted ? fused(second, load(y + j + W), odd) : odd + second;
  }
  for (; j < m; j += W) {
    const int64_t left = m - j;
    Vec<T> value = exp2<T>(fused(load_upto(row + j, left), scales, shifts));
    if (left < W) value = keep_first<T>(value, left);
    store(kernel + j, value);
    even = Weighted ? fused(value, load(y + j), even) : even + value;
  }
  return even + odd;
}

// Calls write(j, count) for a row of m numbers at `target`: whole vectors where count is the width, aligned ones
// where they are to be streamed.
template <class T, class Write>
OBJSLOT_INLINE void for_vectors(const T* target, int64_t m, bool streamed, const Write& write) {
  constexpr int W = width<T>;
  int64_t j = 0;
  if (streamed) {
    const int64_t offset = reinterpret_cast<uintptr_t>(target) % OBJSLOT_VECTOR_BYTES / sizeof(T);
    if (offset) j = W - offset < m ? W - offset : m;
    if (j) write(0, j);
  }
  for (; j + W <= m; j += W) write(j, W);
  if (j < m) write(j, m - j);
}

template <class T>
OBJSLOT_INLINE void put(T* target, Vec<T> value, int64_t count, bool streamed) {
  if (count < width<T>)
    store_first(target, value, count);
  else if (streamed)
    stream(target, value);
  else
    store(target, value);
}

// One row of the plan from the kernel: x * kernel * y.
template <class T>
OBJSLOT_INLINE void scale_row(const T* kernel, T x, const T* y, T* target, int64_t m, bool streamed) {
  const Vec<T> factor = broadcast(x);
  for_vectors(target, m, streamed, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    put(target + j, factor * (load_upto(kernel + j, count) * load_upto(y + j, count)), count, streamed);
  });
}

// The same from the scores.
template <class T>
OBJSLOT_INLINE void fresh_row(const T* row, T scale, T shift, T x, const T* y, int64_t m, T* target, bool streamed) {
  const Vec<T> scales = broadcast(scale), shifts = broadcast(shift), factor = broadcast(x);
  for_vectors(target, m, streamed, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const Vec<T> kernel = exp2<T>(fused(load_upto(row + j, count), scales, shifts));
    put(target + j, factor * (kernel * load_upto(y + j, count)), count, streamed);
  });
}

// The plan of one matrix, to be written row by row.
template <class T>
struct PlanRows {
  const Matrix<T>* matrix;
  const T* kernel;  // (n, columns), null: made anew from the scores
  const T* offset;
  const T* x;
  const T* y;
  void* target;  // the plan of this matrix
  bool streamed;

  // Fetches the place of a row that is to be written.
  OBJSLOT_INLINE_MEMBER void fetch(int64_t i) const {
    if (streamed || i >= matrix->n) return;
    const bool half = matrix->element == Element::float16 || matrix->element == Element::bfloat16;
    const int64_t bytes = matrix->m * (half ? 2 : static_cast<int64_t>(sizeof(T)));
    const char* row = static_cast<const char*>(target) + i * bytes;
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(row + k, 1, 3);
  }

  // `buffer` holds two padded rows.
  OBJSLOT_INLINE_MEMBER void write(int64_t i, T* buffer) const {
    const int64_t m = matrix->m, columns = matrix->columns;
    const bool half = sizeof(T) == 4 && matrix->element != Element::float32;
    T* row = half ? buffer : static_cast<T*>(target) + i * m;
    const bool past = streamed && !half;
    if (kernel)
      scale_row(kernel + i * columns, x[i], y, row, m, past);
    else
      fresh_row(matrix->row(i, buffer + columns), matrix->scale, offset[i], x[i], y, m, row, past);
    if constexpr (sizeof(T) == 4)
      if (half) write_half_row(buffer, target, matrix->element, i * m, m);
  }
};

}  // namespace objslot::OBJSLOT_ISA
