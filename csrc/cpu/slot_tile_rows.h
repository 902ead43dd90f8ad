// What the kernels of slot attention share on tiles: which calls they serve, which rows they read, and which numbers
// they can be trusted with.
#pragma once

#include "slot_tiles.h"

#ifdef OBJSLOT_TILES
namespace objslot::OBJSLOT_ISA {

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
  for (int64_t j = 0; j < live.count; ++j) rows.row[j] = begin + live.at(j) * stride * size;
  rows.count = live.count;
  rows.columns = columns;
  rows.stride = live.all ? stride * size : 0;
  rows.element = element;
  rows.normalised = false;
}

// The rows stand for normalised ones.
OBJSLOT_INLINE void normalise(TileRows& rows, const SlotAttentionProblem& p, int64_t batch, int64_t from,
                              const Live<float>& live) {
  const int64_t begin = batch * p.positions + from;
  for (int64_t j = 0; j < live.count; ++j) {
    const int64_t at = begin + live.at(j);
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

namespace objslot::OBJSLOT_ISA {

// Elements of a row of sums over positions of rows of `width`: tiles write whole quads of blocks.
template <class T>
OBJSLOT_INLINE int64_t sums_stride(const SlotAttentionProblem& p, int64_t width) {
#ifdef OBJSLOT_TILES
  if (tiles_serve(p)) return quads_of(width) * 4 * block;
#endif
  (void)p;
  return padded<T>(width);
}

// Memory for the positions of a tile that a mask leaves.
template <class T>
OBJSLOT_INLINE void take_live(const SlotAttentionProblem& p, const Layout& layout, Shelf& shelf, Live<T>& live) {
  live.index = shelf.take<int32_t>(tile);
  live.mask = shelf.take<T>(p.mask ? p.groups * tile : 0);
  live.lanes = shelf.take<T>(p.mask ? tile * layout.lanes : 0);
}

}  // namespace objslot::OBJSLOT_ISA
