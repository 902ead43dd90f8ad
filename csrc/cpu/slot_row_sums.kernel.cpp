// Gradients of the layers: rows of slots, and products of two of them, added up over the rows.
#include "objslot/slot_loop.h"
#include "slot_tiles.h"

namespace objslot::OBJSLOT_ISA {

// Outputs that one thread works on at a time.
constexpr int64_t strip_width = registers == 32 ? 32 : 48;

template <class T>
static void run_rows(const RowSum* list, int64_t count, int threads) {
  constexpr int64_t block = 4 * width<T>;
  int64_t blocks = 0;
  for (int64_t k = 0; k < count; ++k) blocks += (list[k].columns + block - 1) / block;
  parallel_for(blocks, threads, [&](int64_t first, int64_t last, int) {
    const FlushSubnormals flush;
    int64_t at = 0;
    for (int64_t k = 0; k < count; ++k) {
      const RowSum& m = list[k];
      for (int64_t c = 0; c < m.columns; c += block, ++at) {
        if (at < first || at >= last) continue;
        const int64_t columns = m.columns - c < block ? m.columns - c : block;
        const T* row = static_cast<const T*>(m.data) + c;
        T* out = static_cast<T*>(m.out) + c;
        Vec<T> total[4];
        for (int64_t z = 0; z * width<T> < columns; ++z)
          total[z] = load_upto(out + z * width<T>, columns - z * width<T>);
        for (int64_t j = 0; j < m.rows; j += m.together) {
          const int64_t end = j + m.together < m.rows ? j + m.together : m.rows;
          Vec<T> part[4] = {};
          for (int64_t i = j; i < end; ++i, row += m.stride)
            for (int64_t z = 0; z * width<T> < columns; ++z)
              part[z] += load_upto(row + z * width<T>, columns - z * width<T>);
          for (int64_t z = 0; z * width<T> < columns; ++z) total[z] += part[z];
        }
        for (int64_t z = 0; z * width<T> < columns; ++z)
          store_upto(out + z * width<T>, total[z], columns - z * width<T>);
      }
    }
  });
}

// out (outer, inner) += upper (rows, outer)^T lower (rows, inner), for a strip of outputs at most.
template <class T>
static void add_plainly(const T* upper, int64_t upper_stride, int64_t outer, const T* lower, int64_t lower_stride,
                        int64_t inner, int64_t rows, T* out, int64_t out_stride) {
  // One piece of memory: rows far apart share the sets of the first cache.
  alignas(64) T strip[row_step * strip_width];
  for (int64_t j = 0; j < rows; j += row_step) {
    const int64_t left = rows - j, count = left < row_step ? left : row_step;
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(strip + i * strip_width, upper + (j + i) * upper_stride, static_cast<size_t>(outer) * sizeof(T));
    const T* const below = lower + j * lower_stride;
    const auto* const next = reinterpret_cast<const char*>(below + count * lower_stride);
    const int64_t size = left - count < row_step ? left - count : row_step;
    const Ahead ahead{next, next + size * lower_stride * static_cast<int64_t>(sizeof(T))};
    gather<T>(strip, strip_width, outer, count, below, lower_stride, inner, out, out_stride,
              lower_stride == inner ? ahead : Ahead{});
  }
}

template <class T>
static void run_products(int64_t rows, const RowProduct* list, int64_t count, int threads) {
  int64_t strips = 0;
  for (int64_t k = 0; k < count; ++k) strips += (list[k].outer + strip_width - 1) / strip_width;
  parallel_for(strips, threads, [&](int64_t first, int64_t last, int) {
    const FlushSubnormals flush;
    int64_t at = 0;
    for (int64_t k = 0; k < count; ++k) {
      const RowProduct& m = list[k];
      for (int64_t i = 0; i < m.outer; i += strip_width, ++at)
        if (at >= first && at < last)
          add_plainly<T>(static_cast<const T*>(m.upper) + i, m.upper_stride,
                         m.outer - i < strip_width ? m.outer - i : strip_width, static_cast<const T*>(m.lower),
                         m.lower_stride, m.inner, rows, static_cast<T*>(m.out) + i * m.inner, m.inner);
    }
  });
}

#ifdef OBJSLOT_TILES

constexpr int64_t sum_parts = 3, step_words = sum_parts * block_words;
// Steps of rows over which a strip of `upper` stays in the first cache.
constexpr int64_t steps_together = 4;
static_assert(row_step == block_depth && strip_width == 2 * block);

OBJSLOT_INLINE int64_t steps_of(int64_t rows) { return (rows + row_step - 1) / row_step; }

// Two halves of a step of rows, 16 columns of each, zero past the last row and column. Returns whether every column's
// largest entry is zero or of a size that tiles keep.
OBJSLOT_INLINE bool read_step(const float* from, int64_t stride, int64_t rows, int64_t columns, __m512* half) {
  const __mmask16 mask = lanes_left(columns);
  __m512 top = _mm512_setzero_ps(), odd = top;
#pragma GCC unroll 8
  for (int64_t j = 0; j < row_step; ++j) {
    const __m512 x = _mm512_maskz_loadu_ps(j < rows ? mask : 0, from + j * stride);
    top = _mm512_max_ps(top, _mm512_abs_ps(x));
    odd = _mm512_add_ps(odd, _mm512_sub_ps(x, x));
    half[j] = x;
  }
  const __mmask16 bad = _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) |
                        _mm512_cmp_ps_mask(top, _mm512_set1_ps(most_entry), _CMP_GT_OQ) |
                        (_mm512_cmp_ps_mask(top, _mm512_set1_ps(least_entry), _CMP_LT_OQ) &
                         _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_NEQ_OQ));
  return bad == 0;
}

