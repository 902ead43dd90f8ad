// The thin matrix products of slot attention on AMX tiles: rows of keys or values, split while the tiles multiply, with
// the slots, and the weights of the rows with the rows.
#pragma once

#include "slot_splitter.h"

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

// How many blocks of rows by blocks of columns the four sums are: two by two (of which the second row or column may be
// missing), four by one, one by four.
enum class Sums { square, tall, wide };

// Sums of a product, (rows, columns) of `stride` floats.
template <Sums S>
OBJSLOT_INLINE void load_sums(const float* from, int64_t stride, bool second_row = true) {
  const int64_t down = block * stride;
  OBJSLOT_LOAD(0, from, stride * 4);
  OBJSLOT_LOAD(1, from + (S == Sums::tall ? down : block), stride * 4);
  if (S == Sums::square && !second_row) return;
  OBJSLOT_LOAD(2, from + (S == Sums::tall ? 2 * down : S == Sums::wide ? 2 * block : down), stride * 4);
  OBJSLOT_LOAD(3, from + (S == Sums::tall ? 3 * down : S == Sums::wide ? 3 * block : down + block), stride * 4);
}
template <Sums S>
OBJSLOT_INLINE void store_sums(float* to, int64_t stride, bool second_row = true, bool second_column = true) {
  const int64_t down = block * stride;
  OBJSLOT_STORE(0, to, stride * 4);
  if (S != Sums::square || second_column) OBJSLOT_STORE(1, to + (S == Sums::tall ? down : block), stride * 4);
  if (S == Sums::square && !second_row) return;
  OBJSLOT_STORE(2, to + (S == Sums::tall ? 2 * down : S == Sums::wide ? 2 * block : down), stride * 4);
  if (S != Sums::square || second_column)
    OBJSLOT_STORE(3, to + (S == Sums::tall ? 3 * down : S == Sums::wide ? 3 * block : down + block), stride * 4);
}

// A factor at one place of the inner dimension: its first block, words to the next block and part, bytes of a row.
struct Blocks {
  const uint32_t* at;
  int64_t next, part = block_words, row = 64;
  OBJSLOT_INLINE_MEMBER const uint32_t* of(int64_t index, int64_t which) const {
    return at + index * next + which * part;
  }
};

// Products of part `i` of the left factor with part `j` of the right one, for i + j below the larger number of parts.
// `between` is work for the other units of the processor, done while the tiles multiply.
template <int Left, int Right, bool second_row, bool second_column, class Between>
OBJSLOT_INLINE void multiply_square(const Blocks& left, const Blocks& right, const Between& between) {
  const auto take_left = [&](int part) __attribute__((always_inline)) {
    OBJSLOT_LOAD(4, left.of(0, part), left.row);
    if constexpr (second_row) OBJSLOT_LOAD(5, left.of(1, part), left.row);
  };
  const auto take_right = [&](int part) __attribute__((always_inline)) {
    OBJSLOT_LOAD(6, right.of(0, part), right.row);
    if constexpr (second_column) OBJSLOT_LOAD(7, right.of(1, part), right.row);
  };
  const auto add = [&]() __attribute__((always_inline)) {
    OBJSLOT_MULTIPLY(0, 4, 6);
    if constexpr (second_row) OBJSLOT_MULTIPLY(2, 5, 6);
    if constexpr (second_column) OBJSLOT_MULTIPLY(1, 4, 7);
    if constexpr (second_row && second_column) OBJSLOT_MULTIPLY(3, 5, 7);
    between();
  };
  if constexpr (Left > 1) {
    take_left(1);
    if constexpr (Right == 3) {
      take_right(1);
      add();
    }
    take_right(0);
    add();
    if constexpr (Left == 3) {
      take_left(2);
      add();
    }
    take_left(0);
    add();
  } else {
    take_left(0);
    take_right(0);
    add();
  }
  if constexpr (Right > 1) {
    take_right(1);
    add();
  }
  if constexpr (Right == 3) {
    take_right(2);
    add();
  }
}

