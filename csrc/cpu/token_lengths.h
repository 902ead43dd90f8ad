// Lengths of tokens.
#pragma once

#include "sinkhorn_passes.h"

namespace objslot::OBJSLOT_ISA {

// The sum of the squares of a row in float64.
template <class T>
static double precise_square(const T* row, int64_t count) {
  double parts[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8)
    for (int lane = 0; lane < 8; ++lane) parts[lane] += static_cast<double>(row[k + lane]) * row[k + lane];
  for (; k < count; ++k) parts[0] += static_cast<double>(row[k]) * row[k];
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
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
