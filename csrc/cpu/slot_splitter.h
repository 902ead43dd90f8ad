// The rows of a tile of positions, and how they become words while tiles multiply.
#pragma once

#include "slot_words.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

struct TileRows {
  const char* row[tile];
  int64_t count, columns;
  // Bytes from one row to the next where all are as far apart, or 0.
  int64_t stride;
  Element element;
  // Where there are any, rows stand for (row - mean) * inverse.
  const float *mean[tile], *inverse[tile];
  bool normalised;
  Ahead ahead;
};

OBJSLOT_INLINE __m512 widened(__m256i x) { return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

OBJSLOT_INLINE __mmask16 lanes_left(int64_t left) {
  return left >= block ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

// One block of columns of row j, zero past the last row and column.
OBJSLOT_INLINE __m512 read_part(const TileRows& rows, int64_t j, int64_t column) {
  if (j >= rows.count) return _mm512_setzero_ps();
  const __mmask16 mask = lanes_left(rows.columns - column);
  if (rows.element != Element::float32) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, reinterpret_cast<const uint16_t*>(rows.row[j]) + column);
    return rows.element == Element::bfloat16 ? widened(half) : _mm512_cvtph_ps(half);
  }
  const __m512 x = _mm512_maskz_loadu_ps(mask, reinterpret_cast<const float*>(rows.row[j]) + column);
  if (!rows.normalised) return x;
  const __m512 centred = _mm512_sub_ps(x, _mm512_set1_ps(*rows.mean[j]));
  return _mm512_maskz_mul_ps(mask, centred, _mm512_set1_ps(*rows.inverse[j]));
}

// How rows are read: from where they lie, whole blocks as they are or normalised, or entry by entry as far as there
// are any.
enum class Reading { direct, whole, normalised, part };

// Calls body with the reading of blocks of `high` rows and `wide` columns as a constant; `direct`: whether rows of
// bfloat16 may be factors as they lie.
template <Precision P, class Body>
OBJSLOT_INLINE void with_reading(const TileRows& rows, int64_t high, int64_t wide, bool direct, const Body& body) {
  if (rows.count % high || rows.columns % wide) return body(std::integral_constant<Reading, Reading::part>());
  if constexpr (P == Precision::exact)
    if (direct && rows.stride) return body(std::integral_constant<Reading, Reading::direct>());
  if constexpr (P == Precision::thrice)
    if (rows.normalised) return body(std::integral_constant<Reading, Reading::normalised>());
  body(std::integral_constant<Reading, Reading::whole>());
}

// Turns a part of the rows into words, a few rows of words a step, for the steps stand in many places of a loop. As a
// left factor: `blocks` of 16 rows by one of 32 columns. As a right one: 32 rows by `blocks` of 16 columns, time and
// again. `count`: rows of words of a step.
template <Precision P, Reading R, bool left, int count>
class Splitter {
 public:
  OBJSLOT_INLINE_MEMBER Splitter(const TileRows& rows, int64_t blocks)
      : rows_(rows), ahead_(rows.ahead), blocks_(blocks) {}

  OBJSLOT_INLINE_MEMBER void begin(int64_t row, int64_t column, int64_t times, uint32_t* to) {
    row_ = row;
    column_ = first_column_ = column;
    left_ = times * blocks_ * block;
    to_ = to;
    inside_ = 0;
    across_ = 0;
  }

  OBJSLOT_INLINE_MEMBER void step() {
    if (left_ == 0) return;
    ahead_.template fetch<P == Precision::thrice ? 2 * count : count>();
#pragma GCC unroll 8
    for (int k = 0; k < count; k += 4) {
      if (left_ == 0) return;
      left_ -= 4;
      if constexpr (R == Reading::part) {
        write_parts();
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) write(inside_ + i);
      }
      advance();
    }
  }

  OBJSLOT_INLINE_MEMBER void finish() {
    while (left_ > 0) step();
  }

 private:
  static constexpr int parts = row_parts<P>;

  // Blocks are of 16 rows of words: steps of four rows never cross their borders.
  OBJSLOT_INLINE_MEMBER void advance() {
    inside_ += 4;
    if (inside_ < block) return;
    inside_ = 0;
    to_ += parts * block_words;
    if constexpr (left) {
      row_ += block;
    } else {
      column_ += block;
      if (++across_ < blocks_) return;
      across_ = 0;
      column_ = first_column_;
      row_ += block_depth;
    }
  }
  OBJSLOT_INLINE_MEMBER void write(int64_t i) {
    uint32_t* const to = to_ + i * block;
    if constexpr (P == Precision::exact) {
      const uint16_t* const first = reinterpret_cast<const uint16_t*>(rows_.row[row_ + i]) + column_;
      if constexpr (left) {
        _mm512_store_si512(to, _mm512_loadu_si512(first));
      } else {
        const uint16_t* const second = reinterpret_cast<const uint16_t*>(rows_.row[row_ + block + i]) + column_;
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
        const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
        _mm512_store_si512(to, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
      }
    } else if constexpr (left) {
      split_cut<parts>(read(row_ + i, column_), read(row_ + i, column_ + block), to);
    } else {
      split_cut<parts>(read(row_ + i, column_), read(row_ + block + i, column_), to);
    }
  }
  OBJSLOT_INLINE_MEMBER __m512 read(int64_t j, int64_t column) const {
    if constexpr (P == Precision::thrice) {
      const __m512 x = _mm512_loadu_ps(reinterpret_cast<const float*>(rows_.row[j]) + column);
      if constexpr (R != Reading::normalised) return x;
      return _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(*rows_.mean[j])), _mm512_set1_ps(*rows_.inverse[j]));
    } else {
      return _mm512_cvtph_ps(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(reinterpret_cast<const uint16_t*>(rows_.row[j]) + column)));
    }
  }
  __attribute__((noinline)) void write_parts() {
    for (int64_t i = inside_; i < inside_ + 4; ++i) {
      uint32_t* const to = to_ + i * block;
      if constexpr (left && P == Precision::exact) {
        const int64_t rest = row_ + i < rows_.count ? rows_.columns - column_ : 0;
        const auto mask = static_cast<__mmask32>(rest >= block_depth ? ~0u : rest <= 0 ? 0 : (1u << rest) - 1);
        _mm512_store_si512(
            to, mask ? _mm512_maskz_loadu_epi16(mask, reinterpret_cast<const uint16_t*>(rows_.row[row_ + i]) + column_)
                     : _mm512_setzero_si512());
      } else if constexpr (left) {
        split_cut<parts>(read_part(rows_, row_ + i, column_), read_part(rows_, row_ + i, column_ + block), to);
      } else {
        split_cut<parts>(read_part(rows_, row_ + i, column_), read_part(rows_, row_ + block + i, column_), to);
      }
    }
  }

  const TileRows& rows_;
  Ahead ahead_;
  const int64_t blocks_;
  int64_t row_ = 0, column_ = 0, first_column_ = 0, left_ = 0, inside_ = 0, across_ = 0;
  uint32_t* to_ = nullptr;
};

}  // namespace objslot::OBJSLOT_ISA
#endif
