// The products of slot attention backward on AMX tiles.
#pragma once

#include "slot_backward.h"

#ifdef OBJSLOT_TILES
namespace objslot::OBJSLOT_ISA {

// A term of a sum of products over the lanes: the weights of the rows, and the packed rows of the lanes.
struct TileTerm {
  const uint32_t* weights;
  const uint32_t* packed;
};

// out (rows from `row` on, two blocks of columns from block `column` of `columns`) = the sum of the terms' products.
template <int Parts>
OBJSLOT_INLINE void spread_on_tiles(const TileTerm* terms, int number, int64_t lanes, int64_t row, int64_t column,
                                    bool second_column, float* out, int64_t stride) {
  constexpr int64_t size = Parts * block_words;
  const int64_t depth = depth_of(lanes);
  clear_sums();
  for (int t = 0; t < number; ++t)
    for (int64_t k = 0; k < depth; ++k) {
      const Blocks left{terms[t].weights + (row / block * depth + k) * size, depth * size};
      const Blocks right{terms[t].packed + (column * depth + k) * size, depth * size};
      if (second_column)
        multiply_square<Parts, Parts, true, true>(left, right, [] {});
      else
        multiply_square<Parts, Parts, true, false>(left, right, [] {});
    }
  store_sums<Sums::square>(out, stride, true, second_column);
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
  const int64_t lanes = layout.lanes, keys = padded<float>(p.width), values = padded<float>(p.value_width);
  if (!sound_rows(s.q_rows, lanes, keys, keys) || !sound_rows(s.dz_rows, lanes, values, values)) return false;
  pack_lanes_right<P>(s.q_rows, lanes, keys, s.packed_q);
  pack_lanes_right<P>(s.dz_rows, lanes, values, s.packed_dz);
  pack_lanes_deep<slot_parts<P>>(s.q_rows, lanes, keys, s.packed_q_rows);
  pack_lanes_deep<slot_parts<P>>(s.dz_rows, lanes, values, s.packed_dz_rows);
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
    rows.stride = 0;
    rows.element = Element::float32;
    rows.normalised = false;
  } else {
    point_to(rows, p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from, s.live);
  }
  return rows;
}

// Logits, where they are wanted, to s.weights and the gradient of the weights to s.slopes; false where tiles lose too
// much.
template <Precision P>
static bool multiply_on_tiles(const SlotAttentionProblem& p, const Layout& layout, const BackwardScratch<float>& s,
                              const float* keys, int64_t batch, int64_t from, int64_t end, bool logits) {
  const int64_t lanes = layout.lanes;
  if (logits) {
    TileRows rows = tile_rows(p, s, false, keys, batch, from);
    rows.ahead = tile_ahead(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, end);
    multiply_rows<P>(rows, s.packed_q, lanes, s.words, s.weights);
    if (!finish_products(s.weights, s.live.count, lanes, 1.44269504088896340736f, s.bias, false)) return false;
  }
  TileRows rows = tile_rows(p, s, true, keys, batch, from);
  rows.ahead = tile_ahead(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from + tile, end);
  multiply_rows<P>(rows, s.packed_dz, lanes, s.words, s.slopes);
  return finish_products(s.slopes, s.live.count, lanes, 1, s.centre, true);
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
  const __m512i both = element == Element::bfloat16
                           ? nearest_bfloat16(low, high)
                           : _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, rounding)),
                                                _mm512_cvtps_ph(high, rounding), 1);
  if (streamed)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
  else
    _mm512_mask_storeu_epi16(to, mask, both);
}

// Rows (live positions, columns) of a sum of products to their places in `out`; zeros where nothing is live.
template <int Parts>
static void write_on_tiles(const Layout& layout, const Live<float>& live, const TileTerm* terms, int count,
                           int64_t columns, void* out, Element element, int64_t offset, int64_t positions,
                           float* product, bool streamed) {
  if (!live.all) write_zeros<float>(out, element, offset, positions * columns);
  const int64_t blocks = blocks_of(columns);
  const bool in_place = live.all && element == Element::float32 && columns % block == 0 && !streamed;
  for (int64_t c = 0; c < blocks; c += 2)
    for (int64_t row = 0; row < live.count; row += 2 * block) {
      const bool second = c + 1 < blocks;
      if (in_place && row + 2 * block <= live.count) {
        spread_on_tiles<Parts>(terms, count, layout.lanes, row, c, second,
                               static_cast<float*>(out) + offset + row * columns + c * block, columns);
        continue;
      }
      spread_on_tiles<Parts>(terms, count, layout.lanes, row, c, second, product, 2 * block);
      const int64_t left = columns - c * block, end = row + 2 * block < live.count ? row + 2 * block : live.count;
      for (int64_t j = row; j < end; ++j)
        write_part(product + (j - row) * 2 * block, out, element, offset + live.at(j) * columns + c * block,
                   left < 2 * block ? left : 2 * block, streamed && live.all);
    }
}

// The gradients that a tile of slopes and weights gives; false where tiles lose too much.
template <Precision P>
static bool gradients_on_tiles(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                               const BackwardScratch<float>& s, const float* keys, int64_t batch, int64_t from,
                               int64_t count, bool stream_keys, bool stream_values) {
  constexpr int parts = slot_parts<P>;
  const int64_t lanes = layout.lanes, row = batch * p.positions + from;
  if (!sound_tile(s.weights, s.live.count * lanes, false) || !sound_tile(s.slopes, s.live.count * lanes, true))
    return false;
  const TileTerm terms[2] = {{s.slope_words, s.packed_q_rows}, {s.weight_words, s.packed_dz_rows}};
  if (r.grad_k) pack_weights_wide<parts>(s.slopes, s.live.count, lanes, s.slope_words);
  if (r.grad_v || !p.v) pack_weights_wide<parts>(s.weights, s.live.count, lanes, s.weight_words);
  if (r.grad_k && p.row_mean) {
    const int64_t stride = padded<float>(p.width), blocks = blocks_of(p.width);
    for (int64_t c = 0; c < blocks; c += 2)
      for (int64_t j = 0; j < s.live.count; j += 2 * block)
        spread_on_tiles<parts>(terms, 2, lanes, j, c, c + 1 < blocks, s.grad_keys + j * stride + c * block, stride);
    write_normalised<float>(p, r, s, keys, batch, from, count);
  } else if (r.grad_k) {
    write_on_tiles<parts>(layout, s.live, terms, p.v ? 1 : 2, p.width, r.grad_k, p.element, row * p.width, count,
                          s.product, stream_keys);
  }
  if (r.grad_v)
    write_on_tiles<parts>(layout, s.live, terms + 1, 1, p.value_width, r.grad_v, p.element, row * p.value_width, count,
                          s.product, stream_values);
  if (r.grad_q) {
    pack_weights_turned<parts>(s.slopes, s.live.count, lanes, s.packed_slopes);
    gather_rows<P>(tile_rows(p, s, false, keys, batch, from), s.packed_slopes, lanes, s.words, s.grad_q);
  }
  return true;
}

}  // namespace objslot::OBJSLOT_ISA
#endif
