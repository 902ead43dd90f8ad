// Numbers as words of pairs of bfloat16, for thin matrix products on AMX tiles that are as exact as in float32.
//
// A float is the sum of three numbers of bfloat16, x = h + m + l. The wide factor of a product (keys, values, weights
// of positions), which is split once for every use, becomes words of 32 bits that each hold a pair: (h, m) and, in a
// second plane, (h, l). The thin factor becomes (h, h), (m, m) and (l, h). A tile multiplies words with words and adds
// up both halves: the three products of planes are six of the nine partial ones, and those left out are below 2^-22 of
// the factors' product, without bias. Where half types come in, fewer planes will do: see `Precision`.
//
// A block of 16 x 16 words is a tile on either side of a product: rows on the left, columns on the right.
#pragma once

#include "slot_tile.h"
#include "tile_registers.h"

#ifdef OBJSLOT_TILES

namespace objslot::OBJSLOT_ISA {

constexpr int64_t block = 16, block_words = block * block, row_blocks = tile / block;

// exact: the wide factor is bfloat16, (x, x), the thin one (h, m). twice: (h, m) against (h, h) and (m, m), 16 bits of
// both. thrice: 24 bits of both.
enum class Precision { exact = 1, twice = 2, thrice = 3 };
template <Precision P>
constexpr int64_t wide_planes = P == Precision::thrice ? 2 : 1;
template <Precision P>
constexpr int64_t thin_planes = static_cast<int64_t>(P);

// That of products of floats beside inputs of precision P.
template <Precision P>
constexpr Precision between_halves = P == Precision::thrice ? Precision::thrice : Precision::twice;

// Values that the splitting and the sums keep whole: a row whose largest entry is outside goes without tiles. A tile
// takes subnormal numbers for zero.
constexpr float least_entry = 8.0779357e-28f, most_entry = 1.1529215e18f;  // 2^-90, 2^60

OBJSLOT_INLINE int64_t blocks_of(int64_t count) { return (count + block - 1) / block; }
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

// `plane`: words from one plane to the next.
template <Precision P>
OBJSLOT_INLINE void split_wide(__m512 x, uint32_t* to, int64_t plane) {
  if constexpr (P == Precision::exact) {
    _mm512_store_si512(to, paired(low_half(bits(x)), bits(x)));
  } else {
    const __m512i top = _mm512_set1_epi32(bits_of_high), high = low_half(bits(x));
    const __m512 rest = _mm512_sub_ps(x, floats(_mm512_and_si512(bits(x), top)));
    _mm512_store_si512(to, paired(high, bits(rest)));
    if constexpr (P == Precision::thrice) {
      const __m512 last = _mm512_sub_ps(rest, floats(_mm512_and_si512(bits(rest), top)));
      _mm512_store_si512(to + plane, paired(high, bits(last)));
    }
  }
}

// To the nearest, so that what is left out has no bias.
template <Precision P>
OBJSLOT_INLINE void split_thin(__m512 x, uint32_t* to) {
  const __m512i top = _mm512_set1_epi32(bits_of_high), half = _mm512_set1_epi32(0x8000);
  const __m512i high = _mm512_and_si512(_mm512_add_epi32(bits(x), half), top);
  const __m512 rest = _mm512_sub_ps(x, floats(high));
  const __m512i middle = _mm512_and_si512(_mm512_add_epi32(bits(rest), half), top);
  if constexpr (P == Precision::exact) {
    _mm512_store_si512(to, _mm512_or_si512(low_half(high), middle));
  } else {
    _mm512_store_si512(to, _mm512_or_si512(low_half(high), high));
    _mm512_store_si512(to + block_words, _mm512_or_si512(low_half(middle), middle));
    if constexpr (P == Precision::thrice) {
      const __m512 last = _mm512_sub_ps(rest, floats(middle));
      _mm512_store_si512(to + 2 * block_words, _mm512_or_si512(low_half(bits(last)), high));
    }
  }
}

// A thin block of `count` rows (zeros beyond) of floats; transposed where asked.
template <Precision P>
OBJSLOT_INLINE void pack_thin(const float* rows, int64_t stride, int64_t count, bool transposed, uint32_t* to) {
  __m512 x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = i < count ? _mm512_loadu_ps(rows + i * stride) : _mm512_setzero_ps();
  if (transposed) transpose_block(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) split_thin<P>(x[i], to + i * block);
}

// All blocks of a matrix of floats, block by block of its columns; its sides are multiples of 16.
template <Precision P>
static void pack_matrix(const float* matrix, int64_t rows, int64_t columns, bool transposed, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += block)
    for (int64_t c = 0; c < columns; c += block, to += thin_planes<P> * block_words)
      pack_thin<P>(matrix + r * columns + c, columns, block, transposed, to);
}

// ---- the rows of a tile of positions ----

struct TileRows {
  const char* row[tile];
  int64_t count, columns;
  Element element;
  // Where there are any, rows stand for (row - mean) * inverse.
  const float *mean[tile], *inverse[tile];
  bool normalised;
  Ahead ahead;
};

