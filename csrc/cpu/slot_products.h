// The thin matrix products of slot attention on one tile of positions, with slots or features as lanes.
#pragma once

#include "half_types.h"
#include "vector_functions.h"

namespace objslot::OBJSLOT_ISA {

#if defined(__AVX512F__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

// Memory that will be read soon, fetched bit by bit while products run: the next rows lie in a cache further out.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  template <int lines = 2>
  OBJSLOT_INLINE_MEMBER void fetch() {
    if (at >= end) return;
#pragma GCC unroll 8
    for (int k = 0; k < lines; ++k) __builtin_prefetch(at + 64 * k, 0, 2);
    at += 64 * lines;
  }
};

// out[j][0, KV vectors) = sum over d of x[j][d] * qt[d][...], + bias, for 4 * R rows j.
template <class T, int KV, int R>
OBJSLOT_INLINE void dot_block(const T* x, int64_t stride, int64_t d, const T* qt, const T* bias, int64_t lanes, T* out,
                              Ahead& ahead) {
  Vec<T> total[4 * R][KV] = {};
  const T* base[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) base[r] = x + 4 * r * stride;
  const int64_t stride3 = 3 * stride;
  for (int64_t i = 0; i < d; ++i, qt += lanes) {
    if (i % 2 == 0) ahead.fetch();
    Vec<T> q[KV];
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) q[z] = load(qt + z * width<T>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> x0 = broadcast(base[r][0]), x1 = broadcast(base[r][stride]);
      const Vec<T> x2 = broadcast(base[r][2 * stride]), x3 = broadcast(base[r][stride3]);
#pragma GCC unroll 4
      for (int z = 0; z < KV; ++z) {
        total[4 * r][z] = fused(x0, q[z], total[4 * r][z]);
        total[4 * r + 1][z] = fused(x1, q[z], total[4 * r + 1][z]);
        total[4 * r + 2][z] = fused(x2, q[z], total[4 * r + 2][z]);
        total[4 * r + 3][z] = fused(x3, q[z], total[4 * r + 3][z]);
      }
      ++base[r];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < 4 * R; ++r)
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) store(out + r * lanes + z * width<T>, total[r][z] + load(bias + z * width<T>));
}

template <class T, int KV>
OBJSLOT_INLINE void dot_row(const T* x, int64_t d, const T* qt, const T* bias, int64_t lanes, T* out) {
  Vec<T> total[KV] = {};
  for (int64_t i = 0; i < d; ++i, qt += lanes) {
    const Vec<T> value = broadcast(x[i]);
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) total[z] = fused(value, load(qt + z * width<T>), total[z]);
  }
#pragma GCC unroll 4
  for (int z = 0; z < KV; ++z) store(out + z * width<T>, total[z] + load(bias + z * width<T>));
}

template <class T, int KV>
static void dot_panel(const T* x, int64_t stride, int64_t rows, int64_t d, const T* qt, const T* bias, int64_t lanes,
                      T* out, Ahead& ahead) {
  constexpr int R = registers == 32 ? (KV == 1 ? 3 : KV == 4 ? 1 : 2) : (KV == 1 ? 3 : 1);
  int64_t j = 0;
  for (; j + 4 * R <= rows; j += 4 * R)
    dot_block<T, KV, R>(x + j * stride, stride, d, qt, bias, lanes, out + j * lanes, ahead);
  if constexpr (R > 1)
    for (; j + 4 <= rows; j += 4)
      dot_block<T, KV, 1>(x + j * stride, stride, d, qt, bias, lanes, out + j * lanes, ahead);
  for (; j < rows; ++j) dot_row<T, KV>(x + j * stride, d, qt, bias, lanes, out + j * lanes);
}

// out (rows, lanes) = x (rows, d) qt (d, lanes) + bias (lanes)
template <class T>
OBJSLOT_INLINE void dots(const T* x, int64_t stride, int64_t rows, int64_t d, const T* qt, const T* bias, int64_t lanes,
                         T* out, Ahead ahead = {}) {
  constexpr int most = registers == 32 ? 4 : 2;
  int64_t left = lanes / width<T>;
  while (left > 0) {
    const int64_t panel = left >= most ? most : left;
    if (panel == 1) dot_panel<T, 1>(x, stride, rows, d, qt, bias, lanes, out, ahead);
    if (panel == 2) dot_panel<T, 2>(x, stride, rows, d, qt, bias, lanes, out, ahead);
    if constexpr (most == 4) {
      if (panel == 3) dot_panel<T, 3>(x, stride, rows, d, qt, bias, lanes, out, ahead);
      if (panel == 4) dot_panel<T, 4>(x, stride, rows, d, qt, bias, lanes, out, ahead);
    }
    qt += panel * width<T>;
    bias += panel * width<T>;
    out += panel * width<T>;
    left -= panel;
  }
}