// Four blocks of one factor, `many`, by one of the other.
template <int Many, int One, bool many_left, class Between>
OBJSLOT_INLINE void multiply_strip(const Blocks& many, const Blocks& one, const Between& between) {
  constexpr int parts = Many > One ? Many : One;
#pragma GCC unroll 3
  for (int j = 0; j < One; ++j) {
    OBJSLOT_LOAD(6, one.of(0, j), one.row);
#pragma GCC unroll 3
    for (int i = 0; i < Many; ++i) {
      if (i + j >= parts) continue;
      OBJSLOT_LOAD(4, many.of(0, i), many.row);
      OBJSLOT_LOAD(5, many.of(1, i), many.row);
      if constexpr (many_left) {
        OBJSLOT_MULTIPLY(0, 4, 6);
        OBJSLOT_MULTIPLY(1, 5, 6);
      } else {
        OBJSLOT_MULTIPLY(0, 6, 4);
        OBJSLOT_MULTIPLY(1, 6, 5);
      }
      OBJSLOT_LOAD(7, many.of(2, i), many.row);
      OBJSLOT_LOAD(4, many.of(3, i), many.row);
      if constexpr (many_left) {
        OBJSLOT_MULTIPLY(2, 7, 6);
        OBJSLOT_MULTIPLY(3, 4, 6);
      } else {
        OBJSLOT_MULTIPLY(2, 6, 7);
        OBJSLOT_MULTIPLY(3, 6, 4);
      }
      between();
    }
  }
}

// Rows of words that a splitter makes after four products of tiles each: as many as keep up with them.
template <Precision P, Sums S>
constexpr int split_step = (P == Precision::thrice ? 8 : 16) * (S == Sums::square ? 1 : 2);

// Words that `multiply_rows` and `gather_rows` work in.
template <Precision P>
OBJSLOT_INLINE int64_t words_of(int64_t lanes, int64_t columns) {
  const int64_t high = lanes > block ? 2 : 4, depth = lanes > 2 * block ? depth_of(columns) : 2;
  const int64_t rows = high * depth, sums = 2 * tile_depth * high;
  return (rows > sums ? rows : sums) * row_parts<P> * block_words;
}

template <Precision P, int Parts, Reading R, Sums S>
static void multiply_rows_as(const TileRows& rows, const uint32_t* right, int64_t lanes, uint32_t* words, float* out) {
  constexpr int high = S == Sums::square ? 2 : 4, across = S == Sums::square ? 2 : 1;
  constexpr int64_t step = high * row_parts<P> * block_words, thin = Parts * block_words;
  const int64_t depth = depth_of(rows.columns), strips = lanes / block;
  // Words that no other strip needs are soon written over.
  const int64_t kept = strips > across ? depth : 2;
  Splitter<P, R, true, split_step<P, S>> splitter(rows, high);
  const auto between = [&]() __attribute__((always_inline)) {
    if constexpr (R != Reading::direct) splitter.step();
  };
  for (int64_t row = 0; row < rows.count; row += high * block) {
    if constexpr (R != Reading::direct) {
      splitter.begin(row, 0, 1, words);
      splitter.finish();
    }
    for (int64_t strip = 0; strip < strips; strip += across) {
      const uint32_t* with = right + strip * depth * thin;
      const bool both = strip + 1 < strips;
      clear_sums();
      for (int64_t k = 0; k < depth; ++k, with += thin) {
        Blocks left{words + k % kept * step, row_parts<P> * block_words};
        if constexpr (R == Reading::direct)
          // There are no more rows than `row` has places: a tile of positions at most.
          // NOLINTNEXTLINE(clang-analyzer-security.ArrayBound)
          left = {reinterpret_cast<const uint32_t*>(rows.row[row]) + k * block, rows.stride * block / 4, 0,
                  rows.stride};
        else if (strip == 0 && k + 1 < depth)
          splitter.begin(row, (k + 1) * block_depth, 1, words + (k + 1) % kept * step);
        const Blocks slots{with, depth * thin};
        if constexpr (S == Sums::tall)
          multiply_strip<row_parts<P>, Parts, true>(left, slots, between);
        else if (both)
          multiply_square<row_parts<P>, Parts, true, true>(left, slots, between);
        else
          multiply_square<row_parts<P>, Parts, true, false>(left, slots, between);
        if constexpr (R != Reading::direct) splitter.finish();
      }
      store_sums<S>(out + row * lanes + strip * block, lanes, true, both);
    }
  }
}

