// Cosines to within a margin, on AMX tiles: they tell which keys cannot be among the best of any query, at a tenth of
// the price of the exact cosines.
#pragma once

#include "tile_products.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

// A number rounded to bfloat16 is off by 2^-8 of itself at most, so a product of two unit vectors by 2^-7 + 2^-16; the
// rest is for sums in float32.
constexpr float rough_margin = 1.01f / 128;
// Keys whose length lies outside are not told apart: tiles take denormal numbers for zero, and sums may overflow.
constexpr float shortest_rough = 1e-15f, longest_rough = 1e15f;

// The vector, of which the upper halves of the words are then the nearest numbers of bfloat16.
OBJSLOT_INLINE __m512 rounded(__m512 x) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
}

// Tiles of queries, columns of the products, from unit rows packed[d][lane] of one panel.
template <int64_t Lanes>
static void round_queries(const float* packed, int64_t features, uint16_t* tiles) {
  const int64_t depth = depth_blocks(features);
  for (int64_t lane = 0; lane < Lanes; lane += tile_rows)
    for (int64_t d = 0; d < depth * tile_depth; d += 2, tiles += tile_depth) {
      const auto part = [&](int64_t at) {
        return at < features ? rounded(_mm512_load_ps(packed + at * Lanes + lane)) : _mm512_setzero_ps();
      };
      put_pairs<1>(part(d), part(d + 1), tiles);
    }
}

// Tiles of `count` keys, rows of the products; zeros fill the last pair of tiles.
static void round_keys(const float* rows, int64_t stride, int64_t count, int64_t features, uint16_t* tiles) {
  const int64_t depth = depth_blocks(features);
  for (int64_t j = 0; j < whole_tiles(count); ++j) {
    uint16_t* row = tiles + j / tile_rows * depth * tile_size + j % tile_rows * tile_depth;
    for (int64_t d = 0; d < depth * tile_depth; d += tile_depth, row += tile_size) {
      const auto part = [&](int64_t at) {
        const __mmask16 lanes = j < count ? lanes_upto(features - at) : 0;
        return rounded(_mm512_maskz_loadu_ps(lanes, rows + j * stride + at));
      };
      put_row<1>(part(d), part(d + 16), row);
    }
  }
}

// Which of `count` keys may have a cosine above the threshold of one of 16 queries; their number.
template <int64_t Lanes>
OBJSLOT_INLINE int64_t candidates(const float* products, const float* lengths, const float* threshold, int64_t count,
                                  uint8_t* found) {
  const __m512 least = _mm512_loadu_ps(threshold);
  const __mmask16 settled =
      _mm512_cmp_ps_mask(least, _mm512_set1_ps(std::numeric_limits<float>::infinity()), _CMP_EQ_OQ);
  int64_t number = 0;
  for (int64_t j = 0; j < count; ++j) {
    const float inverse = lengths[j];
    const bool told_apart = inverse > 1 / longest_rough && inverse < 1 / shortest_rough;
    const __m512 most =
        _mm512_fmadd_ps(_mm512_loadu_ps(products + j * Lanes), _mm512_set1_ps(inverse), _mm512_set1_ps(rough_margin));
    // Written so that NaN counts as above.
    const unsigned below = settled | _mm512_cmp_ps_mask(most, least, _CMP_LE_OQ);
    found[number] = static_cast<uint8_t>(j);
    number += below != 0xffff || !told_apart;
  }
  return number;
}

// sums[r][16 queries] of the exact products of rows[which[r]], in the order of `dots`, so that they have its bits.
template <int R, int64_t Lanes>
OBJSLOT_INLINE void exact_products(const float* rows, int64_t stride, const uint8_t* which, int64_t features,
                                   const float* packed, float* sums) {
  const float* base[R];
  __m512 total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    base[r] = rows + which[r] * stride;
    total[r] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < features; ++d) {
    const __m512 query = _mm512_load_ps(packed + d * Lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r] = _mm512_fmadd_ps(_mm512_set1_ps(base[r][d]), query, total[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) _mm512_store_ps(sums + r * tile_rows, total[r]);
}

}  // namespace objslot::OBJSLOT_ISA
#endif
