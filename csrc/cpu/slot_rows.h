// Layer normalisation of rows of slots, and their queries and updates.
#pragma once

#include "slot_row_products.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct Moments {
  T mean, inverse;
};

template <class T>
OBJSLOT_INLINE Moments<T> moments(const T* row, int64_t count, T eps) {
  Vec<T> sum{};
  int64_t d = 0;
  for (; d + width<T> <= count; d += width<T>) sum += load(row + d);
  if (d < count) sum += load_first(row + d, count - d);
  const T mean = sum_lanes<T>(sum) / T(count);
  Vec<T> squares{};
  for (d = 0; d + width<T> <= count; d += width<T>) {
    const Vec<T> rest = load(row + d) - mean;
    squares = fused(rest, rest, squares);
  }
  T total = sum_lanes<T>(squares);
  for (; d < count; ++d) total += (row[d] - mean) * (row[d] - mean);
  const T variance = total / T(count) + eps;
  T root;
  if constexpr (sizeof(T) == 4)
    root = __builtin_sqrtf(variance);
  else
    root = __builtin_sqrt(variance);
  return {mean, T(1) / root};
}

// out = (row - mean) * inverse * weight + bias
template <class T>
OBJSLOT_INLINE void normalise(const T* row, int64_t count, Moments<T> m, const T* weight, const T* bias, T* out) {
  for (int64_t d = 0; d < count; d += width<T>) {
    const int64_t left = count - d;
    const Vec<T> value = (load_upto(row + d, left) - m.mean) * m.inverse;
    store_upto(out + d, fused(value, load_upto(weight + d, left), load_upto(bias + d, left)), left);
  }
}

// The queries of a block of slots, and the constants of their logits; normed (rows, width) is to be worked in.
template <class T>
static void make_queries(const SlotRows& p, const T* slots, int64_t rows, T* normed, int64_t normed_stride, T* query,
                         T* constant, uint32_t* words) {
  const T* norm = static_cast<const T*>(p.layers.norm_slots);
  const T* norm_bias = static_cast<const T*>(p.layers.norm_slots_bias);
  for (int64_t j = 0; j < rows; ++j) {
    const T* row = slots + j * p.width;
    normalise<T>(row, p.width, moments<T>(row, p.width, T(p.slots_eps)), norm, norm_bias, normed + j * normed_stride);
  }
  const T* bias = static_cast<const T*>(p.layers.query_bias);
  multiply<T>(p, p.query, operand<T>(p, normed, normed_stride, rows, p.width, words), bias, query, p.input_width,
              false);
  const auto make_constants = [&](const auto* weights, const auto& number) {
    const auto* const last = weights + p.input_width * p.width;
    for (int64_t j = 0; j < rows; ++j) {
      const T* row = normed + j * normed_stride;
      T total = bias ? bias[p.input_width] : T(0);
#pragma omp simd reduction(+ : total)
      for (int64_t d = 0; d < p.width; ++d) total += row[d] * number(last[d]);
      constant[j] = total * T(p.scale);
    }
  };
  if (p.half)
    make_constants(static_cast<const uint16_t*>(p.layers.query), [](uint16_t x) { return T(from_bfloat16(x)); });
  else
    make_constants(static_cast<const T*>(p.layers.query), [](T x) { return x; });
}

// updates (rows, width): the averages as values; zero where a slot has no position.
template <class T>
static void make_updates(const SlotRows& p, const T* means, const T* mass, int64_t rows, T* updates, int64_t stride,
                         uint32_t* words) {
  multiply<T>(p, p.value, operand<T>(p, means, p.input_width, rows, p.input_width, words),
              static_cast<const T*>(p.layers.value_bias), updates, stride, false);
  for (int64_t j = 0; j < rows; ++j)
    if (mass[j] == T(0)) clear(updates + j * stride, p.width);
}

}  // namespace objslot::OBJSLOT_ISA
