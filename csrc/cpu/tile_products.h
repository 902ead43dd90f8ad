// Products of matrices on AMX tiles, at the precision of float32, or of the half types where they hold the factors.
//
// A float is split into three numbers of bfloat16, x = h + m + l, which together hold its 24 bits. Of the nine
// products of two such sums the six largest are added in float32: what is left out is below 2^-25 of the factors. A
// number of bfloat16 is one part, and one of float16 fits two.
//
// Tiles know no subnormal numbers, so that a number below 2^-102 is not held in full: callers keep factors at a
// size where that does not count.
#pragma once

#include "sinkhorn_passes.h"
#include "tile_registers.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

constexpr int64_t tile_rows = 16, tile_depth = 32, tile_size = tile_rows * tile_depth;
// Two tiles are worked on together, down and across.
constexpr int64_t tile_pair = 2 * tile_rows;

OBJSLOT_INLINE int64_t whole_tiles(int64_t n) { return (n + tile_pair - 1) / tile_pair * tile_pair; }
OBJSLOT_INLINE int64_t depth_blocks(int64_t d) { return (d + tile_depth - 1) / tile_depth; }
// Words of 16 bits of one factor of a product: `rows` of the result, down or across, and `depth` terms.
OBJSLOT_INLINE int64_t operand_size(int64_t rows, int64_t depth, int parts) {
  return parts * whole_tiles(rows) * depth_blocks(depth) * tile_depth;
}

// Parts that hold the numbers of a type.
template <Element E>
constexpr int parts_of = E == Element::bfloat16  ? 1
                         : E == Element::float16 ? 2
                                                 : 3;

// A matrix in memory, and what its rows and its columns are to be multiplied by where that is not null.
struct Numbers {
  const void* base;
  int64_t stride, rows, columns;
  const float* row_factor = nullptr;
  const float* column_factor = nullptr;
};

OBJSLOT_INLINE __mmask16 lanes_upto(int64_t left) {
  return left >= 16 ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
}

// 16 numbers of a row from column k, zero beyond the matrix.
template <Element E>
OBJSLOT_INLINE __m512 read_numbers(const Numbers& from, int64_t row, int64_t k) {
  static_assert(E != Element::float64);
  if (row >= from.rows) return _mm512_setzero_ps();
  const __mmask16 lanes = lanes_upto(from.columns - k);
  const int64_t offset = row * from.stride + k;
  __m512 value;
  if constexpr (E == Element::float32) {
    value = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(from.base) + offset);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(from.base) + offset);
    if constexpr (E == Element::bfloat16)
      value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    else
      value = _mm512_cvtph_ps(half);
  }
  if (from.row_factor) value = _mm512_mul_ps(value, _mm512_set1_ps(from.row_factor[row]));
  if (from.column_factor) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(lanes, from.column_factor + k));
  return value;
}

// Calls put(part, bits) for the parts of two vectors: the upper halves of the words hold the numbers. All parts but
// the last are rounded; the last keeps a NaN whatever its bits.
template <int Parts, class Put>
OBJSLOT_INLINE void split(__m512 one, __m512 other, const Put& put) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-65536);
#pragma GCC unroll 3
  for (int part = 0; part < Parts - 1; ++part) {
    const __m512i first = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(one), half), upper);
    const __m512i second = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(other), half), upper);
    put(part, first, second);
    one = _mm512_sub_ps(one, _mm512_castsi512_ps(first));
    other = _mm512_sub_ps(other, _mm512_castsi512_ps(second));
  }
  put(Parts - 1, _mm512_castps_si512(one), _mm512_castps_si512(other));
}