OBJSLOT_INLINE __m512 widened(__m256i x) { return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// One block of columns of row j, zero past the last one.
OBJSLOT_INLINE __m512 read_part(const TileRows& rows, int64_t j, int64_t column) {
  const int64_t left = rows.columns - column;
  const __mmask16 mask = left >= block ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
  if (rows.element != Element::float32) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, reinterpret_cast<const uint16_t*>(rows.row[j]) + column);
    return rows.element == Element::bfloat16 ? widened(half) : _mm512_cvtph_ps(half);
  }
  const __m512 x = _mm512_maskz_loadu_ps(mask, reinterpret_cast<const float*>(rows.row[j]) + column);
  if (!rows.normalised) return x;
  const __m512 centred = _mm512_sub_ps(x, _mm512_set1_ps(*rows.mean[j]));
  return _mm512_maskz_mul_ps(mask, centred, _mm512_set1_ps(*rows.inverse[j]));
}

// How rows are read: whole blocks as they are or normalised, or entry by entry as far as there are any.
enum class Reading { whole, normalised, part };

// Calls body with the reading of blocks of `high` rows and `wide` columns as a constant.
template <class Body>
OBJSLOT_INLINE void with_reading(const TileRows& rows, int64_t high, int64_t wide, const Body& body) {
  if (rows.count % high || rows.columns % wide)
    body(std::integral_constant<Reading, Reading::part>());
  else if (rows.normalised)
    body(std::integral_constant<Reading, Reading::normalised>());
  else
    body(std::integral_constant<Reading, Reading::whole>());
}

// Turns a part of the rows into words, a few rows a step: (blocks of columns, planes, rows, 16). What is not there is
// zero. The steps are small, since they stand in many places of a loop.
template <Precision P, Reading R>
class Splitter {
 public:
  OBJSLOT_INLINE_MEMBER explicit Splitter(const TileRows& rows) : rows_(rows), ahead_(rows.ahead) {}

  // `height` rows from `first`, `wide` blocks of columns from `column`.
  OBJSLOT_INLINE_MEMBER void begin(int64_t first, int64_t height, int64_t column, int64_t wide, uint32_t* to) {
    first_ = row_ = first;
    end_ = first + height;
    column_ = column;
    plane_ = height * block;
    to_ = to;
    left_ = wide;
  }

  OBJSLOT_INLINE_MEMBER void step() {
    if (left_ == 0) return;
    // As much as a step reads.
    ahead_.template fetch<P == Precision::exact ? 8 : 4>();
    if constexpr (R == Reading::part) {
      read_parts();
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < height; ++j) write(j, read(row_ + j));
    }
    row_ += height;
    to_ += height * block;
    if (row_ < end_) return;
    row_ = first_;
    column_ += block;
    to_ += (wide_planes<P> - 1) * plane_;
    --left_;
  }

  OBJSLOT_INLINE_MEMBER void finish() {
    while (left_ > 0) step();
  }

 private:
  // Rows of a step; five steps go with four products of tiles.
  static constexpr int height = P == Precision::thrice ? 4 : P == Precision::twice ? 8 : 16;

  OBJSLOT_INLINE_MEMBER void write(int j, __m512 x) {
    if constexpr (P == Precision::exact)
      _mm512_store_si512(to_ + j * block, bits(x));
    else
      split_wide<P>(x, to_ + j * block, plane_);
  }
  OBJSLOT_INLINE_MEMBER __m512 read(int64_t j) const {
    if constexpr (P == Precision::thrice) {
      const __m512 x = _mm512_loadu_ps(reinterpret_cast<const float*>(rows_.row[j]) + column_);
      if constexpr (R != Reading::normalised) return x;
      return _mm512_mul_ps(_mm512_sub_ps(x, _mm512_set1_ps(*rows_.mean[j])), _mm512_set1_ps(*rows_.inverse[j]));
    } else {
      const __m256i x = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(reinterpret_cast<const uint16_t*>(rows_.row[j]) + column_));
      return P == Precision::exact ? doubled(x) : _mm512_cvtph_ps(x);
    }
  }
  static OBJSLOT_INLINE_MEMBER __m512 doubled(__m256i x) {
    const __m512i word = _mm512_cvtepu16_epi32(x);
    return floats(_mm512_or_si512(word, _mm512_slli_epi32(word, 16)));
  }
  __attribute__((noinline)) void read_parts() {
    for (int j = 0; j < height; ++j) {
      const __m512 x = row_ + j < rows_.count ? read_part(rows_, row_ + j, column_) : _mm512_setzero_ps();
      write(j, P == Precision::exact ? floats(paired(low_half(bits(x)), bits(x))) : x);
    }
  }

  const TileRows& rows_;
  Ahead ahead_;
  int64_t first_ = 0, row_ = 0, end_ = 0, column_ = 0, plane_ = 0, left_ = 0;
  uint32_t* to_ = nullptr;
};

}  // namespace objslot::OBJSLOT_ISA
#endif
