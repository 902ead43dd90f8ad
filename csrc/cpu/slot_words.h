// Numbers as words of pairs of bfloat16, for matrix products on AMX tiles that are as exact as in float32.
//
// A float is the sum of three numbers of bfloat16, x = h + m + l: its parts. Of the nine products of two such sums the
// six largest are added; those left out are below 2^-22 of the factors' product, without bias. Numbers of half types
// take fewer parts: see `Precision`.
//
// A word of 32 bits holds a part of two numbers that are 16 places of the inner dimension apart, and a block of 16 x 16
// words covers 32 places: one row of it for each row of a left factor, one column for each column of a right one. The
// parts of a block follow one another.
#pragma once

#include "slot_tile.h"
#include "tile_registers.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

constexpr int64_t block = 16, block_words = block * block, block_depth = 2 * block;
// Blocks that cover the positions of a tile as inner dimension.
constexpr int64_t tile_depth = tile / block_depth;

// What keys and values are made of: numbers of bfloat16; two, as many as float16 takes; or three.
enum class Precision { exact, twice, thrice };
template <Precision P>
constexpr int row_parts = P == Precision::exact   ? 1
                          : P == Precision::twice ? 2
                                                  : 3;
// Slots, weights and their gradients: floats that meet such rows.
template <Precision P>
constexpr int slot_parts = P == Precision::thrice ? 3 : 2;

// Slots alone, where nothing has been multiplied with them: queries are numbers of bfloat16, or as good as those.
template <Precision P>
constexpr int query_parts = P == Precision::exact ? 1 : slot_parts<P>;

// Values that the splitting and the sums keep whole: a row whose largest entry is outside goes without tiles. A tile
// takes subnormal numbers for zero.
constexpr float least_entry = 8.0779357e-28f, most_entry = 1.1529215e18f;  // 2^-90, 2^60

OBJSLOT_INLINE int64_t blocks_of(int64_t count) { return (count + block - 1) / block; }
OBJSLOT_INLINE int64_t depth_of(int64_t count) { return (count + block_depth - 1) / block_depth; }
// Sums are made four blocks at once.
OBJSLOT_INLINE int64_t quads_of(int64_t count) { return (count + 4 * block - 1) / (4 * block); }

// ---- splitting ----

constexpr int bits_of_high = -65536;

OBJSLOT_INLINE __m512i bits(__m512 x) { return _mm512_castps_si512(x); }
OBJSLOT_INLINE __m512 floats(__m512i x) { return _mm512_castsi512_ps(x); }
OBJSLOT_INLINE __m512i low_half(__m512i x) { return _mm512_srli_epi32(x, 16); }
// (low, high half of x)
OBJSLOT_INLINE __m512i paired(__m512i low, __m512i x) {
  return _mm512_ternarylogic_epi32(low, x, _mm512_set1_epi32(bits_of_high), 0xf8);
}

// Two vectors to the nearest numbers of bfloat16: whoever has tiles of them has the instruction.
OBJSLOT_INLINE __m512i nearest_bfloat16(__m512 low, __m512 high) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return both;
}

// Words of x and y, cut: all parts together are the numbers themselves.
template <int Parts>
OBJSLOT_INLINE void split_cut(__m512 x, __m512 y, uint32_t* to) {
  const __m512i top = _mm512_set1_epi32(bits_of_high);
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    _mm512_store_si512(to + part * block_words, paired(low_half(bits(x)), bits(y)));
    if (part + 1 == Parts) return;
    x = _mm512_sub_ps(x, floats(_mm512_and_si512(bits(x), top)));
    y = _mm512_sub_ps(y, floats(_mm512_and_si512(bits(y), top)));
  }
}

