// Products of rows of slots with packed weights.
#pragma once

#include "objslot/slot_loop.h"
#include "slot_dense_tiles.h"

namespace objslot::OBJSLOT_ISA {

// Weights are packed in panels of so many vectors of outputs, one after the other: (inner, outputs of the panel).
constexpr int panel_vectors = registers == 32 ? 3 : 2;
template <class T>
constexpr int64_t panel_width = panel_vectors * width<T>;

constexpr int64_t inner_part = registers == 32 ? 128 : 192;

// Rows are handled in chunks of this many, over which sums of rows are kept apart, and in blocks of whole chunks.
constexpr int64_t row_chunk = 16;
constexpr int64_t most_rows = 256;

OBJSLOT_INLINE int64_t block_rows(const SlotRows& p, int threads) {
  const int64_t even = (p.rows + threads - 1) / threads;
  const int64_t rows = (even + row_chunk - 1) / row_chunk * row_chunk;
  return rows < most_rows ? rows : most_rows;
}

// Calls body(first row, rows, worker) on the blocks.
template <class Body>
OBJSLOT_INLINE void for_blocks(const SlotRows& p, int threads, const Body& body) {
  const int64_t rows = p.rows, step = block_rows(p, threads);
  parallel_for((rows + step - 1) / step, threads, [&](int64_t first, int64_t last, int worker) {
#ifdef OBJSLOT_TILES
    const TileRegisters tile_registers(p.tiles);
#endif
    for (int64_t at = first * step; at < last * step && at < rows; at += step)
      body(at, rows - at < step ? rows - at : step, worker);
  });
}

// out[row][...] = a[row] w + bias (+ out) for so many rows and KV vectors of outputs.
template <class T, int KV, int Rows>
OBJSLOT_INLINE void multiply_block(const T* a, int64_t stride, int64_t inner, const T* w, const T* bias, T* out,
                                   int64_t out_stride, int64_t columns, bool add) {
  constexpr int bases = (Rows + 3) / 4;
  Vec<T> total[Rows][KV] = {};
  const T* base[bases];
#pragma GCC unroll 4
  for (int r = 0; r < bases; ++r) base[r] = a + 4 * r * stride;
  const int64_t stride3 = 3 * stride;
  for (int64_t i = 0; i < inner; ++i, w += KV * width<T>) {
    Vec<T> weight[KV];
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) weight[z] = load(w + z * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> factor = broadcast(base[r / 4][r % 4 == 3 ? stride3 : r % 4 * stride]);
#pragma GCC unroll 4
      for (int z = 0; z < KV; ++z) total[r][z] = fused(factor, weight[z], total[r][z]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < bases; ++r) ++base[r];
  }
  if (columns >= KV * width<T>) {
    if (bias)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int z = 0; z < KV; ++z) total[r][z] += load(bias + z * width<T>);
    if (add)
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int z = 0; z < KV; ++z) total[r][z] += load(out + r * out_stride + z * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int z = 0; z < KV; ++z) store(out + r * out_stride + z * width<T>, total[r][z]);
    return;
  }
  // Through memory, so that the sums stay in registers until here.
  T sums[Rows * KV * width<T>];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) store(sums + (r * KV + z) * width<T>, total[r][z]);
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t d = 0; d < columns; d += width<T>) {
      const int64_t left = columns - d;
      T* target = out + r * out_stride + d;
      Vec<T> value = load(sums + r * KV * width<T> + d);
      if (bias) value += load_upto(bias + d, left);
      if (add) value += load_upto(target, left);
      store_upto(target, value, left);
    }
}

