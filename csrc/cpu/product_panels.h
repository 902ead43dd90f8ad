// The factors of a product on vectors, as it reads them.
#pragma once

#include <type_traits>

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

// Rows and vectors that are summed up in registers.
#if defined(__AVX512F__)
constexpr int product_rows = 8, product_vectors = 3;
#else
constexpr int product_rows = 6, product_vectors = 2;
#endif
template <class T>
constexpr int panel_columns = product_vectors * width<T>;
// Terms of a panel that leave room for the rows in a first-level cache.
template <class T>
constexpr int64_t block_terms = (int64_t{24} << 10) / sizeof(T) / panel_columns<T>;
// Rows of the left factor, or of the result, that stay in a second-level cache.
constexpr int64_t block_rows = 96;

// The left factor of a product: its entry (i, k) is at[i * row_step + k * step].
template <class T>
struct Factor {
  const T* at;
  int64_t row_step, step;
  OBJSLOT_INLINE_MEMBER Factor from(int64_t row, int64_t term) const {
    return {at + row * row_step + term * step, row_step, step};
  }
};

// Calls use(first column, vectors) for every panel of a right factor: the last one has as many vectors as it needs. A
// panel begins at (first column * terms), and its columns are next to each other.
template <class T, class Use>
OBJSLOT_INLINE void for_panels(int64_t columns, const Use& use) {
  constexpr int W = width<T>;
  int64_t j = 0;
  for (; columns - j > (product_vectors - 1) * W; j += panel_columns<T>)
    use(j, std::integral_constant<int, product_vectors>{});
  if (product_vectors > 2 && columns - j > W)
    use(j, std::integral_constant<int, 2>{});
  else if (columns > j)
    use(j, std::integral_constant<int, 1>{});
}

// Row k of a right factor into its panels; it is padded to whole vectors.
template <class T>
OBJSLOT_INLINE void lay_panel_row(const T* row, int64_t k, int64_t terms, int64_t columns, T* out) {
  for_panels<T>(columns, [&](int64_t j, auto vectors) __attribute__((always_inline)) {
    constexpr int C = decltype(vectors)::value;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + j * terms + (k * C + c) * width<T>, load(row + j + c * width<T>));
  });
}

// One panel of a right factor from the rows of its transpose, `count` of them.
template <class T>
static void lay_panel_across(const T* rows, int64_t stride, int64_t terms, int64_t count, T* out) {
  const int64_t columns = padded<T>(count);
  int64_t k = 0;
#ifdef OBJSLOT_X86
  if constexpr (sizeof(T) == 4)
    for (; k + 4 <= terms && count == columns; k += 4)
      for (int64_t c = 0; c < columns; c += 4) {
        __m128 part[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) part[r] = _mm_loadu_ps(rows + (c + r) * stride + k);
        _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) _mm_storeu_ps(out + (k + r) * columns + c, part[r]);
      }
#endif
  for (; k < terms; ++k)
    for (int64_t c = 0; c < columns; ++c) out[k * columns + c] = c < count ? rows[c * stride + k] : T(0);
}

// Panels of a right factor from the rows of its transpose: rows(first, count) is where some of them are.
template <class T, class Rows>
static void lay_panels_across(const Rows& rows, int64_t stride, int64_t terms, int64_t columns, T* out,
                              const Team& team) {
  constexpr int64_t most = panel_columns<T>;
  const int64_t panels = (columns + most - 1) / most;
  for (int64_t j = team.begin(panels) * most; j < team.end(panels) * most; j += most) {
    const int64_t count = columns - j < most ? columns - j : most;
    lay_panel_across(rows(j, count), stride, terms, count, out + j * terms);
  }
}

// A left factor whose rows are next to each other, in panels of product_rows.
template <class T>
static void lay_row_panels(const Factor<T>& one, int64_t rows, int64_t terms, T* out) {
  constexpr int R = product_rows;
  const int64_t whole = rows / R * R;
  for (int64_t k = 0; k < terms; ++k) {
    const T* from = one.at + k * one.step;
    for (int64_t i = 0; i < whole; i += R) __builtin_memcpy(out + i * terms + k * R, from + i, R * sizeof(T));
    for (int64_t i = whole; i < rows; ++i) out[whole * terms + k * R + i - whole] = from[i];
  }
}

// Numbers that lay_row_panels writes at most, for a left factor of so many rows and terms.
template <class T>
OBJSLOT_INLINE int64_t left_entries(int64_t rows, int64_t terms) {
  const int64_t height = rows < block_rows ? (rows + product_rows - 1) / product_rows * product_rows : block_rows;
  return height * (terms < block_terms<T> ? terms : block_terms<T>);
}

}  // namespace objslot::OBJSLOT_ISA