// Words of x and y, every part to the nearest, so that what is left out has no bias.
template <int Parts>
OBJSLOT_INLINE void split_nearest(__m512 x, __m512 y, uint32_t* to) {
  const __m512i top = _mm512_set1_epi32(bits_of_high), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    const __m512i first = _mm512_and_si512(_mm512_add_epi32(bits(x), half), top);
    const __m512i second = _mm512_and_si512(_mm512_add_epi32(bits(y), half), top);
    _mm512_store_si512(to + part * block_words, _mm512_or_si512(low_half(first), second));
    x = _mm512_sub_ps(x, floats(first));
    y = _mm512_sub_ps(y, floats(second));
  }
}

// Rows (lanes, columns) of floats as right factors of products with rows of keys: (blocks of lanes, depth, parts).
// Sides are multiples of 16. `exact` rows of keys pair neighbouring places.
template <Precision P, int parts = slot_parts<P>>
static void pack_lanes_right(const float* rows, int64_t lanes, int64_t columns, uint32_t* to) {
  for (int64_t lane = 0; lane < lanes; lane += block)
    for (int64_t d = 0; d < columns; d += block_depth, to += parts * block_words) {
      __m512 place[block_depth];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int64_t from = d + h * block;
        for (int i = 0; i < block; ++i)
          place[h * block + i] =
              from < columns ? _mm512_loadu_ps(rows + (lane + i) * columns + from) : _mm512_setzero_ps();
        transpose_block(place + h * block);
      }
      for (int64_t i = 0; i < block; ++i)
        if constexpr (P == Precision::exact)
          split_nearest<parts>(place[2 * i], place[2 * i + 1], to + i * block);
        else
          split_nearest<parts>(place[i], place[block + i], to + i * block);
    }
}

// The same rows as right factors of products over the lanes: (blocks of columns, depth of the lanes, parts).
template <int Parts>
static void pack_lanes_deep(const float* rows, int64_t lanes, int64_t columns, uint32_t* to) {
  for (int64_t c = 0; c < columns; c += block)
    for (int64_t lane = 0; lane < lanes; lane += block_depth, to += Parts * block_words)
      for (int64_t i = 0; i < block; ++i) {
        const float* const row = rows + (lane + i) * columns + c;
        split_nearest<Parts>(_mm512_loadu_ps(row),
                             lane + block < lanes ? _mm512_loadu_ps(row + block * columns) : _mm512_setzero_ps(),
                             to + i * block);
      }
}

// Weights (count, lanes) as left factors of products over the lanes: (blocks of rows, depth of the lanes, parts).
template <int Parts>
static void pack_weights_wide(const float* weights, int64_t count, int64_t lanes, uint32_t* to) {
  const int64_t depth = depth_of(lanes);
  for (int64_t j = 0; j < count; ++j) {
    uint32_t* at = to + j / block * depth * Parts * block_words + j % block * block;
    for (int64_t lane = 0; lane < lanes; lane += block_depth, at += Parts * block_words) {
      const float* const row = weights + j * lanes + lane;
      split_nearest<Parts>(_mm512_loadu_ps(row),
                           lane + block < lanes ? _mm512_loadu_ps(row + block) : _mm512_setzero_ps(), at);
    }
  }
}

// Weights (count, lanes), transposed, as left factors of products over positions: (blocks of lanes, depth of the tile,
// parts); nothing where there is no position.
template <int Parts>
static void pack_weights_turned(const float* weights, int64_t count, int64_t lanes, uint32_t* to) {
  for (int64_t lane = 0; lane < lanes; lane += block)
    for (int64_t j = 0; j < tile; j += block_depth, to += Parts * block_words) {
      if (j >= count) continue;
      __m512 half[2][block];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int64_t from = j + h * block;
        for (int i = 0; i < block; ++i)
          half[h][i] = from + i < count ? _mm512_loadu_ps(weights + (from + i) * lanes + lane) : _mm512_setzero_ps();
        transpose_block(half[h]);
      }
      for (int64_t i = 0; i < block; ++i) split_nearest<Parts>(half[0][i], half[1][i], to + i * block);
    }
}

}  // namespace objslot::OBJSLOT_ISA
#endif
