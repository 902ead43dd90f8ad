// Products of rows with a matrix of weights on AMX tiles of bfloat16, at the precision of float32.
//
// A float is split into three numbers of bfloat16, x = h + m + l; of the nine products of two such sums the six
// largest are added. A word of a tile holds two numbers, 16 places of the inner dimension apart: a block of 16 rows
// and 32 places, and for the weights of 32 places and 16 outputs. Rows and outputs that tiles cannot hold, because
// they are huge, tiny or not finite, are found when they are split, and multiplied without tiles.
#pragma once

#include "slot_tiles.h"

namespace objslot::OBJSLOT_ISA {

// A matrix of weights and where its packed form begins, with the rows that it multiplies.
template <class T>
struct Operand {
  const T* data;
  int64_t stride, rows, inner;
  const uint32_t* words = nullptr;  // (blocks of rows, blocks of places, 3, 16, 16)
  const uint16_t* lost = nullptr;   // of every block of rows, a bit for each row to do without tiles
};

#ifdef OBJSLOT_TILES

constexpr int64_t pair_places = 2 * block, dense_planes = 3, header_words = 16;

OBJSLOT_INLINE int64_t place_blocks(int64_t inner) { return (inner + pair_places - 1) / pair_places; }
// Rows and outputs are multiplied two blocks at a time.
OBJSLOT_INLINE int64_t even_blocks(int64_t count) { return (count + pair_places - 1) / pair_places * 2; }

// Words of a block of 16 outputs: whether it is sound, whether it is of bfloat16 and its middle and low parts zero,
// then its tiles.
OBJSLOT_INLINE int64_t panel_words(int64_t inner) {
  return header_words + place_blocks(inner) * dense_planes * block_words;
}
OBJSLOT_INLINE int64_t dense_words(int64_t outer, int64_t inner) { return even_blocks(outer) * panel_words(inner); }

OBJSLOT_INLINE int64_t operand_words(int64_t rows, int64_t inner) {
  // The bits of lost rows come last.
  return even_blocks(rows) * place_blocks(inner) * dense_planes * block_words + (even_blocks(rows) + 31) / 32 * 16;
}

// Two vectors as words of pairs, one plane after the other.
// Returns what the first plane leaves out.
OBJSLOT_INLINE __m512 split_pairs(__m512 low, __m512 high, uint32_t* to) {
  __m512 left = _mm512_setzero_ps();
  const __m512i top = _mm512_set1_epi32(bits_of_high), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 3
  for (int plane = 0; plane < dense_planes; ++plane) {
    const __m512i first = _mm512_and_si512(_mm512_add_epi32(bits(low), half), top);
    const __m512i second = _mm512_and_si512(_mm512_add_epi32(bits(high), half), top);
    _mm512_store_si512(to + plane * block_words, _mm512_or_si512(low_half(first), second));
    low = _mm512_sub_ps(low, floats(first));
    high = _mm512_sub_ps(high, floats(second));
    if (plane == 0) left = _mm512_or_ps(low, high);
  }
  return left;
}

// Whether a row of this largest size can be split.
OBJSLOT_INLINE bool fits(float largest) { return largest == 0 || (largest >= least_entry && largest <= most_entry); }

// Splits the rows into `words`; what is not there is zero.
static Operand<float> split_operand(const float* data, int64_t stride, int64_t rows, int64_t inner, uint32_t* words) {
  const int64_t blocks = even_blocks(rows), places = place_blocks(inner);
  auto* const lost = reinterpret_cast<uint16_t*>(words + blocks * places * dense_planes * block_words);
  for (int64_t b = 0; b < blocks; ++b) {
    lost[b] = 0;
    for (int64_t i = 0; i < block; ++i) {
      const int64_t j = b * block + i;
      uint32_t* to = words + b * places * dense_planes * block_words + i * block;
      const float* row = data + j * stride;
      __m512 top = _mm512_setzero_ps(), odd = top;
      for (int64_t d = 0; d < inner; d += pair_places, to += dense_planes * block_words) {
        const int64_t left = inner - d;
        const auto mask = static_cast<__mmask32>(j >= rows ? 0 : left >= pair_places ? ~0u : (1u << left) - 1);
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + d);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> block), row + d + block);
        top = _mm512_max_ps(top, _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        // NaN where an entry is NaN or infinite.
        odd = _mm512_add_ps(odd, _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high)));
        split_pairs(low, high, to);
      }
      const bool sound = fits(_mm512_reduce_max_ps(top)) && _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) == 0;
      lost[b] |= static_cast<uint16_t>(!sound << i);
    }
  }
  return {data, stride, rows, inner, words, lost};
}