// A strip of 32 columns as a factor, (2 blocks, steps, parts); `turned`: as the left one, its columns as rows. sound:
// of every step.
template <bool turned>
static void pack_strip(const float* from, int64_t stride, int64_t rows, int64_t columns, uint32_t* to, bool* sound) {
  const int64_t steps = steps_of(rows);
  for (int64_t k = 0; k < steps; ++k) sound[k] = true;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t k = 0; k < steps; ++k, to += step_words) {
      __m512 half[2 * block];
      sound[k] &=
          read_step(from + k * row_step * stride + b * block, stride, rows - k * row_step, columns - b * block, half);
      if constexpr (turned) {
        transpose_block(half);
        transpose_block(half + block);
      }
      for (int64_t i = 0; i < block; ++i) split_nearest<sum_parts>(half[i], half[block + i], to + i * block);
    }
}

struct ProductScratch {
  uint32_t *lower, *upper;
  bool *lower_sound, *upper_sound;
  float* sums;
};
static ProductScratch product_scratch(int64_t rows, int64_t inner, int threads, int worker, Shelf& shelf) {
  const int64_t strips = (inner + strip_width - 1) / strip_width, steps = steps_of(rows);
  ProductScratch s;
  s.lower = shelf.take<uint32_t>(strips * 2 * steps * step_words);
  s.lower_sound = shelf.take<bool>(strips * steps);
  for (int k = 0; k < threads; ++k) {
    uint32_t* const upper = shelf.take<uint32_t>(2 * steps * step_words);
    bool* const sound = shelf.take<bool>(steps);
    float* const sums = shelf.take<float>(strip_width * strip_width);
    if (k == worker) s.upper = upper, s.upper_sound = sound, s.sums = sums;
  }
  return s;
}