// One row of a tile: the 32 numbers of `low` and `high` side by side.
template <int Parts>
OBJSLOT_INLINE void put_row(__m512 low, __m512 high, uint16_t* row) {
  alignas(64) static constexpr uint16_t order[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i odd = _mm512_load_si512(order);
  split<Parts>(low, high, [&](int part, __m512i one, __m512i other) __attribute__((always_inline)) {
    _mm512_store_si512(row + part * tile_size, _mm512_permutex2var_epi16(one, odd, other));
  });
}

// One row of a tile: the numbers of `even` and `odd` in turn.
template <int Parts>
OBJSLOT_INLINE void put_pairs(__m512 even, __m512 odd, uint16_t* row) {
  const __m512i upper = _mm512_set1_epi32(-65536);
  split<Parts>(even, odd, [&](int part, __m512i one, __m512i other) __attribute__((always_inline)) {
    _mm512_store_si512(row + part * tile_size,
                       _mm512_or_si512(_mm512_srli_epi32(one, 16), _mm512_and_si512(other, upper)));
  });
}

// The block of 16 x 16 numbers from (i, k), transposed.
template <Element E>
OBJSLOT_INLINE void read_transposed(const Numbers& from, int64_t i, int64_t k, __m512* block) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) block[r] = read_numbers<E>(from, i + r, k);
  transpose_block(block);
}

// Of every row of a matrix: the sum of squares, which may overflow, and the largest size of a number.
struct RowSizes {
  float* square;
  float* size;
};

// Operands are (blocks of 16 of the result, blocks of 32 terms, parts, 16, 32). The four below lay out a block of 16,
// `block` counting them, at its place in `tiles`.

// Left factor M of M B: rows of M, from row `first`.
template <Element E, int Parts>
static void lay_rows(const Numbers& from, int64_t first, int64_t block, uint16_t* tiles,
                     const RowSizes* sizes = nullptr) {
  const int64_t depth = depth_blocks(from.columns);
  for (int64_t r = 0; r < tile_rows; ++r) {
    const int64_t row = first + block * tile_rows + r;
    __m512 square = _mm512_setzero_ps(), size = square;
    for (int64_t k = 0; k < depth; ++k) {
      const __m512 low = read_numbers<E>(from, row, k * tile_depth);
      const __m512 high = read_numbers<E>(from, row, k * tile_depth + 16);
      put_row<Parts>(low, high, tiles + (block * depth + k) * Parts * tile_size + r * tile_depth);
      if (!sizes) continue;
      square = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, square));
      size = _mm512_max_ps(size, _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
    }
    if (!sizes || row >= from.rows) continue;
    sizes->square[row] = _mm512_reduce_add_ps(square);
    sizes->size[row] = _mm512_reduce_max_ps(size);
  }
}

// Left factor M' of M' B: columns of M.
template <Element E, int Parts>
static void lay_transposed_rows(const Numbers& from, int64_t first, int64_t block, uint16_t* tiles) {
  const int64_t depth = depth_blocks(from.rows), column = first + block * tile_rows;
  for (int64_t k = 0; k < depth; ++k) {
    __m512 low[16], high[16];
    read_transposed<E>(from, k * tile_depth, column, low);
    read_transposed<E>(from, k * tile_depth + 16, column, high);
    for (int r = 0; r < 16; ++r)
      put_row<Parts>(low[r], high[r], tiles + (block * depth + k) * Parts * tile_size + r * tile_depth);
  }
}

// Right factor M of A M: columns of M.
template <Element E, int Parts>
static void lay_columns(const Numbers& from, int64_t block, uint16_t* tiles) {
  const int64_t depth = depth_blocks(from.rows), column = block * tile_rows;
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t row = k * tile_depth + 2 * r;
      put_pairs<Parts>(read_numbers<E>(from, row, column), read_numbers<E>(from, row + 1, column),
                       tiles + (block * depth + k) * Parts * tile_size + r * tile_depth);
    }
}

// Right factor M' of A M': rows of M.
template <Element E, int Parts>
static void lay_transposed_columns(const Numbers& from, int64_t block, uint16_t* tiles,
                                   const RowSizes* sizes = nullptr) {
  const int64_t depth = depth_blocks(from.columns), row = block * tile_rows;
  __m512 square = _mm512_setzero_ps(), size = square;
  for (int64_t k = 0; k < 2 * depth; ++k) {
    __m512 terms[16];
    read_transposed<E>(from, row, k * 16, terms);
    uint16_t* target = tiles + ((block * depth + k / 2) * Parts * tile_rows + k % 2 * 8) * tile_depth;
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const __m512 even = terms[2 * r], odd = terms[2 * r + 1];
      put_pairs<Parts>(even, odd, target + r * tile_depth);
      if (!sizes) continue;
      square = _mm512_fmadd_ps(even, even, _mm512_fmadd_ps(odd, odd, square));
      size = _mm512_max_ps(size, _mm512_max_ps(_mm512_abs_ps(even), _mm512_abs_ps(odd)));
    }
  }
  if (!sizes || row >= from.rows) return;
  const __mmask16 lanes = lanes_upto(from.rows - row);
  _mm512_mask_storeu_ps(sizes->square + row, lanes, square);
  _mm512_mask_storeu_ps(sizes->size + row, lanes, size);
}

