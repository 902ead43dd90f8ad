// Products of matrices on vectors, for every arithmetic type and level.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

#if defined(__AVX512F__)
constexpr int product_rows = 8, product_vectors = 3;
#else
constexpr int product_rows = 4, product_vectors = 2;
#endif

// The left factor of a product: its entry (i, k) is at[i * row_step + k * step].
template <class T>
struct Factor {
  const T* at;
  int64_t row_step, step;
  OBJSLOT_INLINE_MEMBER Factor from(int64_t row) const { return {at + row * row_step, row_step, step}; }
};

// R rows by C vectors of the product; `left` columns of it are wanted.
template <class T, int R, int C>
OBJSLOT_INLINE void product_block(const Factor<T>& one, const T* other, int64_t stride, int64_t terms, T* out,
                                  int64_t out_stride, int64_t left) {
  Vec<T> total[R][C] = {};
  const T* factor = one.at;
  for (int64_t k = 0; k < terms; ++k, factor += one.step, other += stride) {
    Vec<T> value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = load(other + c * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(factor[r * one.row_step]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = fused(weight, value[c], total[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int64_t rest = left - c * width<T>;
      T* target = out + r * out_stride + c * width<T>;
      if (rest >= width<T>)
        store(target, total[r][c]);
      else if (rest > 0)
        store_first(target, total[r][c], rest);
    }
}

template <class T, int C>
static void product_panel(Factor<T> one, int64_t rows, const T* other, int64_t stride, int64_t terms, T* out,
                          int64_t out_stride, int64_t left) {
  int64_t i = 0;
  for (; i + product_rows <= rows; i += product_rows)
    product_block<T, product_rows, C>(one.from(i), other, stride, terms, out + i * out_stride, out_stride, left);
  for (; i + 2 <= rows; i += 2)
    product_block<T, 2, C>(one.from(i), other, stride, terms, out + i * out_stride, out_stride, left);
  for (; i < rows; ++i)
    product_block<T, 1, C>(one.from(i), other, stride, terms, out + i * out_stride, out_stride, left);
}

// out (rows, columns) = one (rows, terms) other (terms, columns), whose rows are padded to whole vectors. Nothing is
// written beyond `columns`.
template <class T>
static void multiply(const Factor<T>& one, int64_t rows, const T* other, int64_t stride, int64_t terms, T* out,
                     int64_t out_stride, int64_t columns) {
  constexpr int C = product_vectors, W = width<T>;
  for (int64_t j = 0; j < columns;) {
    const int64_t left = columns - j;
    if (left > (C - 1) * W) {
      product_panel<T, C>(one, rows, other + j, stride, terms, out + j, out_stride, left);
      j += C * W;
    } else if (C == 3 && left > W) {
      product_panel<T, 2>(one, rows, other + j, stride, terms, out + j, out_stride, left);
      j += 2 * W;
    } else {
      product_panel<T, 1>(one, rows, other + j, stride, terms, out + j, out_stride, left);
      j += W;
    }
  }
}

// out (columns of `from`, stride) = the transpose of rows (count, width) that are `step` apart; what lies between
// `count` and the stride is zero.
template <class T>
static void transpose(const T* from, int64_t count, int64_t width_of_rows, int64_t step, T* out, int64_t stride,
                      int64_t first, int64_t end) {
  constexpr int64_t side = 16;
  for (int64_t k = first; k < end; k += side)
    for (int64_t j = 0; j < stride; j += side) {
      const int64_t last = k + side < end ? k + side : end;
      for (int64_t row = k; row < last && row < width_of_rows; ++row)
        for (int64_t column = j; column < j + side && column < stride; ++column)
          out[row * stride + column] = column < count ? from[column * step + row] : T(0);
    }
}

}  // namespace objslot::OBJSLOT_ISA