// out (tile, lanes) = rows times the transposed slots (lanes, columns), packed. Writes whole pairs of blocks of rows,
// or four blocks at once.
template <Precision P, int Parts = slot_parts<P>>
static void multiply_rows(const TileRows& rows, const uint32_t* right, int64_t lanes, uint32_t* words, float* out) {
  if (lanes == block)
    with_reading<P>(rows, 4 * block, block_depth, true, [&](auto reading) {
      multiply_rows_as<P, Parts, reading(), Sums::tall>(rows, right, lanes, words, out);
    });
  else
    with_reading<P>(rows, 2 * block, block_depth, true, [&](auto reading) {
      multiply_rows_as<P, Parts, reading(), Sums::square>(rows, right, lanes, words, out);
    });
}

template <Precision P, Reading R, Sums S>
static void gather_rows_as(const TileRows& rows, const uint32_t* left, int64_t lanes, uint32_t* words, float* sums) {
  constexpr int high = S == Sums::square ? 2 : 1, across = S == Sums::square ? 2 : 4;
  constexpr int64_t wide = row_parts<P> * block_words, thin = slot_parts<P> * block_words;
  const int64_t columns = 4 * quads_of(rows.columns), stride = columns * block, depth = depth_of(rows.count);
  const int64_t size = tile_depth * across * wide, strips = lanes / block;
  if (depth == 0) return;
  Splitter<P, R, false, split_step<P, S>> splitter(rows, across);
  const auto between = [&]() __attribute__((always_inline)) { splitter.step(); };
  splitter.begin(0, 0, depth, words);
  splitter.finish();
  for (int64_t c = 0; c < columns; c += across) {
    const uint32_t* const at = words + c / across % 2 * size;
    if (c + across < columns) splitter.begin(0, (c + across) * block, depth, words + (c / across + 1) % 2 * size);
    for (int64_t strip = 0; strip < strips; strip += high) {
      float* const target = sums + strip * block * stride + c * block;
      const bool both = strip + 1 < strips;
      load_sums<S>(target, stride, both);
      for (int64_t k = 0; k < depth; ++k) {
        const Blocks weights{left + (strip * tile_depth + k) * thin, tile_depth * thin};
        const Blocks right{at + k * across * wide, wide};
        if constexpr (S == Sums::wide)
          multiply_strip<row_parts<P>, slot_parts<P>, false>(right, weights, between);
        else if (both)
          multiply_square<slot_parts<P>, row_parts<P>, true, true>(weights, right, between);
        else
          multiply_square<slot_parts<P>, row_parts<P>, false, true>(weights, right, between);
      }
      store_sums<S>(target, stride, both);
    }
    splitter.finish();
  }
}

// sums (lanes, 64 quads) += the transposed weights (tile, lanes), packed, times the rows.
template <Precision P>
static void gather_rows(const TileRows& rows, const uint32_t* left, int64_t lanes, uint32_t* words, float* sums) {
  if (lanes == block)
    with_reading<P>(rows, block_depth, 4 * block, false,
                    [&](auto reading) { gather_rows_as<P, reading(), Sums::wide>(rows, left, lanes, words, sums); });
  else
    with_reading<P>(rows, block_depth, 4 * block, false,
                    [&](auto reading) { gather_rows_as<P, reading(), Sums::square>(rows, left, lanes, words, sums); });
}

}  // namespace objslot::OBJSLOT_ISA
#endif
