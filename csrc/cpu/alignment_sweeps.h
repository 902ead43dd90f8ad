// Sweeps over a few rows of a kernel matrix with two weights for each row or column.
#pragma once

#include "sinkhorn_rows.h"

namespace objslot::OBJSLOT_ISA {

// Rows that a sweep handles together, and that get values together.
constexpr int64_t pair_rows = 4, value_rows = OBJSLOT_VECTOR_BYTES == 64 ? 8 : 4;

template <class T>
OBJSLOT_INLINE T least(const T* weights, int64_t count) {
  return least_sum(largest(weights, count), count);
}

// products[w][r] = sum over j of rows[r][j] * weights_w[j], for two weights w.
template <class T, int R>
OBJSLOT_INLINE void dot_twice(const T* rows, int64_t stride, const T* first, const T* second, int64_t columns, T* one,
                              T* two) {
  Vec<T> even[R] = {}, odd[R] = {};
  for (int64_t j = 0; j < columns; j += width<T>) {
    const Vec<T> a = load(first + j), b = load(second + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = load(rows + r * stride + j);
      even[r] = fused(a, value, even[r]);
      odd[r] = fused(b, value, odd[r]);
    }
  }
  sum_lanes_of<T, R>(even, one);
  sum_lanes_of<T, R>(odd, two);
}

// sums_w[j] += sum over r of factors_w[r] * rows[r][j], for two factors w.
template <class T, int R>
OBJSLOT_INLINE void add_twice(const T* rows, int64_t stride, const T* first, const T* second, int64_t columns, T* one,
                              T* two) {
  Vec<T> a[R], b[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    a[r] = broadcast(first[r]);
    b[r] = broadcast(second[r]);
  }
  for (int64_t j = 0; j < columns; j += width<T>) {
    Vec<T> even = load(one + j), odd = load(two + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = load(rows + r * stride + j);
      even = fused(a[r], value, even);
      odd = fused(b[r], value, odd);
    }
    store(one + j, even);
    store(two + j, odd);
  }
}

// y = mass / sum; false where a sum is too small to be exact.
template <class T>
OBJSLOT_INLINE bool divide(const T* mass, T uniform, const T* sums, T limit, int64_t n, T* y) {
  Bits<T> bad{};
  for (int64_t j = 0; j < n; j += width<T>) {
    const int64_t left = n - j;
    Vec<T> share = mass ? load_upto(mass + j, left) : broadcast(uniform);
    if (left < width<T>) share = keep_first<T>(share, left);
    const Bits<T> none = share == T(0);
    const Vec<T> sum = load(sums + j);
    bad |= ~(sum > limit) & ~none;
    store(y + j, none ? Vec<T>{} : share / sum);
  }
  bool safe = true;
  for (int lane = 0; lane < width<T>; ++lane) safe &= !bad[lane];
  return safe;
}

// weights[j] = factor[j] * values[j], channels padded with zeros.
template <class T>
OBJSLOT_INLINE void scale_values(const T* values, const T* factor, int64_t n, int64_t channels, T* weights) {
  const int64_t lanes = padded<T>(channels);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> scale = broadcast(factor[j]);
    for (int64_t c = 0; c < channels; c += width<T>)
      store(weights + j * lanes + c, scale * load_upto(values + j * channels + c, channels - c));
  }
}

// The other way round: values[j] = factor[j] * weights[j] without the padding.
template <class T>
OBJSLOT_INLINE void scale_rows(const T* weights, const T* factor, int64_t n, int64_t channels, T* values) {
  const int64_t lanes = padded<T>(channels);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> scale = broadcast(factor[j]);
    for (int64_t c = 0; c < channels; c += width<T>) {
      const Vec<T> value = scale * load(weights + j * lanes + c);
      if (channels - c < width<T>)
        store_first(values + j * channels + c, value, channels - c);
      else
        store(values + j * channels + c, value);
    }
  }
}

// One vector of channels, both ways, with every entry of R rows read once: totals[r] = the sum over k of
// kernel[r][k] * weights[k], and collected[k] += the sum over r of kernel[r][k] * values[r].
template <class T, int R>
OBJSLOT_INLINE void move_both_ways(const T* kernel, int64_t stride, const T* weights, const T* values, int64_t step,
                                   int64_t count, T* collected, Vec<T>* totals) {
  Vec<T> value[R], total[R] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) value[r] = load(values + r * step);
  for (int64_t k = 0; k < count; ++k) {
    const Vec<T> weight = load(weights + k * step);
    Vec<T> even = load(collected + k * step), odd{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> entry = broadcast(kernel[r * stride + k]);
      total[r] = fused(entry, weight, total[r]);
      if (r % 2)
        odd = fused(entry, value[r], odd);
      else
        even = fused(entry, value[r], even);
    }
    store(collected + k * step, R > 1 ? even + odd : even);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) totals[r] = total[r];
}

}  // namespace objslot::OBJSLOT_ISA
