// The products of slot attention backward on AMX tiles.
#pragma once

#include "slot_backward.h"

#ifdef OBJSLOT_TILES
namespace objslot::OBJSLOT_ISA {

// A term of a sum of products: words of the weights, (blocks of lanes, planes, blocks of rows, 16, 16), and the packed
// rows of the lanes.
struct TileTerm {
  const uint32_t* words;
  const uint32_t* packed;
};

// The words of weights (tile, lanes).
template <Precision P>
static void split_weights(const float* weights, int64_t lanes, uint32_t* words) {
  constexpr int64_t plane = row_blocks * block_words;
  for (int64_t lane = 0; lane < lanes; lane += block, words += wide_planes<P> * plane)
    for (int64_t j = 0; j < tile; ++j)
      split_wide<P>(_mm512_loadu_ps(weights + j * lanes + lane), words + j * block, plane);
}

// out (tile, 32) = two blocks of columns, from block `column` of `columns`, of the sum of the terms' products, `count`
// rows of it.
template <Precision P>
OBJSLOT_INLINE void spread_columns_on_tiles(const TileTerm* terms, int number, int64_t lanes, int64_t column,
                                            int64_t columns, int64_t count, float* out) {
  constexpr int64_t plane = row_blocks * block_words, thin_size = thin_planes<P> * block_words, wide = 2 * block;
  const int64_t thin_next = column + 1 < columns ? thin_size : 0;
  for (int64_t j = 0; j < count; j += 2 * block) {
    clear_sums();
    for (int t = 0; t < number; ++t)
      for (int64_t lane = 0; lane < lanes / block; ++lane)
        multiply_add_square<P, true>(terms[t].words + lane * wide_planes<P> * plane + j * block, block_words, plane,
                                     terms[t].packed + (lane * columns + column) * thin_size, thin_next, [] {});
    float* const target = out + j * wide;
    OBJSLOT_STORE(0, target, wide * 4);
    OBJSLOT_STORE(1, target + block, wide * 4);
    OBJSLOT_STORE(2, target + block * wide, wide * 4);
    OBJSLOT_STORE(3, target + block * wide + block, wide * 4);
  }
}

// Whether no entry is too large, and the largest, where `least` says so, zero or large enough.
static bool sound_tile(const float* weights, int64_t size, bool least) {
  const __m512 most = _mm512_set1_ps(most_entry);
  __m512 top = _mm512_setzero_ps();
  __mmask16 beyond = 0;
  for (int64_t i = 0; i < size; i += block) {
    const __m512 x = _mm512_abs_ps(_mm512_loadu_ps(weights + i));
    beyond |= _mm512_cmp_ps_mask(x, most, _CMP_NLE_UQ);
    top = _mm512_max_ps(top, x);
  }
  const float largest = _mm512_reduce_max_ps(top);
  return !beyond && !(least && largest != 0 && largest < least_entry);
}

// Packs q and the upper gradient; false where they are not fit for tiles.
template <Precision P>
static bool prepare_tiles(const SlotAttentionProblem& p, const Layout& layout, const BackwardScratch<float>& s) {
  constexpr Precision M = between_halves<P>;
  const int64_t lanes = layout.lanes, keys = padded<float>(p.width), values = padded<float>(p.value_width);
  if (!sound_rows(s.q_rows, lanes, keys, keys) || !sound_rows(s.dz_rows, lanes, values, values)) return false;
  pack_matrix<P>(s.q_rows, lanes, keys, true, s.packed_q);
  pack_matrix<P>(s.dz_rows, lanes, values, true, s.packed_dz);
  pack_matrix<M>(s.q_rows, lanes, keys, false, s.packed_q_rows);
  pack_matrix<M>(s.dz_rows, lanes, values, false, s.packed_dz_rows);
  return true;
}

// The live keys or values of a tile; `keys`: normalised ones, or null.
static TileRows tile_rows(const SlotAttentionProblem& p, const BackwardScratch<float>& s, bool of_values,
                          const float* keys, int64_t batch, int64_t from) {
  TileRows rows;
  if (of_values && p.v) {
    point_to(rows, p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, s.live);
  } else if (keys) {
    const int64_t stride = padded<float>(p.width);
    for (int64_t j = 0; j < s.live.count; ++j) rows.row[j] = reinterpret_cast<const char*>(keys + j * stride);
    rows.count = s.live.count;
    rows.columns = p.width;
    rows.element = Element::float32;
    rows.normalised = false;
  } else {
    point_to(rows, p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from, s.live);
  }
  return rows;
}

// Logits to s.weights and the gradient of the weights to s.slopes; false where tiles lose too much.
template <Precision P>
static bool multiply_on_tiles(const SlotAttentionProblem& p, const Layout& layout, const BackwardScratch<float>& s,
                              const float* keys, int64_t batch, int64_t from, int64_t end) {
  const int64_t lanes = layout.lanes;
  TileRows rows = tile_rows(p, s, false, keys, batch, from);
  rows.ahead = tile_ahead(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, end);
  multiply_rows<P>(rows, s.packed_q, lanes, s.words, s.weights);
  rows = tile_rows(p, s, true, keys, batch, from);
  rows.ahead = tile_ahead(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from + tile, end);
  multiply_rows<P>(rows, s.packed_dz, lanes, s.words, s.slopes);
  return finish_products(s.weights, s.live.count, lanes, 1.44269504088896340736f, s.bias, false) &&
         finish_products(s.slopes, s.live.count, lanes, 1, s.centre, true);
}

OBJSLOT_INLINE __m256i nearest_bfloat16(__m512 x) {
  const __m512i odd = _mm512_and_si512(low_half(bits(x)), _mm512_set1_epi32(1));
  const __m512i rounded = low_half(_mm512_add_epi32(bits(x), _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// Writes `count` of 32 entries, at most.
OBJSLOT_INLINE void write_part(const float* from, void* out, Element element, int64_t offset, int64_t count,
                               bool streamed) {
  const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + block);
  const auto mask = static_cast<__mmask32>(count >= 2 * block ? ~0u : (1u << count) - 1);
  if (element == Element::float32) {
    float* const to = static_cast<float*>(out) + offset;
    if (streamed) {
      _mm512_stream_ps(to, low);
      if (count > block) _mm512_stream_ps(to + block, high);
      return;
    }
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), low);
    if (count > block) _mm512_mask_storeu_ps(to + block, static_cast<__mmask16>(mask >> block), high);
    return;
  }
  uint16_t* const to = static_cast<uint16_t*>(out) + offset;
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const bool brain = element == Element::bfloat16;
  const __m256i first = brain ? nearest_bfloat16(low) : _mm512_cvtps_ph(low, rounding);
  const __m256i second = brain ? nearest_bfloat16(high) : _mm512_cvtps_ph(high, rounding);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  if (streamed)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  else
    _mm512_mask_storeu_epi16(to, mask, both);
}

// Rows (live positions, columns) of a sum of products to their places in `out`; zeros where nothing is live.
template <Precision M>
static void write_on_tiles(const Layout& layout, const Live<float>& live, const TileTerm* terms, int count,
                           int64_t columns, void* out, Element element, int64_t offset, int64_t positions,
                           float* product, bool streamed) {
  if (!live.all) write_zeros<float>(out, element, offset, positions * columns);
  const int64_t blocks = blocks_of(columns);
  for (int64_t c = 0; c < blocks; c += 2) {
    spread_columns_on_tiles<M>(terms, count, layout.lanes, c, blocks, live.count, product);
    const int64_t left = columns - c * block;
    for (int64_t j = 0; j < live.count; ++j)
      write_part(product + j * 2 * block, out, element, offset + (live.all ? j : live.index[j]) * columns + c * block,
                 left < 2 * block ? left : 2 * block, streamed && live.all);
  }
}

// The gradients that a tile of slopes and weights gives; false where tiles lose too much.
template <Precision P>
static bool gradients_on_tiles(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                               const BackwardScratch<float>& s, const float* keys, int64_t batch, int64_t from,
                               int64_t count, bool stream_keys, bool stream_values) {
  constexpr Precision M = between_halves<P>;
  const int64_t lanes = layout.lanes, row = batch * p.positions + from;
  if (!sound_tile(s.weights, s.live.count * lanes, false) || !sound_tile(s.slopes, s.live.count * lanes, true))
    return false;
  const TileTerm terms[2] = {{s.slope_words, s.packed_q_rows}, {s.weight_words, s.packed_dz_rows}};
  if (r.grad_k) split_weights<M>(s.slopes, lanes, s.slope_words);
  if (r.grad_v || !p.v) split_weights<M>(s.weights, lanes, s.weight_words);
  if (r.grad_k && p.row_mean) {
    const int64_t stride = padded<float>(p.width), blocks = blocks_of(p.width);
    for (int64_t c = 0; c < blocks; c += 2) {
      spread_columns_on_tiles<M>(terms, 2, lanes, c, blocks, s.live.count, s.product);
      for (int64_t j = 0; j < s.live.count; ++j)
        for (int64_t d = 0; d < 2 * block && c * block + d < stride; d += block)
          store(s.grad_keys + j * stride + c * block + d, load(s.product + j * 2 * block + d));
    }
    write_normalised<float>(p, r, s, keys, batch, from, count);
  } else if (r.grad_k) {
    write_on_tiles<M>(layout, s.live, terms, p.v ? 1 : 2, p.width, r.grad_k, p.element, row * p.width, count, s.product,
                      stream_keys);
  }
  if (r.grad_v)
    write_on_tiles<M>(layout, s.live, terms + 1, 1, p.value_width, r.grad_v, p.element, row * p.value_width, count,
                      s.product, stream_values);
  if (r.grad_q) {
    pack_weights<P>(s.slopes, s.live.count, lanes, s.packed_slopes);
    gather_rows<P>(tile_rows(p, s, false, keys, batch, from), s.packed_slopes, lanes, s.words, s.grad_q);
  }
  return true;
}

}  // namespace objslot::OBJSLOT_ISA
#endif
