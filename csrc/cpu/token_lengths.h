// Lengths of tokens.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

// The sum of the squares of a row in float64.
template <class T>
static double precise_square(const T* row, int64_t count) {
  constexpr int W = width<double>;
  typedef T Part __attribute__((vector_size(W * sizeof(T))));
  Vec<double> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * W <= count; k += 4 * W)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      Part part;
      __builtin_memcpy(&part, row + k + s * W, sizeof(part));
      const Vec<double> value = __builtin_convertvector(part, Vec<double>);
      sums[s] = fused(value, value, sums[s]);
    }
  double sum = sum_lanes<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < count; ++k) sum += static_cast<double>(row[k]) * row[k];
  return sum;
}

// One over the length of a token, and 0 where it is shorter than `shortest`. A NaN stays.
template <class T>
static T inverse_length(const T* row, int64_t count, double shortest) {
  const double square = precise_square(row, count);
  return square < shortest * shortest ? T(0) : static_cast<T>(1 / __builtin_sqrt(square));
}

// The largest size of a number in the row; infinity and NaN give either.
template <class T>
static T largest_size(const T* row, int64_t count) {
  Vec<T> high{}, low{};
  for (int64_t k = 0; k < count; k += width<T>) {
    const Vec<T> value = load_upto(row + k, count - k);
    high = larger(value, high);
    low = larger(-value, low);
  }
  return largest_lane<T>(larger(high, low));
}

}  // namespace objslot::OBJSLOT_ISA