template <class T, int KV>
static void multiply_panel(const T* a, int64_t stride, int64_t rows, int64_t inner, const T* w, const T* bias, T* out,
                           int64_t out_stride, int64_t columns, bool add) {
  int64_t j = 0;
  const auto blocks = [&](auto count) __attribute__((always_inline)) {
    for (; j + count() <= rows; j += count())
      multiply_block<T, KV, count()>(a + j * stride, stride, inner, w, bias, out + j * out_stride, out_stride, columns,
                                     add);
  };
  blocks(std::integral_constant<int, registers == 32 ? 8 : 6>());
  blocks(std::integral_constant<int, 4>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

template <class T>
static void multiply_plainly(const Operand<T>& a, const T* packed, int64_t outer, const T* bias, T* out,
                             int64_t out_stride, bool add) {
  for (int64_t c = 0; c < outer; c += panel_width<T>) {
    const int64_t columns = outer - c < panel_width<T> ? outer - c : panel_width<T>;
    const int64_t vectors = (columns + width<T> - 1) / width<T>;
    // In parts whose weights stay in the first cache over all rows.
    for (int64_t i = 0; i < a.inner; i += inner_part) {
      const int64_t count = a.inner - i < inner_part ? a.inner - i : inner_part;
      const T* w = packed + c * a.inner + i * vectors * width<T>;
      const T* b = bias && i == 0 ? bias + c : nullptr;
      const bool more = add || i > 0;
      const T* data = a.data + i;
      if (vectors == 1) multiply_panel<T, 1>(data, a.stride, a.rows, count, w, b, out + c, out_stride, columns, more);
      if (vectors == 2) multiply_panel<T, 2>(data, a.stride, a.rows, count, w, b, out + c, out_stride, columns, more);
      if constexpr (panel_vectors == 3)
        if (vectors == 3) multiply_panel<T, 3>(data, a.stride, a.rows, count, w, b, out + c, out_stride, columns, more);
    }
  }
}

#ifdef OBJSLOT_TILES
// A product of 32 rows with 32 outputs, as far as there are any, to its place.
OBJSLOT_INLINE void put_product(const float* product, int64_t height, int64_t columns, const float* bias, float* out,
                                int64_t out_stride, bool add) {
  static_assert(pair_places == 2 * width<float>);
  if (columns == pair_places) {
    const Vec<float> low = bias ? load(bias) : Vec<float>{}, high = bias ? load(bias + block) : Vec<float>{};
    for (int64_t i = 0; i < height; ++i, product += pair_places, out += out_stride) {
      Vec<float> first = load(product) + low, second = load(product + block) + high;
      if (add) first += load(out), second += load(out + block);
      store(out, first);
      store(out + block, second);
    }
    return;
  }
  for (int64_t i = 0; i < height; ++i)
    for (int64_t d = 0; d < columns; d += block) {
      const int64_t left = columns - d;
      float* const target = out + i * out_stride + d;
      Vec<float> value = load(product + i * pair_places + d);
      if (bias) value += load_upto(bias + d, left);
      if (add) value += load_upto(target, left);
      store_upto(target, value, left);
    }
}

// The next two panels of `size` words where there are any.
OBJSLOT_INLINE Ahead panels_ahead(const uint32_t* panel, int64_t size, bool any) {
  if (!any) return {};
  return {reinterpret_cast<const char*>(panel + 2 * size), reinterpret_cast<const char*>(panel + 4 * size)};
}

// As multiply_on_tiles below, with weights of bfloat16.
static void multiply_halves_on_tiles(const SlotRows& p, const PackedMatrix& m, const Operand<float>& a,
                                     const float* bias, float* out, int64_t out_stride, bool add, int64_t first,
                                     int64_t columns) {
  const int64_t places = place_blocks(a.inner), size = half_panel_words(a.inner);
  const auto* const panels = static_cast<const uint32_t*>(p.packed) + m.place + first / block * size;
  const int64_t steps = even_blocks(a.rows) / 2 * places, lines = (2 * size / 16 + steps - 1) / steps;
  alignas(64) float product[pair_places * pair_places];
  for (int64_t c = 0; c < columns; c += pair_places) {
    const uint32_t* const panel = panels + c / block * size;
    Ahead ahead = panels_ahead(panel, size, c + pair_places < columns);
    for (int64_t j = 0; j < a.rows; j += pair_places) {
      multiply_halves(a.words + j * places * block, panel, places, ahead, lines, product);
      const int64_t height = a.rows - j < pair_places ? a.rows - j : pair_places;
      const int64_t width = columns - c < pair_places ? columns - c : pair_places;
      put_product(product, height, width, bias ? bias + c : nullptr, out + j * out_stride + c, out_stride, add);
    }
  }
}

// `first`, a multiple of 32: the first of the outputs.
static void multiply_on_tiles(const SlotRows& p, const PackedMatrix& m, const Operand<float>& a, const float* bias,
                              float* out, int64_t out_stride, bool add, int64_t first, int64_t columns) {
  const auto* const panels = static_cast<const uint32_t*>(p.packed) + m.place;
  const auto* const data = static_cast<const float*>(m.data);
  const int64_t places = place_blocks(a.inner), size = panel_words(a.inner);
  const int64_t next_rows = places * dense_planes * block_words;
  alignas(64) float product[pair_places * pair_places];
  for (int64_t c = 0; c < columns; c += pair_places) {
    const uint32_t* const panel = panels + (first + c) / block * size;
    const int64_t width = columns - c < pair_places ? columns - c : pair_places;
    const bool exact = panel[1] && panel[size + 1];
    Ahead ahead = panels_ahead(panel, size, c + pair_places < columns);
    const int64_t steps = even_blocks(a.rows) / 2 * places, lines = (2 * size / 16 + steps - 1) / steps;
    for (int64_t j = 0; j < a.rows; j += pair_places) {
      const int64_t height = a.rows - j < pair_places ? a.rows - j : pair_places;
      const uint32_t* const rows = a.words + j / block * next_rows;
      if (exact)
        multiply_pairs<true>(rows, next_rows, panel + header_words, size, places, ahead, lines, product);
      else
        multiply_pairs<false>(rows, next_rows, panel + header_words, size, places, ahead, lines, product);
      const uint32_t lost = a.lost[j / block] | static_cast<uint32_t>(a.lost[j / block + 1]) << block;
      if (lost || !panel[0] || !panel[size])
        for (int64_t i = 0; i < height; ++i)
          for (int64_t d = 0; d < width; ++d)
            if (lost >> i & 1 || !panel[d / block * size])
              product[i * pair_places + d] = dense_dot(
                  a.data + (j + i) * a.stride, data + (first + c + d) * m.outer_stride, m.inner_stride, a.inner);
      put_product(product, height, width, bias ? bias + c : nullptr, out + j * out_stride + c, out_stride, add);
    }
  }
}
#endif

// Rows as a factor; `words`: room for them on tiles.
template <class T>
OBJSLOT_INLINE Operand<T> operand(const SlotRows& p, const T* data, int64_t stride, int64_t rows, int64_t inner,
                                  uint32_t* words) {
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    if (p.tiles) return (p.half ? round_operand : split_operand)(data, stride, rows, inner, words);
#endif
  (void)p, (void)words;
  return {data, stride, rows, inner};
}
OBJSLOT_INLINE int64_t operand_size(const SlotRows& p, int64_t rows, int64_t inner) {
#ifdef OBJSLOT_TILES
  if (p.half) return even_blocks(rows) * block * place_blocks(inner) * block;
  if (p.tiles) return operand_words(rows, inner);
#endif
  (void)p, (void)rows, (void)inner;
  return 0;
}

// out (rows, columns) = a (rows, inner) times the outputs of a matrix from `first` on, + bias, or added to what is
// there. `first` is a multiple of what the matrix is packed in; `bias` may be null and begins with its bias.
template <class T>
static void multiply(const SlotRows& p, const PackedMatrix& m, const Operand<T>& a, const T* bias, T* out,
                     int64_t out_stride, bool add, int64_t first, int64_t columns) {
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    if (p.tiles)
      return (p.half ? multiply_halves_on_tiles : multiply_on_tiles)(p, m, a, bias, out, out_stride, add, first,
                                                                     columns);
#endif
  multiply_plainly<T>(a, static_cast<const T*>(p.packed) + m.place + first * a.inner, columns, bias, out, out_stride,
                      add);
}
template <class T>
static void multiply(const SlotRows& p, const PackedMatrix& m, const Operand<T>& a, const T* bias, T* out,
                     int64_t out_stride, bool add) {
  multiply<T>(p, m, a, bias, out, out_stride, add, 0, m.outer);
}

}  // namespace objslot::OBJSLOT_ISA