// The strip of 32 outputs from `i` on.
static void add_strip(const RowProduct& m, int64_t rows, int64_t i, const ProductScratch& s) {
  const int64_t steps = steps_of(rows), next = steps * step_words;
  const int64_t height = m.outer - i < strip_width ? m.outer - i : strip_width;
  const float* const upper = static_cast<const float*>(m.upper) + i;
  pack_strip<true>(upper, m.upper_stride, rows, height, s.upper, s.upper_sound);
  for (int64_t begin = 0; begin < steps; begin += steps_together) {
    const int64_t end = begin + steps_together < steps ? begin + steps_together : steps;
    for (int64_t c = 0; c < m.inner; c += strip_width) {
      const int64_t across = m.inner - c < strip_width ? m.inner - c : strip_width;
      const float* const lower = static_cast<const float*>(m.lower) + c;
      const uint32_t* const packed = s.lower + c / strip_width * 2 * next;
      const bool* const sound = s.lower_sound + c / strip_width * steps;
      float* const out = static_cast<float*>(m.out) + i * m.inner + c;
      // Tiles load and store whole blocks.
      const bool whole = height == strip_width && across == strip_width;
      float* const sums = whole ? out : s.sums;
      const int64_t stride = whole ? m.inner : strip_width;
      if (!whole)
        for (int64_t r = 0; r < strip_width; ++r)
          for (int64_t d = 0; d < strip_width; d += block) {
            const __mmask16 mask = r < height ? lanes_left(across - d) : 0;
            _mm512_store_ps(sums + r * strip_width + d, _mm512_maskz_loadu_ps(mask, out + r * m.inner + d));
          }
      load_sums<Sums::square>(sums, stride);
      for (int64_t k = begin; k < end; ++k) {
        if (s.upper_sound[k] && sound[k]) {
          multiply_square<sum_parts, sum_parts, true, true>(Blocks{s.upper + k * step_words, next},
                                                            Blocks{packed + k * step_words, next}, [] {});
          continue;
        }
        store_sums<Sums::square>(sums, stride);
        add_plainly<float>(upper + k * row_step * m.upper_stride, m.upper_stride, height,
                           lower + k * row_step * m.lower_stride, m.lower_stride, across,
                           rows - k * row_step < row_step ? rows - k * row_step : row_step, sums, stride);
        load_sums<Sums::square>(sums, stride);
      }
      store_sums<Sums::square>(sums, stride);
      if (!whole)
        for (int64_t r = 0; r < height; ++r)
          for (int64_t d = 0; d < across; d += block)
            _mm512_mask_storeu_ps(out + r * m.inner + d, lanes_left(across - d),
                                  _mm512_load_ps(sums + r * strip_width + d));
    }
  }
}

static void run_products_on_tiles(int64_t rows, const RowProduct* list, int64_t count, void* workspace, int threads) {
  for (int64_t k = 0; k < count; ++k) {
    const RowProduct& m = list[k];
    const auto scratch = [&](int worker) {
      Shelf shelf{static_cast<char*>(workspace)};
      return product_scratch(rows, m.inner, threads, worker, shelf);
    };
    parallel_for((m.inner + strip_width - 1) / strip_width, threads, [&](int64_t first, int64_t last, int) {
      const FlushSubnormals flush;
      const ProductScratch s = scratch(0);
      for (int64_t c = first; c < last; ++c)
        pack_strip<false>(static_cast<const float*>(m.lower) + c * strip_width, m.lower_stride, rows,
                          m.inner - c * strip_width, s.lower + c * 2 * steps_of(rows) * step_words,
                          s.lower_sound + c * steps_of(rows));
    });
    parallel_for((m.outer + strip_width - 1) / strip_width, threads, [&](int64_t first, int64_t last, int worker) {
      const FlushSubnormals flush;
      const TileRegisters tile_registers;
      const ProductScratch s = scratch(worker);
      for (int64_t i = first; i < last; ++i) add_strip(m, rows, i * strip_width, s);
    });
  }
}
#endif

static int64_t sums_workspace(int64_t rows, int64_t inner, bool tiles, int threads) {
#ifdef OBJSLOT_TILES
  if (tiles) {
    Shelf shelf{nullptr};
    product_scratch(rows, inner, threads, 0, shelf);
    return shelf.used;
  }
#endif
  (void)rows, (void)inner, (void)tiles, (void)threads;
  return 0;
}

static void add_rows(Element element, const RowSum* list, int64_t count, int threads) {
  if (element == Element::float64)
    run_rows<double>(list, count, threads);
  else
    run_rows<float>(list, count, threads);
}

static void add_products(Element element, int64_t rows, const RowProduct* list, int64_t count, bool tiles,
                         void* workspace, int threads) {
#ifdef OBJSLOT_TILES
  if (tiles) return run_products_on_tiles(rows, list, count, workspace, threads);
#endif
  (void)tiles, (void)workspace;
  if (element == Element::float64)
    run_products<double>(rows, list, count, threads);
  else
    run_products<float>(rows, list, count, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotRowSumsKernels, sums_workspace, add_rows, add_products)