#define OBJSLOT_TILE_LOAD(tile, base) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(base), "r"(int64_t{64}) : "memory")
#define OBJSLOT_TILE_STORE(tile, base, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base), "r"(stride) : "memory")
// Accumulators 0 to 3 from rows in 4 and 5, columns in 6 and 7.
#define OBJSLOT_TILE_MULTIPLY                \
  asm volatile(                              \
      "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t" \
      "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t" \
      "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t" \
      "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::  \
          : "memory")

// out (rows, columns) of a left and a right operand of `depth` blocks; all sizes are whole pairs of tiles. After
// every pair of tiles by a pair, between() may do something else that waits for memory.
template <int Left, int Right, class Between>
OBJSLOT_INLINE void multiply_tiles_between(const uint16_t* left, const uint16_t* right, int64_t rows, int64_t columns,
                                           int64_t depth, float* out, int64_t stride, const Between& between) {
  const int64_t bytes = stride * 4;
  const auto take_rows = [&](const uint16_t* tile) __attribute__((always_inline)) {
    OBJSLOT_TILE_LOAD(4, tile);
    OBJSLOT_TILE_LOAD(5, tile + depth * Left * tile_size);
  };
  const auto take_columns = [&](const uint16_t* tile) __attribute__((always_inline)) {
    OBJSLOT_TILE_LOAD(6, tile);
    OBJSLOT_TILE_LOAD(7, tile + depth * Right * tile_size);
  };
  const TileRegisters registers;
  for (int64_t j = 0; j < columns; j += tile_pair)
    for (int64_t i = 0; i < rows; i += tile_pair) {
      const uint16_t* row = left + i / tile_rows * depth * Left * tile_size;
      const uint16_t* column = right + j / tile_rows * depth * Right * tile_size;
      asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
      for (int64_t k = 0; k < depth; ++k, row += Left * tile_size, column += Right * tile_size) {
        take_rows(row);
        take_columns(column);
        OBJSLOT_TILE_MULTIPLY;
        if constexpr (Right == 3) {
          take_columns(column + 2 * tile_size);
          OBJSLOT_TILE_MULTIPLY;
        }
        if constexpr (Right > 1) {
          take_columns(column + tile_size);
          OBJSLOT_TILE_MULTIPLY;
        }
        if constexpr (Left > 1) {
          take_rows(row + tile_size);
          OBJSLOT_TILE_MULTIPLY;
          if constexpr (Right > 1) {
            take_columns(column);
            OBJSLOT_TILE_MULTIPLY;
          }
        }
        if constexpr (Left == 3) {
          take_rows(row + 2 * tile_size);
          OBJSLOT_TILE_MULTIPLY;
        }
      }
      float* target = out + i * stride + j;
      OBJSLOT_TILE_STORE(0, target, bytes);
      OBJSLOT_TILE_STORE(1, target + tile_rows, bytes);
      OBJSLOT_TILE_STORE(2, target + tile_rows * stride, bytes);
      OBJSLOT_TILE_STORE(3, target + tile_rows * stride + tile_rows, bytes);
      between();
    }
}

template <int Left, int Right>
static void multiply_tiles(const uint16_t* left, const uint16_t* right, int64_t rows, int64_t columns, int64_t depth,
                           float* out, int64_t stride) {
  multiply_tiles_between<Left, Right>(left, right, rows, columns, depth, out, stride, [] {});
}

}  // namespace objslot::OBJSLOT_ISA
#endif
