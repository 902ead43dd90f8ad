// The gradient of the scores from the plan, its gradient and a correction of two terms for every iteration.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

// R rows by C vectors of plan / eps * (gradient - left right). Fetches what lies `ahead` of results that are not
// streamed.
template <class T, int R, int C, bool Streamed>
OBJSLOT_INLINE void correct_tile(const T* const* plan, const T* const* gradient, const T* left, const T* right,
                                 int64_t rank, int64_t columns, int64_t j, Vec<T> inverse_eps, T* const* out,
                                 int64_t ahead) {
  if (!Streamed)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) __builtin_prefetch(out[r] + ahead + j + c * width<T>, 1, 2);
  Vec<T> value[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[r][c] = -load(gradient[r] + j + c * width<T>);
  for (int64_t k = 0; k < rank; ++k) {
    Vec<T> factor[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) factor[c] = load(right + k * columns + j + c * width<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(left[k * sweep_rows + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[r][c] = fused(weight, factor[c], value[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vec<T> result = -inverse_eps * load(plan[r] + j + c * width<T>) * value[r][c];
      if (Streamed)
        stream(out[r] + j + c * width<T>, result);
      else
        store(out[r] + j + c * width<T>, result);
    }
}

template <class T, int C, bool Streamed>
OBJSLOT_INLINE void correct_columns(const T* const* plan, const T* const* gradient, int64_t rows, const T* left,
                                    const T* right, int64_t rank, int64_t columns, int64_t j, Vec<T> inverse_eps,
                                    T* const* out, int64_t ahead) {
  int64_t r = 0;
  for (; r + block <= rows; r += block)
    correct_tile<T, block, C, Streamed>(plan + r, gradient + r, left + r, right, rank, columns, j, inverse_eps, out + r,
                                        ahead);
  for (; r < rows; ++r)
    correct_tile<T, 1, C, Streamed>(plan + r, gradient + r, left + r, right, rank, columns, j, inverse_eps, out + r,
                                    ahead);
}

// Some rows of a group. A few columns of `right` serve all of them while they are in the first level of the caches.
template <class T, bool Streamed, class Fetch>
OBJSLOT_INLINE void correct_rows(const T* const* plan, const T* const* gradient, int64_t rows, const T* left,
                                 const T* right, int64_t rank, const Matrix<T>& matrix, Vec<T> inverse_eps,
                                 T* const* out, const Fetch& fetch, int64_t ahead) {
  constexpr int C = OBJSLOT_VECTOR_BYTES == 64 ? 4 : 2;
  const int64_t m = matrix.m, columns = matrix.columns;
  int64_t j = 0;
  for (; j + C * width<T> <= m; j += C * width<T>) {
    for (int c = 0; c < C; ++c) fetch.advance();
    correct_columns<T, C, Streamed>(plan, gradient, rows, left, right, rank, columns, j, inverse_eps, out, ahead);
  }
  for (; j + width<T> <= m; j += width<T>)
    correct_columns<T, 1, Streamed>(plan, gradient, rows, left, right, rank, columns, j, inverse_eps, out, ahead);
  if (j == m) return;
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> value = -load_first(gradient[r] + j, m - j);
    for (int64_t k = 0; k < rank; ++k)
      value = fused(broadcast(left[k * sweep_rows + r]), load(right + k * columns + j), value);
    store_first(out[r] + j, -inverse_eps * load_first(plan[r] + j, m - j) * value, m - j);
  }
}

// A masked column has no plan, but its scores counted when the rows were first set, with the first y.
template <class T>
OBJSLOT_INLINE void fill_holes(const T* row, const Matrix<T>& matrix, T offset, T factor, const T* first,
                               const T* holes, T* out) {
  for (int64_t j = 0; j < matrix.m; j += width<T>) {
    const Vec<T> scores = load_upto(row + j, matrix.m - j);
    const Vec<T> value = factor * matrix.inverse_eps * load(first + j) *
                         exp2<T>(fused(scores, broadcast(matrix.scale), broadcast(offset)));
    store(out + j, load(holes + j) == T(0) ? load(out + j) : value);
  }
}

}  // namespace objslot::OBJSLOT_ISA
