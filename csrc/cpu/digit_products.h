// Products of rows of float32 with rows of float32 on AMX tiles of bytes, in fixed point.
//
// The numbers of a row become integers in units of its largest size, and those three digits of a byte,
// 65536 h + 256 m + l. Of the nine products of two such sums the six largest are added, exactly, in integers of 32
// bits: h h, h m + m h, h l + m m + l h. That is half of the work of numbers of bfloat16 at about the precision of
// float32, as long as no number is far larger than the others of its row: DigitRows tells.
#pragma once

#include "tile_products.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

// Terms in one row of a tile, and bytes of a tile.
constexpr int64_t byte_depth = 64, byte_tile = tile_rows * byte_depth;
constexpr int digits = 3;
// The largest size of a number in units of its row; beyond it the upper digit overflows.
constexpr float digit_range = 8355000.f;
// Rows whose squares sum to less count as unsuited, for their numbers may be no normal ones.
constexpr float least_square = 1e-20f;
// More terms might overflow a sum of three products.
constexpr int64_t most_digit_terms = 32768;

OBJSLOT_INLINE int64_t byte_blocks(int64_t depth) { return (depth + byte_depth - 1) / byte_depth; }
// Bytes of a block of 16 rows or columns of a factor.
OBJSLOT_INLINE int64_t digit_bytes(int64_t depth) { return digits * byte_blocks(depth) * byte_tile; }

// Of rows: the sum of squares, the largest size of a number. Both are padded to whole tiles.
struct DigitRows {
  float* square;
  float* size;
};

static void measure_rows(const float* from, int64_t rows, int64_t columns, const DigitRows& found) {
  for (int64_t first = 0; first < rows; first += tile_rows) {
    Vec<float> square[tile_rows] = {}, size[tile_rows] = {};
    for (int64_t r = 0; r < tile_rows && first + r < rows; ++r) {
      const float* row = from + (first + r) * columns;
      for (int64_t k = 0; k < columns; k += 16) {
        const __m512 terms = _mm512_maskz_loadu_ps(lanes_upto(columns - k), row + k);
        square[r] = (Vec<float>)_mm512_fmadd_ps(terms, terms, (__m512)square[r]);
        size[r] = (Vec<float>)_mm512_max_ps((__m512)size[r], _mm512_abs_ps(terms));
      }
    }
    sum_lanes_of<float, tile_rows>(square, found.square + first);
    largest_lanes_of<float, tile_rows>(size, found.size + first);
  }
}

// Puts the digits of 64 numbers, in units of 1 / scale, side by side. Terms are in an order of their own, which is the
// same for every row.
OBJSLOT_INLINE void put_digits(const __m512* terms, __m512 scale, uint8_t* row) {
  const __m512i middle = _mm512_set1_epi32(0x808080);
  // The same byte of four words of a quarter meets.
  const __m512i meet = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i word[4];
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(terms[part], scale));
    // Digits from -128 to 127: those of the sum are larger by 128.
    const __m512i shifted = _mm512_xor_si512(_mm512_add_epi32(whole, middle), middle);
    word[part] = _mm512_shuffle_epi8(shifted, meet);
  }
  const __m512i low = _mm512_unpacklo_epi32(word[0], word[1]), low2 = _mm512_unpacklo_epi32(word[2], word[3]);
  const __m512i high = _mm512_unpackhi_epi32(word[0], word[1]), high2 = _mm512_unpackhi_epi32(word[2], word[3]);
  _mm512_store_si512(row, _mm512_unpacklo_epi64(high, high2));
  _mm512_store_si512(row + byte_tile, _mm512_unpackhi_epi64(low, low2));
  _mm512_store_si512(row + 2 * byte_tile, _mm512_unpacklo_epi64(low, low2));
}

// A block of 16 rows, (blocks of 64 terms, digits, 16, 64), from row `first` on.
static void lay_digits(const float* from, int64_t rows, int64_t columns, int64_t first, const float* size,
                       uint8_t* tiles) {
  for (int64_t r = 0; r < tile_rows; ++r) {
    const bool there = first + r < rows;
    const float* row = from + (first + r) * columns;
    // Where all is zero any unit will do.
    const __m512 scale = _mm512_set1_ps(there && size[first + r] > 0 ? digit_range / size[first + r] : 0.f);
    for (int64_t k = 0; k < columns; k += byte_depth) {
      __m512 terms[4];
#pragma GCC unroll 4
      for (int64_t part = 0; part < 4; ++part) {
        const __mmask16 lanes = there ? lanes_upto(columns - k - part * 16) : 0;
        terms[part] = _mm512_maskz_loadu_ps(lanes, row + k + part * 16);
      }
      put_digits(terms, scale, tiles + (k / byte_depth * digits * tile_rows + r) * byte_depth);
    }
  }
}

