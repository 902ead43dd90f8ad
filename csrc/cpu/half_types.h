// Conversions of the half types.
#pragma once

#include "sinkhorn_simd.h"

namespace objslot::OBJSLOT_ISA {

OBJSLOT_INLINE float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}
// To the nearest, ties to even; NaN stays NaN.
OBJSLOT_INLINE uint16_t to_bfloat16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// Row elements in the arithmetic type: the memory itself where it has that type, otherwise a copy in
// `buffer`.
template <class T>
OBJSLOT_INLINE const T* read_row(const void* base, Element type, int64_t offset, int64_t count, T* buffer) {
  if constexpr (sizeof(T) == 4) {
    const uint16_t* source = static_cast<const uint16_t*>(base) + offset;
    if (type == Element::bfloat16) {
      for (int64_t j = 0; j < count; ++j) buffer[j] = from_bfloat16(source[j]);
      return buffer;
    }
    if (type == Element::float16) {
      int64_t j = 0;
#if defined(__AVX512F__)
      for (; j + 16 <= count; j += 16)
        _mm512_storeu_ps(buffer + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + j))));
#elif defined(__AVX2__)
      for (; j + 8 <= count; j += 8)
        _mm256_storeu_ps(buffer + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
#endif
      for (; j < count; ++j) {
        _Float16 half;
        __builtin_memcpy(&half, source + j, 2);
        buffer[j] = static_cast<float>(half);
      }
      return buffer;
    }
  }
  return static_cast<const T*>(base) + offset;
}

// The other way round for the half types.
OBJSLOT_INLINE void write_half_row(const float* row, void* base, Element type, int64_t offset, int64_t count) {
  uint16_t* target = static_cast<uint16_t*>(base) + offset;
  if (type == Element::bfloat16) {
    for (int64_t j = 0; j < count; ++j) target[j] = to_bfloat16(row[j]);
    return;
  }
  int64_t j = 0;
#if defined(__AVX512F__)
  for (; j + 16 <= count; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + j),
                        _mm512_cvtps_ph(_mm512_loadu_ps(row + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  for (; j + 8 <= count; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(row + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; j < count; ++j) {
    const _Float16 half = static_cast<_Float16>(row[j]);
    __builtin_memcpy(target + j, &half, 2);
  }
}

}  // namespace objslot::OBJSLOT_ISA
