// float16: see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  const float sign = x.bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24));
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);
  // Units of the last place; nearbyint rounds to the even one of two that are as near.
  exponent = std::max(exponent, -13);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  // A fraction that rounds up to 2048 carries into the exponent by itself.
  return {static_cast<uint16_t>(sign | (units < 1024 ? units : ((exponent + 14) << 10) + (units - 1024)))};
}