// One block of 16 outputs.
OBJSLOT_INLINE void pack_dense(const float* data, int64_t outer_stride, int64_t inner_stride, int64_t outputs,
                               int64_t inner, uint32_t* panel) {
  __m512 top[block];
  for (__m512& t : top) t = _mm512_setzero_ps();
  bool sound = true;
  __m512 rest = _mm512_setzero_ps();
  uint32_t* to = panel + header_words;
  for (int64_t d = 0; d < inner; d += pair_places, to += dense_planes * block_words) {
    __m512 part[2][block];
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t from = d + h * block, left = inner - from < block ? inner - from : block;
      const auto cut = [](int64_t count) {
        return static_cast<__mmask16>(count >= block ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
      };
      if (inner_stride == 1) {
        for (int64_t c = 0; c < block; ++c)
          part[h][c] = _mm512_maskz_loadu_ps(c < outputs ? cut(left) : 0, data + c * outer_stride + from);
        transpose_block(part[h]);
      } else {
        for (int64_t i = 0; i < block; ++i)
          part[h][i] = _mm512_maskz_loadu_ps(i < left ? cut(outputs) : 0, data + (from + i) * inner_stride);
      }
    }
    for (int64_t i = 0; i < block; ++i) {
      const __m512 low = part[0][i], high = part[1][i];
      const __m512 odd = _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high));
      sound &= _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) == 0;
      top[0] = _mm512_max_ps(top[0], _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
      rest = _mm512_or_ps(rest, split_pairs(low, high, to + i * block));
    }
  }
  // A lane for each output.
  const __mmask16 small = _mm512_cmp_ps_mask(top[0], _mm512_set1_ps(least_entry), _CMP_LT_OQ) &
                          _mm512_cmp_ps_mask(top[0], _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __mmask16 large = _mm512_cmp_ps_mask(top[0], _mm512_set1_ps(most_entry), _CMP_GT_OQ);
  panel[0] = sound && !small && !large;
  panel[1] = _mm512_test_epi32_mask(bits(rest), _mm512_set1_epi32(0x7fffffff)) == 0;
}

#define OBJSLOT_PRODUCTS_OF_PAIRS \
  OBJSLOT_MULTIPLY(0, 4, 6);      \
  OBJSLOT_MULTIPLY(2, 5, 6);      \
  OBJSLOT_MULTIPLY(1, 4, 7);      \
  OBJSLOT_MULTIPLY(3, 5, 7)

