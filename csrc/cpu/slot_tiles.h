// Thin matrix products on AMX tiles of bfloat16, as exact as sums of products in float32.
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

#if defined(__AVX512F__) && defined(__linux__)
#define OBJSLOT_SLOT_TILES

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

// Rows and columns of 16 x 16 floats exchanged.
OBJSLOT_INLINE void transpose(__m512* rows) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = bits(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now a[4 g + c] holds, in its quarter q, column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44),
                  high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    rows[c] = floats(_mm512_shuffle_i32x4(low, low2, 0x88));
    rows[4 + c] = floats(_mm512_shuffle_i32x4(low, low2, 0xdd));
    rows[8 + c] = floats(_mm512_shuffle_i32x4(high, high2, 0x88));
    rows[12 + c] = floats(_mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// A thin block of `count` rows (zeros beyond) of floats; transposed where asked.
template <Precision P>
OBJSLOT_INLINE void pack_thin(const float* rows, int64_t stride, int64_t count, bool transposed, uint32_t* to) {
  __m512 x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = i < count ? _mm512_loadu_ps(rows + i * stride) : _mm512_setzero_ps();
  if (transposed) transpose(x);
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

// ---- products ----

// Tile registers of one thread, all of 16 rows of 64 bytes.
class TileRegisters {
 public:
  OBJSLOT_INLINE_MEMBER explicit TileRegisters(bool used) : used_(used) {
    if (!used) return;
    alignas(64) uint8_t configuration[64] = {1};
    for (int index = 0; index < 8; ++index) {
      configuration[16 + 2 * index] = 64;
      configuration[48 + index] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  OBJSLOT_INLINE_MEMBER ~TileRegisters() {
    if (used_) asm volatile("tilerelease" ::);
  }

 private:
  bool used_;
};

#define OBJSLOT_LOAD(register, base, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #register ::"r"(base), "r"(static_cast<int64_t>(bytes)) : "memory")
#define OBJSLOT_STORE(register, base, bytes) \
  asm volatile("tilestored %%tmm" #register ", (%0,%1,1)" ::"r"(base), "r"(static_cast<int64_t>(bytes)) : "memory")
#define OBJSLOT_MULTIPLY(sums, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sums ::)

OBJSLOT_INLINE void clear_sums() {
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::);
}
// Four tiles of floats, `next` floats apart.
OBJSLOT_INLINE void load_sums(const float* from, int64_t next, int64_t stride) {
  OBJSLOT_LOAD(0, from, stride * 4);
  OBJSLOT_LOAD(1, from + next, stride * 4);
  OBJSLOT_LOAD(2, from + 2 * next, stride * 4);
  OBJSLOT_LOAD(3, from + 3 * next, stride * 4);
}
OBJSLOT_INLINE void store_sums(float* to, int64_t next, int64_t stride) {
  OBJSLOT_STORE(0, to, stride * 4);
  OBJSLOT_STORE(1, to + next, stride * 4);
  OBJSLOT_STORE(2, to + 2 * next, stride * 4);
  OBJSLOT_STORE(3, to + 3 * next, stride * 4);
}

// The four sums += four wide blocks, `next` words apart, times a thin one; wide ones on the left or on the right.
#define OBJSLOT_ADD(sums, wide, thin)       \
  if constexpr (wide_left)                  \
    OBJSLOT_MULTIPLY(sums, wide, thin);     \
  else                                      \
    OBJSLOT_MULTIPLY(sums, thin, wide)
#define OBJSLOT_ADD_PLANE(thin, from, plane) \
  OBJSLOT_LOAD(thin, plane, 64);             \
  OBJSLOT_LOAD(6, from, 64);                 \
  OBJSLOT_ADD(0, 6, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(7, from + next, 64);          \
  OBJSLOT_ADD(1, 7, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(6, from + 2 * next, 64);      \
  OBJSLOT_ADD(2, 6, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(7, from + 3 * next, 64);      \
  OBJSLOT_ADD(3, 7, thin);                   \
  between();                                 \
  between()

// `between` is work for the other units of the processor, done while the tiles multiply.
template <Precision P, bool wide_left, class Between>
OBJSLOT_INLINE void multiply_add(const uint32_t* wide, int64_t next, int64_t plane, const uint32_t* thin,
                                 const Between& between) {
  OBJSLOT_ADD_PLANE(4, wide, thin);
  if constexpr (P != Precision::exact) {
    OBJSLOT_ADD_PLANE(5, wide, thin + block_words);
  }
  if constexpr (P == Precision::thrice) {
    OBJSLOT_ADD_PLANE(4, wide + plane, thin + 2 * block_words);
  }
}

// The four sums += two wide blocks, `next` words apart, times two thin ones, `thin_next` apart: sum 0 of the first ones,
// 1 of the second thin one, 2 of the second wide one, 3 of both second ones.
#define OBJSLOT_ADD_SQUARE \
  OBJSLOT_ADD(0, 4, 6);    \
  between();               \
  OBJSLOT_ADD(2, 5, 6);    \
  between();               \
  OBJSLOT_ADD(1, 4, 7);    \
  between();               \
  OBJSLOT_ADD(3, 5, 7);    \
  between()

template <Precision P, bool wide_left, class Between>
OBJSLOT_INLINE void multiply_add_square(const uint32_t* wide, int64_t next, int64_t plane, const uint32_t* thin,
                                        int64_t thin_next, const Between& between) {
  OBJSLOT_LOAD(4, wide, 64);
  OBJSLOT_LOAD(5, wide + next, 64);
  OBJSLOT_LOAD(6, thin, 64);
  OBJSLOT_LOAD(7, thin + thin_next, 64);
  OBJSLOT_ADD_SQUARE;
  if constexpr (P != Precision::exact) {
    OBJSLOT_LOAD(6, thin + block_words, 64);
    OBJSLOT_LOAD(7, thin + thin_next + block_words, 64);
    OBJSLOT_ADD_SQUARE;
  }
  if constexpr (P == Precision::thrice) {
    OBJSLOT_LOAD(4, wide + plane, 64);
    OBJSLOT_LOAD(5, wide + next + plane, 64);
    OBJSLOT_LOAD(6, thin + 2 * block_words, 64);
    OBJSLOT_LOAD(7, thin + thin_next + 2 * block_words, 64);
    OBJSLOT_ADD_SQUARE;
  }
}

// Rows are split part by part, each part while the one before it is multiplied: its words stay in the first cache.
// Blocks of columns in a part of `multiply_rows`, blocks of rows in one of `gather_rows`.
OBJSLOT_INLINE int64_t part_columns(int64_t lanes) { return lanes > block ? 2 : 1; }
OBJSLOT_INLINE int64_t part_rows(int64_t lanes) { return lanes > block ? 2 : 1; }

// Words that these two work in.
template <Precision P>
OBJSLOT_INLINE int64_t words_of(int64_t lanes) {
  const int64_t rows = 4 * part_rows(lanes), columns = row_blocks * part_columns(lanes);
  return 2 * (rows > columns ? rows : columns) * wide_planes<P> * block_words;
}

template <Precision P, Reading R>
static void multiply_rows_as(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* out) {
  const int64_t columns = blocks_of(rows.columns), used = blocks_of(rows.count) * block, wide = part_columns(lanes);
  const int64_t plane = used * block, step = wide_planes<P> * plane;
  Splitter<P, R> splitter(rows);
  const auto begin = [&](int64_t column) {
    const int64_t left = columns - column;
    splitter.begin(0, used, column * block, left < wide ? left : wide, words + column / wide % 2 * wide * step);
  };
  const auto between = [&]() __attribute__((always_inline)) { splitter.step(); };
  begin(0);
  splitter.finish();
  if (lanes == block) clear_sums();
  for (int64_t column = 0; column < columns; column += wide) {
    const uint32_t* const at = words + column / wide % 2 * wide * step;
    if (column + wide < columns) begin(column + wide);
    for (int64_t lane = 0; lane < lanes; lane += block) {
      if (lanes > block) {
        if (column == 0)
          clear_sums();
        else
          load_sums(out + lane, block * lanes, lanes);
      }
      const uint32_t* with = thin + (lane / block * columns + column) * thin_planes<P> * block_words;
      for (int64_t c = 0; c < wide && column + c < columns; ++c, with += thin_planes<P> * block_words)
        multiply_add<P, true>(at + c * step, block_words, plane, with, between);
      if (lanes > block) store_sums(out + lane, block * lanes, lanes);
    }
    splitter.finish();
  }
  if (lanes == block) store_sums(out, block * lanes, lanes);
}

// The same for pairs of blocks of lanes: sums of 32 rows and 32 lanes stay in the registers, and the rows are split
// anew for each pair of blocks.
template <Precision P, Reading R>
static void multiply_pairs_as(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* out) {
  const int64_t columns = blocks_of(rows.columns), used = blocks_of(rows.count) * block;
  constexpr int64_t plane = 2 * block_words, step = wide_planes<P> * plane;
  const int64_t thin_next = columns * thin_planes<P> * block_words;
  Splitter<P, R> splitter(rows);
  int64_t part = 0;
  const auto begin = [&](int64_t row, int64_t column) {
    splitter.begin(row, 2 * block, column * block, 1, words + part++ % 2 * step);
  };
  const auto between = [&]() __attribute__((always_inline)) { splitter.step(); };
  begin(0, 0);
  splitter.finish();
  for (int64_t row = 0; row < used; row += 2 * block)
    for (int64_t lane = 0; lane < lanes; lane += 2 * block) {
      const uint32_t* with = thin + lane / block * thin_next;
      clear_sums();
      for (int64_t c = 0; c < columns; ++c, with += thin_planes<P> * block_words) {
        const uint32_t* const at = words + (part - 1) % 2 * step;
        if (c + 1 < columns)
          begin(row, c + 1);
        else if (lane + 2 * block < lanes)
          begin(row, 0);
        else if (row + 2 * block < used)
          begin(row + 2 * block, 0);
        multiply_add_square<P, true>(at, block_words, plane, with, thin_next, between);
        splitter.finish();
      }
      float* const target = out + row * lanes + lane;
      OBJSLOT_STORE(0, target, lanes * 4);
      OBJSLOT_STORE(1, target + block, lanes * 4);
      OBJSLOT_STORE(2, target + block * lanes, lanes * 4);
      OBJSLOT_STORE(3, target + block * lanes + block, lanes * 4);
    }
}

// out (tile, lanes) = rows times the transposed thin matrix (lanes, columns), packed.
template <Precision P>
static void multiply_rows(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* out) {
  if (lanes % (2 * block) == 0)
    with_reading(rows, 2 * block, block,
                 [&](auto reading) { multiply_pairs_as<P, reading()>(rows, thin, lanes, words, out); });
  else
    with_reading(rows, block, block,
                 [&](auto reading) { multiply_rows_as<P, reading()>(rows, thin, lanes, words, out); });
}

template <Precision P, Reading R>
static void gather_rows_as(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* sums) {
  const int64_t quads = quads_of(rows.columns), stride = quads * 4 * block, used = blocks_of(rows.count);
  const int64_t high = part_rows(lanes), groups = (used + high - 1) / high, parts = quads * groups;
  const int64_t size = 4 * wide_planes<P> * high * block_words;
  if (parts == 0) return;
  Splitter<P, R> splitter(rows);
  const auto height_of = [&](int64_t group) {
    const int64_t left = used - group * high;
    return left < high ? left : high;
  };
  int64_t part = 0;
  const auto begin = [&](int64_t quad, int64_t group) {
    splitter.begin(group * high * block, height_of(group) * block, quad * 4 * block, 4, words + part++ % 2 * size);
  };
  const auto between = [&]() __attribute__((always_inline)) { splitter.step(); };
  begin(0, 0);
  splitter.finish();
  for (int64_t quad = 0; quad < quads; ++quad)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t height = height_of(group), plane = height * block_words, step = wide_planes<P> * plane;
      const uint32_t* const at = words + (part - 1) % 2 * size;
      if (part < parts) begin(group + 1 < groups ? quad : quad + 1, group + 1 < groups ? group + 1 : 0);
      for (int64_t lane = 0; lane < lanes; lane += block) {
        float* const target = sums + lane * stride + quad * 4 * block;
        const uint32_t* with = thin + (lane / block * row_blocks + group * high) * thin_planes<P> * block_words;
        if (lanes > block || group == 0) load_sums(target, block, stride);
        for (int64_t j = 0; j < height; ++j, with += thin_planes<P> * block_words)
          multiply_add<P, false>(at + j * block_words, step, plane, with, between);
        if (lanes > block || group + 1 == groups) store_sums(target, block, stride);
      }
      splitter.finish();
    }
}

// The same for pairs of blocks of lanes.
template <Precision P, Reading R>
static void gather_pairs_as(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* sums) {
  const int64_t columns = 4 * quads_of(rows.columns), stride = columns * block, used = blocks_of(rows.count);
  constexpr int64_t plane = block_words, step = wide_planes<P> * plane, thin_size = thin_planes<P> * block_words;
  if (used == 0) return;
  Splitter<P, R> splitter(rows);
  int64_t part = 0;
  const auto begin = [&](int64_t row, int64_t column) {
    splitter.begin(row * block, block, column * block, 2, words + part++ % 2 * 2 * step);
  };
  const auto between = [&]() __attribute__((always_inline)) { splitter.step(); };
  begin(0, 0);
  splitter.finish();
  for (int64_t lane = 0; lane < lanes; lane += 2 * block)
    for (int64_t c = 0; c < columns; c += 2) {
      float* const target = sums + lane * stride + c * block;
      OBJSLOT_LOAD(0, target, stride * 4);
      OBJSLOT_LOAD(1, target + block * stride, stride * 4);
      OBJSLOT_LOAD(2, target + block, stride * 4);
      OBJSLOT_LOAD(3, target + block * stride + block, stride * 4);
      for (int64_t j = 0; j < used; ++j) {
        const uint32_t* const at = words + (part - 1) % 2 * 2 * step;
        if (j + 1 < used)
          begin(j + 1, c);
        else if (c + 2 < columns)
          begin(0, c + 2);
        else if (lane + 2 * block < lanes)
          begin(0, 0);
        multiply_add_square<P, false>(at, step, plane, thin + (lane / block * row_blocks + j) * thin_size,
                                      row_blocks * thin_size, between);
        splitter.finish();
      }
      OBJSLOT_STORE(0, target, stride * 4);
      OBJSLOT_STORE(1, target + block * stride, stride * 4);
      OBJSLOT_STORE(2, target + block, stride * 4);
      OBJSLOT_STORE(3, target + block * stride + block, stride * 4);
    }
}

// sums (lanes, 64 quads) += the transposed thin matrix (tile, lanes), packed, times the rows.
template <Precision P>
static void gather_rows(const TileRows& rows, const uint32_t* thin, int64_t lanes, uint32_t* words, float* sums) {
  if (lanes % (2 * block) == 0)
    with_reading(rows, block, 4 * block,
                 [&](auto reading) { gather_pairs_as<P, reading()>(rows, thin, lanes, words, sums); });
  else
    with_reading(rows, block, 4 * block,
                 [&](auto reading) { gather_rows_as<P, reading()>(rows, thin, lanes, words, sums); });
}

// The weights (count, lanes) of a tile, transposed, as thin blocks: (blocks of lanes, blocks of rows).
template <Precision P>
static void pack_weights(const float* weights, int64_t count, int64_t lanes, uint32_t* to) {
  for (int64_t lane = 0; lane < lanes; lane += block)
    for (int64_t j = 0; j < row_blocks; ++j, to += thin_planes<P> * block_words)
      if (j * block < count) pack_thin<P>(weights + j * block * lanes + lane, lanes, count - j * block, true, to);
}

// ---- what the kernels on tiles share ----

// Whether tiles are there and pay. Splitting the keys and values of float32 takes as long as multiplying them with one
// block of lanes without tiles.
OBJSLOT_INLINE bool tiles_serve(const SlotAttentionProblem& p) {
  if (p.element == Element::float64 || p.positions < block || p.width < block || p.value_width < block) return false;
  if (p.element == Element::float32 && layout_of<float>(p.groups, p.slots).lanes <= block) return false;
  return has_tiles();
}

// The live rows of keys or values from position `from` on.
OBJSLOT_INLINE void point_to(TileRows& rows, const void* base, Element element, int64_t offset, int64_t stride,
                             int64_t columns, int64_t from, const Live<float>& live) {
  const int64_t size = element == Element::float32 ? 4 : 2;
  const char* const begin = static_cast<const char*>(base) + (offset + from * stride) * size;
  for (int64_t j = 0; j < live.count; ++j) rows.row[j] = begin + (live.all ? j : live.index[j]) * stride * size;
  rows.count = live.count;
  rows.columns = columns;
  rows.element = element;
  rows.normalised = false;
}

// The rows stand for normalised ones.
OBJSLOT_INLINE void normalise(TileRows& rows, const SlotAttentionProblem& p, int64_t batch, int64_t from,
                              const Live<float>& live) {
  const int64_t begin = batch * p.positions + from;
  for (int64_t j = 0; j < live.count; ++j) {
    const int64_t at = begin + (live.all ? j : live.index[j]);
    rows.mean[j] = static_cast<const float*>(p.row_mean) + at;
    rows.inverse[j] = static_cast<const float*>(p.row_inverse) + at;
  }
  rows.normalised = true;
}

// Rows of the next tile, where they are one piece of memory.
OBJSLOT_INLINE Ahead tile_ahead(const void* base, Element element, int64_t offset, int64_t stride, int64_t columns,
                                int64_t from, int64_t end) {
  if (!base || stride != columns || from >= end) return {};
  const int64_t size = element == Element::float32 ? 4 : 2, count = end - from < tile ? end - from : tile;
  const char* const begin = static_cast<const char*>(base) + (offset + from * stride) * size;
  return {begin, begin + count * stride * size};
}

// Calls body with the precision that an element type needs as a constant.
template <class Body>
OBJSLOT_INLINE auto with_precision(Element element, const Body& body) {
  if (element == Element::float32) return body(std::integral_constant<Precision, Precision::thrice>());
  if (element == Element::float16) return body(std::integral_constant<Precision, Precision::twice>());
  return body(std::integral_constant<Precision, Precision::exact>());
}

// ---- what the products can be trusted with ----

// Whether the largest entry of every row is zero or of a size that tiles keep; false for NaN.
OBJSLOT_INLINE bool sound_rows(const float* rows, int64_t count, int64_t stride, int64_t columns) {
  const __m512 most = _mm512_set1_ps(most_entry);
  for (int64_t i = 0; i < count; ++i) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 beyond = 0;
    for (int64_t d = 0; d < columns; d += block) {
      const int64_t left = columns - d;
      const __mmask16 mask = left >= block ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
      const __m512 x = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, rows + i * stride + d));
      beyond |= _mm512_cmp_ps_mask(x, most, _CMP_NLE_UQ);
      top = _mm512_max_ps(top, x);
    }
    const float largest = _mm512_reduce_max_ps(top);
    if (beyond || (largest != 0 && largest < least_entry)) return false;
  }
  return true;
}

// products (count, lanes) = products * factor + constant. Returns whether all of them were finite and small enough,
// and the largest, where `least` says so, large enough.
OBJSLOT_INLINE bool finish_products(float* products, int64_t count, int64_t lanes, float factor, const float* constant,
                            bool least) {
  const __m512 scale = _mm512_set1_ps(factor), most = _mm512_set1_ps(most_entry * most_entry);
  __m512 top = _mm512_setzero_ps();
  __mmask16 beyond = 0;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t z = 0; z < lanes; z += block) {
      float* const at = products + j * lanes + z;
      const __m512 x = _mm512_loadu_ps(at), size = _mm512_abs_ps(x);
      beyond |= _mm512_cmp_ps_mask(size, most, _CMP_NLE_UQ);
      top = _mm512_max_ps(top, size);
      _mm512_storeu_ps(at, _mm512_fmadd_ps(x, scale, _mm512_loadu_ps(constant + z)));
    }
  const float largest = _mm512_reduce_max_ps(top);
  return !beyond && !(least && largest != 0 && largest < least_entry);
}

}  // namespace objslot::OBJSLOT_ISA
#endif
