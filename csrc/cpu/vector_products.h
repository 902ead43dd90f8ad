// Products of matrices on vectors, for every arithmetic type and level.
//
// The right factor is in panels: so many columns that the sums of a few rows by them fill the registers, contiguous
// along the terms. As many terms of a panel as stay in a first-level cache meet as many rows of the left factor as
// stay in a second-level cache. The sum of an entry is made in the same order whatever rows are asked for.
#pragma once

#include "product_panels.h"

namespace objslot::OBJSLOT_ISA {

// R rows by C vectors of the product, or of what is added to it; `left` columns of it are wanted.
template <class T, int R, int C>
OBJSLOT_INLINE void product_block(const Factor<T>& one, const T* other, int64_t terms, T* out, int64_t out_stride,
                                  int64_t left, bool add) {
  Vec<T> total[R][C] = {};
  const T* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = one.at + r * one.row_step;
  for (int64_t k = 0, at = 0; k < terms; ++k, at += one.step, other += C * width<T>) {
    Vec<T> value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = load(other + c * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(row[r][at]);
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
      if (rest <= 0) break;
      store_upto(target, add ? load_upto(target, rest) + total[r][c] : total[r][c], rest);
    }
}

// `rows` rows by one panel; the left factor is in panels of product_rows where its rows are next to each other.
template <class T, int C>
static void product_panel(const Factor<T>& one, int64_t panel_step, int64_t rows, const T* other, int64_t terms, T* out,
                          int64_t out_stride, int64_t left, bool add) {
  int64_t i = 0;
  const auto block = [&](auto count) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    const Factor<T> from{one.at + i / product_rows * panel_step + i % product_rows * one.row_step, one.row_step,
                         one.step};
    product_block<T, R, C>(from, other, terms, out + i * out_stride, out_stride, left, add);
    i += R;
  };
  while (i + product_rows <= rows) block(std::integral_constant<int, product_rows>{});
  if (i + 4 <= rows) block(std::integral_constant<int, 4>{});
  if (i + 2 <= rows) block(std::integral_constant<int, 2>{});
  if (i < rows) block(std::integral_constant<int, 1>{});
}

// out (rows, columns) = one (rows, terms) other (terms, columns), the right factor in panels. Nothing is written beyond
// `columns`. A left factor whose terms are not next to each other is brought to `left`: see left_entries.
template <class T>
static void multiply(const Factor<T>& one, int64_t rows, const T* other, int64_t terms, T* out, int64_t out_stride,
                     int64_t columns, T* left) {
  const int64_t blocks = (terms + block_terms<T> - 1) / block_terms<T>;
  const int64_t most = blocks > 1 ? (terms + blocks - 1) / blocks : terms;
  for (int64_t i = 0; i < rows; i += block_rows) {
    const int64_t height = rows - i < block_rows ? rows - i : block_rows;
    int64_t k = 0;
    do {
      const int64_t depth = terms - k < most ? terms - k : most;
      Factor<T> part = one.from(i, k);
      int64_t panel_step = product_rows * one.row_step;
      if (one.step != 1) {
        lay_row_panels(part, height, depth, left);
        part = {left, 1, product_rows};
        panel_step = product_rows * depth;
      }
      for_panels<T>(columns, [&](int64_t j, auto vectors) __attribute__((always_inline)) {
        constexpr int C = decltype(vectors)::value;
        product_panel<T, C>(part, panel_step, height, other + j * terms + k * C * width<T>, depth,
                            out + i * out_stride + j, out_stride, columns - j, k > 0);
      });
      k += most;
    } while (k < terms);
  }
}

}  // namespace objslot::OBJSLOT_ISA