// out (32, 32) = two blocks of rows times two of outputs; `exact`: of bfloat16. Fetches `lines` of what comes next for
// every block of places.
template <bool exact>
OBJSLOT_INLINE void multiply_pairs(const uint32_t* rows, int64_t next_rows, const uint32_t* panel, int64_t next_panel,
                                   int64_t places, Ahead& ahead, int64_t lines, float* out) {
  clear_sums();
  for (int64_t d = 0; d < places; ++d, rows += dense_planes * block_words, panel += dense_planes * block_words) {
    for (int64_t k = 0; k < lines; ++k) ahead.fetch<1>();
    OBJSLOT_LOAD(4, rows, 64);
    OBJSLOT_LOAD(5, rows + next_rows, 64);
    // high * low, high * middle, middle * middle, middle * high, high * high, low * high.
    if constexpr (!exact) {
      OBJSLOT_LOAD(6, panel + 2 * block_words, 64);
      OBJSLOT_LOAD(7, panel + next_panel + 2 * block_words, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
      OBJSLOT_LOAD(6, panel + block_words, 64);
      OBJSLOT_LOAD(7, panel + next_panel + block_words, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
      OBJSLOT_LOAD(4, rows + block_words, 64);
      OBJSLOT_LOAD(5, rows + next_rows + block_words, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
      OBJSLOT_LOAD(6, panel, 64);
      OBJSLOT_LOAD(7, panel + next_panel, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
      OBJSLOT_LOAD(4, rows, 64);
      OBJSLOT_LOAD(5, rows + next_rows, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
    } else {
      OBJSLOT_LOAD(6, panel, 64);
      OBJSLOT_LOAD(7, panel + next_panel, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
      OBJSLOT_LOAD(4, rows + block_words, 64);
      OBJSLOT_LOAD(5, rows + next_rows + block_words, 64);
      OBJSLOT_PRODUCTS_OF_PAIRS;
    }
    OBJSLOT_LOAD(4, rows + 2 * block_words, 64);
    OBJSLOT_LOAD(5, rows + next_rows + 2 * block_words, 64);
    OBJSLOT_PRODUCTS_OF_PAIRS;
  }
  OBJSLOT_STORE(0, out, 128);
  OBJSLOT_STORE(1, out + block, 128);
  OBJSLOT_STORE(2, out + block * pair_places, 128);
  OBJSLOT_STORE(3, out + block * pair_places + block, 128);
}

// ---- weights of bfloat16 ----
//
// Rows are rounded to bfloat16 as well, and nothing is split. A word holds two neighbouring places, as they lie in
// memory. Tiles keep all numbers of bfloat16 but the subnormal ones, so that no row or output is left out.

OBJSLOT_INLINE int64_t half_panel_words(int64_t inner) { return place_blocks(inner) * block_words; }

// Rows (rows, inner) as blocks (blocks of rows, blocks of places, 16, 16); what is not there is zero.
static Operand<float> round_operand(const float* data, int64_t stride, int64_t rows, int64_t inner, uint32_t* words) {
  for (int64_t j = 0; j < even_blocks(rows) * block; ++j) {
    uint32_t* to = words + j / block * half_panel_words(inner) + j % block * block;
    for (int64_t d = 0; d < inner; d += pair_places, to += block_words) {
      const int64_t left = j < rows ? inner - d : 0;
      const auto mask = static_cast<__mmask32>(left >= pair_places ? ~0u : (1u << left) - 1);
      const float* const from = data + j * stride + d;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> block), from + block);
      _mm512_store_si512(to, nearest_bfloat16(low, high));
    }
  }
  return {data, stride, rows, inner, words};
}

// One block of 16 outputs, (outputs, inner) as they lie.
OBJSLOT_INLINE void pack_half(const uint16_t* data, int64_t stride, int64_t outputs, int64_t inner, uint32_t* to) {
  for (int64_t d = 0; d < inner; d += pair_places, to += block_words) {
    const int64_t left = inner - d;
    const auto mask = static_cast<__mmask32>(left >= pair_places ? ~0u : (1u << left) - 1);
    __m512 rows[block];
    for (int64_t c = 0; c < block; ++c)
      rows[c] = floats(c < outputs ? _mm512_maskz_loadu_epi16(mask, data + c * stride + d) : _mm512_setzero_si512());
    transpose_block(rows);
    for (int64_t i = 0; i < block; ++i) _mm512_store_ps(to + i * block, rows[i]);
  }
}

// out (32, 32) = two blocks of rows times two of outputs, each of `places` blocks of places.
OBJSLOT_INLINE void multiply_halves(const uint32_t* rows, const uint32_t* panel, int64_t places, Ahead& ahead,
                                    int64_t lines, float* out) {
  const int64_t next = places * block_words;
  clear_sums();
  for (int64_t d = 0; d < places; ++d, rows += block_words, panel += block_words) {
    for (int64_t k = 0; k < lines; ++k) ahead.fetch<1>();
    OBJSLOT_LOAD(4, rows, 64);
    OBJSLOT_LOAD(5, rows + next, 64);
    OBJSLOT_LOAD(6, panel, 64);
    OBJSLOT_LOAD(7, panel + next, 64);
    OBJSLOT_PRODUCTS_OF_PAIRS;
  }
  store_sums<Sums::square>(out, pair_places);
}

// The product of one row with one output, without tiles.
static float dense_dot(const float* row, const float* weights, int64_t stride, int64_t inner) {
  float total = 0;
  for (int64_t d = 0; d < inner; ++d) total += row[d] * weights[d * stride];
  return total;
}

#endif

}  // namespace objslot::OBJSLOT_ISA
