// The thin matrix products of slot attention that sum over slots.
#pragma once

#include "slot_products.h"

namespace objslot::OBJSLOT_ISA {

// How a row of a product leaves the registers.
enum class Leave { store, stream, part };

// One term of a sum of products: weights (rows, slots) and rows of features (slots, columns padded).
template <class T>
struct Term {
  const T* weights;
  const T* features;
};

// out[j][C vectors] = sum over the terms and slots i of weights[j][i] * features[i][...], for R rows j.
template <class T, int R, int C, int Terms, Leave How>
OBJSLOT_INLINE void spread_block(const Term<T>* terms, int64_t lanes, int64_t slots, const int64_t* features_stride,
                                 int64_t part, T* out, int64_t stride) {
  Vec<T> total[R][C] = {};
#pragma GCC unroll 2
  for (int t = 0; t < Terms; ++t) {
    const T* weights = terms[t].weights;
    const T* features = terms[t].features;
    for (int64_t i = 0; i < slots; ++i, features += features_stride[t]) {
      Vec<T> value[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) value[c] = load(features + c * width<T>);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<T> weight = broadcast(weights[r * lanes + i]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] = fused(weight, value[c], total[r][c]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* target = out + r * stride + c * width<T>;
      if constexpr (How == Leave::part)
        store_first(target, total[r][c], part);
      else if constexpr (How == Leave::stream)
        stream(target, total[r][c]);
      else
        store(target, total[r][c]);
    }
}

template <class T, int C, int Terms, Leave How>
static void spread_columns(const Term<T>* terms, int64_t lanes, int64_t slots, const int64_t* features_stride,
                           int64_t rows, int64_t part, T* out, int64_t stride) {
  constexpr int R = registers == 32 ? (C == 3 ? 8 : 12) : (C == 2 ? 6 : 8);
  Term<T> at[Terms];
#pragma GCC unroll 2
  for (int t = 0; t < Terms; ++t) at[t] = terms[t];
  int64_t j = 0;
  const auto blocks = [&](auto count) __attribute__((always_inline)) {
    for (; j + count() <= rows; j += count(), out += count() * stride) {
      spread_block<T, count(), C, Terms, How>(at, lanes, slots, features_stride, part, out, stride);
#pragma GCC unroll 2
      for (int t = 0; t < Terms; ++t) at[t].weights += count() * lanes;
    }
  };
  blocks(std::integral_constant<int, R>());
  blocks(std::integral_constant<int, 4>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// out (rows, columns) = sum over the terms of weights (rows, slots) features (slots, columns)
template <class T, int Terms>
OBJSLOT_INLINE void spread(const Term<T>* terms, int64_t lanes, int64_t slots, const int64_t* features_stride,
                           int64_t rows, int64_t columns, T* out, int64_t stride, bool streamed) {
  constexpr int C = registers == 32 ? 3 : 2;
  Term<T> at[Terms];
#pragma GCC unroll 2
  for (int t = 0; t < Terms; ++t) at[t] = terms[t];
  int64_t d = 0;
  const auto advance = [&](int64_t count) __attribute__((always_inline)) {
    d += count;
    for (int t = 0; t < Terms; ++t) at[t].features += count;
  };
  for (; d + C * width<T> <= columns; advance(C * width<T>)) {
    if (streamed)
      spread_columns<T, C, Terms, Leave::stream>(at, lanes, slots, features_stride, rows, 0, out + d, stride);
    else
      spread_columns<T, C, Terms, Leave::store>(at, lanes, slots, features_stride, rows, 0, out + d, stride);
  }
  for (; d + width<T> <= columns; advance(width<T>)) {
    if (streamed)
      spread_columns<T, 1, Terms, Leave::stream>(at, lanes, slots, features_stride, rows, 0, out + d, stride);
    else
      spread_columns<T, 1, Terms, Leave::store>(at, lanes, slots, features_stride, rows, 0, out + d, stride);
  }
  if (d < columns)
    spread_columns<T, 1, Terms, Leave::part>(at, lanes, slots, features_stride, rows, columns - d, out + d, stride);
}

}  // namespace objslot::OBJSLOT_ISA
