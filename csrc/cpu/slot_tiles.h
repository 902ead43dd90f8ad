// The thin matrix products of slot attention on AMX tiles: rows of keys or values, split while the tiles multiply, with
// the slots, and the weights of the rows with the rows.
#pragma once

#include "slot_words.h"

#ifdef OBJSLOT_TILES
namespace objslot::OBJSLOT_ISA {

#define OBJSLOT_LOAD(register, base, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #register ::"r"(base), "r"(static_cast<int64_t>(bytes)) : "memory")
#define OBJSLOT_STORE(register, base, bytes) \
  asm volatile("tilestored %%tmm" #register ", (%0,%1,1)" ::"r"(base), "r"(static_cast<int64_t>(bytes)) : "memory")
#define OBJSLOT_MULTIPLY(sums, left, right) asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sums::)

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
#define OBJSLOT_ADD(sums, wide, thin)   \
  if constexpr (wide_left)              \
    OBJSLOT_MULTIPLY(sums, wide, thin); \
  else                                  \
    OBJSLOT_MULTIPLY(sums, thin, wide)
#define OBJSLOT_ADD_PLANE(thin, from, plane) \
  OBJSLOT_LOAD(thin, plane, 64);             \
  OBJSLOT_LOAD(6, from, 64);                 \
  OBJSLOT_ADD(0, 6, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(7, (from) + next, 64);        \
  OBJSLOT_ADD(1, 7, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(6, (from) + 2 * next, 64);    \
  OBJSLOT_ADD(2, 6, thin);                   \
  between();                                 \
  OBJSLOT_LOAD(7, (from) + 3 * next, 64);    \
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

// The four sums += two wide blocks, `next` words apart, times two thin ones, `thin_next` apart: sum 0 of the first
// ones, 1 of the second thin one, 2 of the second wide one, 3 of both second ones.
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

}  // namespace objslot::OBJSLOT_ISA
#endif