// The same as columns of a product.
static void lay_digits_across(const uint8_t* rows, int64_t columns, uint8_t* tiles) {
  for (int64_t tile = 0; tile < digits * byte_blocks(columns); ++tile) {
    __m512 words[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) words[r] = _mm512_load_ps(rows + tile * byte_tile + r * byte_depth);
    transpose_block(words);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_ps(tiles + tile * byte_tile + r * byte_depth, words[r]);
  }
}

// A matrix of `columns` columns that products of digits are written to, brought to their size by a factor for every
// row and column; and the largest entry of each row. All but `columns` are whole pairs of tiles.
struct DigitTarget {
  float* out;
  int64_t stride, columns;
  const float* row_scale;
  const float* column_scale;
  float* tops;
};

// The sums of the digits of a tile that have yet to become numbers.
struct DigitSums {
  const int32_t* sums;  // (digits, 16, 16)
  int64_t row, column;
};

OBJSLOT_INLINE void finish_digits(const DigitTarget& t, const DigitSums& s, int64_t first, int64_t end,
                                  Vec<float>* tops) {
  const __m512 columns = _mm512_loadu_ps(t.column_scale + s.column);
  const __mmask16 lanes = lanes_upto(t.columns - s.column);
  for (int64_t r = first; r < end; ++r) {
    const int32_t* at = s.sums + r * tile_rows;
    const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(at));
    const __m512 middle = _mm512_cvtepi32_ps(_mm512_load_si512(at + 256));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(at + 512));
    const __m512 sum =
        _mm512_fmadd_ps(high, _mm512_set1_ps(65536.f), _mm512_fmadd_ps(middle, _mm512_set1_ps(256.f), low));
    const __m512 value = _mm512_mul_ps(_mm512_mul_ps(sum, columns), _mm512_set1_ps(t.row_scale[s.row + r]));
    _mm512_storeu_ps(t.out + (s.row + r) * t.stride + s.column, value);
    tops[r] = (Vec<float>)_mm512_mask_max_ps((__m512)tops[r], lanes, (__m512)tops[r], value);
  }
}

#define OBJSLOT_DIGITS_ADD(sum, row, column) \
  asm volatile("tdpbssd %%tmm" #column ", %%tmm" #row ", %%tmm" #sum::: "memory")

// A tile of rows by one of columns, one block of terms: sums 0 to 2 of rows in 3 to 5 and columns in 6 and 7.
OBJSLOT_INLINE void add_digits(const uint8_t* rows, const uint8_t* columns) {
  OBJSLOT_TILE_LOAD(3, rows);
  OBJSLOT_TILE_LOAD(6, columns);
  OBJSLOT_DIGITS_ADD(0, 3, 6);
  OBJSLOT_TILE_LOAD(4, rows + byte_tile);
  OBJSLOT_DIGITS_ADD(1, 4, 6);
  OBJSLOT_TILE_LOAD(5, rows + 2 * byte_tile);
  OBJSLOT_DIGITS_ADD(2, 5, 6);
  OBJSLOT_TILE_LOAD(7, columns + byte_tile);
  OBJSLOT_DIGITS_ADD(1, 3, 7);
  OBJSLOT_DIGITS_ADD(2, 4, 7);
  OBJSLOT_TILE_LOAD(6, columns + 2 * byte_tile);
  OBJSLOT_DIGITS_ADD(2, 3, 6);
}

// Rows from i on, a block of 16, of the product with all columns. While a tile is made, the sums of the one before
// become numbers.
static void multiply_digits(const uint8_t* rows, const uint8_t* columns, int64_t depth, const DigitTarget& target,
                            int64_t i) {
  alignas(64) int32_t sums[2][digits * 256];
  Vec<float> tops[tile_rows];
  for (int64_t r = 0; r < tile_rows; ++r) tops[r] = broadcast(-std::numeric_limits<float>::infinity());
  DigitSums before{nullptr, i, 0};
  int turn = 0;
  for (int64_t j = 0; j < target.columns; j += tile_rows, turn ^= 1) {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2" ::);
    for (int64_t k = 0; k < depth; ++k, columns += digits * byte_tile) {
      add_digits(rows + k * digits * byte_tile, columns);
      if (before.sums) finish_digits(target, before, tile_rows * k / depth, tile_rows * (k + 1) / depth, tops);
    }
    constexpr int64_t bytes = 64;
    OBJSLOT_TILE_STORE(0, sums[turn], bytes);
    OBJSLOT_TILE_STORE(1, sums[turn] + 256, bytes);
    OBJSLOT_TILE_STORE(2, sums[turn] + 512, bytes);
    before = {sums[turn], i, j};
  }
  finish_digits(target, before, 0, tile_rows, tops);
  largest_lanes_of<float, tile_rows>(tops, target.tops + i);
}

}  // namespace objslot::OBJSLOT_ISA
#endif