// sums[r][C vectors] += sum over the rows j of weights[j][r] * v[j][...]; Part: only the first `part` lanes of v.
template <class T, int R, int C, bool Part>
OBJSLOT_INLINE void gather_block(const T* weights, int64_t lanes, int64_t rows, const T* v, int64_t stride,
                                 int64_t part, T* sums, int64_t sums_stride, Ahead& ahead) {
  Vec<T> total[R][C] = {};
  for (int64_t j = 0; j < rows; ++j) {
    ahead.fetch();
    Vec<T> value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      value[c] = Part ? load_first(v + j * stride + c * width<T>, part) : load(v + j * stride + c * width<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(weights[j * lanes + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = fused(weight, value[c], total[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* sum = sums + r * sums_stride + c * width<T>;
      store(sum, load(sum) + total[r][c]);
    }
}

// The last slots, fewer than Most.
template <class T, int C, bool Part, int Most>
static void gather_rest(int64_t left, const T* weights, int64_t lanes, int64_t rows, const T* v, int64_t stride,
                        int64_t part, T* sums, int64_t sums_stride, Ahead& ahead) {
  if constexpr (Most > 1) {
    if (left == Most - 1)
      gather_block<T, Most - 1, C, Part>(weights, lanes, rows, v, stride, part, sums, sums_stride, ahead);
    else
      gather_rest<T, C, Part, Most - 1>(left, weights, lanes, rows, v, stride, part, sums, sums_stride, ahead);
  }
}

template <class T, int C, bool Part>
static void gather_columns(const T* weights, int64_t lanes, int64_t slots, int64_t rows, const T* v, int64_t stride,
                           int64_t part, T* sums, int64_t sums_stride, Ahead& ahead) {
  constexpr int R = registers == 32 ? (C == 3 ? 8 : 12) : (C == 2 ? 6 : 8);
  int64_t i = 0;
  for (; i + R <= slots; i += R)
    gather_block<T, R, C, Part>(weights + i, lanes, rows, v, stride, part, sums + i * sums_stride, sums_stride, ahead);
  if (i < slots)
    gather_rest<T, C, Part, R>(slots - i, weights + i, lanes, rows, v, stride, part, sums + i * sums_stride,
                               sums_stride, ahead);
}

// sums (slots, columns padded) += weights (rows, slots)^T v (rows, columns)
template <class T>
OBJSLOT_INLINE void gather(const T* weights, int64_t lanes, int64_t slots, int64_t rows, const T* v, int64_t stride,
                           int64_t columns, T* sums, int64_t sums_stride, Ahead ahead) {
  constexpr int C = registers == 32 ? 3 : 2;
  int64_t d = 0;
  for (; d + C * width<T> <= columns; d += C * width<T>)
    gather_columns<T, C, false>(weights, lanes, slots, rows, v + d, stride, 0, sums + d, sums_stride, ahead);
  for (; d + width<T> <= columns; d += width<T>)
    gather_columns<T, 1, false>(weights, lanes, slots, rows, v + d, stride, 0, sums + d, sums_stride, ahead);
  if (d < columns)
    gather_columns<T, 1, true>(weights, lanes, slots, rows, v + d, stride, columns - d, sums + d, sums_stride, ahead);
}

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
  const auto advance = [&](int count) __attribute__((always_inline)) {
    j += count;
    out += count * stride;
    for (int t = 0; t < Terms; ++t) at[t].weights += count * lanes;
  };
  for (; j + R <= rows; advance(R))
    spread_block<T, R, C, Terms, How>(at, lanes, slots, features_stride, part, out, stride);
  for (; j + 4 <= rows; advance(4))
    spread_block<T, 4, C, Terms, How>(at, lanes, slots, features_stride, part, out, stride);
  for (; j < rows; advance(1)) spread_block<T, 1, C, Terms, How>(at, lanes, slots, features_stride, part, out, stride);
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
