// Rows of slots forward: projections, GRU or residual sum, MLP; and what every pass prepares.
#include "slot_rows.h"

namespace objslot::OBJSLOT_ISA {

// With fewer rows, packing takes longer than multiplying.
constexpr int64_t least_rows_on_tiles = 32;
static bool tiles(Element element, int64_t rows) {
#ifdef OBJSLOT_TILES
  if (element == Element::bfloat16) return has_tiles();
  return element == Element::float32 && rows >= least_rows_on_tiles && has_tiles();
#else
  return (void)element, (void)rows, false;
#endif
}

static int64_t packed_size(Element element, int64_t outer, int64_t inner, bool tiles) {
#ifdef OBJSLOT_TILES
  if (element == Element::bfloat16) return even_blocks(outer) * half_panel_words(inner);
  if (tiles) return dense_words(outer, inner);
#endif
  (void)tiles;
  return (element == Element::float64 ? padded<double>(outer) : padded<float>(outer)) * inner;
}

template <class T>
static void pack_panel(const PackedMatrix& m, int64_t panel, T* packed) {
  const T* data = static_cast<const T*>(m.data);
  const int64_t begin = panel * panel_width<T>;
  const int64_t columns = m.outer - begin < panel_width<T> ? m.outer - begin : panel_width<T>;
  const int64_t lanes = padded<T>(columns);
  T* out = packed + m.place + begin * m.inner;
  const T* from = data + begin * m.outer_stride;
  if (m.outer_stride == 1) {
    for (int64_t i = 0; i < m.inner; ++i, out += lanes, from += m.inner_stride) {
      for (int64_t c = 0; c < columns; ++c) out[c] = from[c];
      for (int64_t c = columns; c < lanes; ++c) out[c] = T(0);
    }
    return;
  }
  // Through squares, so that both sides stay in the first cache.
  constexpr int64_t square = 16;
  for (int64_t i0 = 0; i0 < m.inner; i0 += square) {
    const int64_t end = i0 + square < m.inner ? i0 + square : m.inner;
    for (int64_t c = 0; c < lanes; ++c) {
      const T* row = from + c * m.outer_stride;
      for (int64_t i = i0; i < end; ++i) out[i * lanes + c] = c < columns ? row[i * m.inner_stride] : T(0);
    }
  }
}

template <class T>
static void run_pack(const PackedMatrix* list, int64_t count, void* packed, int threads) {
  int64_t panels = 0;
  for (int64_t k = 0; k < count; ++k) panels += (list[k].outer + panel_width<T> - 1) / panel_width<T>;
  parallel_for(panels, threads, [&](int64_t first, int64_t last, int) {
    int64_t at = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t mine = (list[k].outer + panel_width<T> - 1) / panel_width<T>;
      for (int64_t panel = 0; panel < mine; ++panel, ++at)
        if (at >= first && at < last) pack_panel<T>(list[k], panel, static_cast<T*>(packed));
    }
  });
}

#ifdef OBJSLOT_TILES
static void pack_panel_on_tiles(Element element, const PackedMatrix& m, int64_t panel, uint32_t* packed) {
  const int64_t from = panel * block * m.outer_stride, outputs = m.outer - panel * block;
  if (element == Element::bfloat16)
    pack_half(static_cast<const uint16_t*>(m.data) + from, m.outer_stride, outputs, m.inner,
              packed + m.place + panel * half_panel_words(m.inner));
  else
    pack_dense(static_cast<const float*>(m.data) + from, m.outer_stride, m.inner_stride, outputs, m.inner,
               packed + m.place + panel * panel_words(m.inner));
}

static void pack_on_tiles(Element element, const PackedMatrix* list, int64_t count, uint32_t* packed, int threads) {
  int64_t panels = 0;
  for (int64_t k = 0; k < count; ++k) panels += even_blocks(list[k].outer);
  parallel_for(panels, threads, [&](int64_t first, int64_t last, int) {
    int64_t at = 0;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t panel = 0; panel < even_blocks(list[k].outer); ++panel, ++at)
        if (at >= first && at < last) pack_panel_on_tiles(element, list[k], panel, packed);
  });
}
#endif

static void pack(Element element, const PackedMatrix* list, int64_t count, void* packed, bool tiles, int threads) {
#ifdef OBJSLOT_TILES
  if (tiles) return pack_on_tiles(element, list, count, static_cast<uint32_t*>(packed), threads);
#endif
  (void)tiles;
  if (element == Element::float64)
    run_pack<double>(list, count, packed, threads);
  else
    run_pack<float>(list, count, packed, threads);
}

template <class T>
static void run_statistics(const SlotLoopProblem& p, double eps, void* mean, void* inverse, int threads) {
  const T* x = static_cast<const T*>(p.x);
  parallel_for(p.batch * p.positions, threads, [&](int64_t first, int64_t last, int) {
    const FlushSubnormals flush;
    for (int64_t at = first; at < last; ++at) {
      const int64_t batch = at / p.positions, row = at % p.positions;
      const Moments<T> m = moments<T>(x + batch * p.x_stride + row * p.x_row_stride, p.input_width, T(eps));
      static_cast<T*>(mean)[at] = m.mean;
      static_cast<T*>(inverse)[at] = m.inverse;
    }
  });
}

static void statistics(const SlotLoopProblem& p, double eps, void* mean, void* inverse, int threads) {
  if (p.element == Element::float64)
    run_statistics<double>(p, eps, mean, inverse, threads);
  else
    run_statistics<float>(p, eps, mean, inverse, threads);
}

template <class T>
struct AdvanceScratch {
  T *normed, *updates, *hidden, *gates;
  uint32_t *words, *slot_words;
};

// Outputs of the gates that are computed together.
template <class T>
OBJSLOT_INLINE int64_t gates_width(const SlotRows& p) {
  return p.tiles ? 64 : panel_width<T>;
}

template <class T>
static AdvanceScratch<T> advance_scratch(const SlotRows& p, int threads, Shelf& shelf) {
  const int64_t rows = block_rows(p, threads);
  AdvanceScratch<T> s;
  s.normed = shelf.take<T>(rows * padded<T>(p.width));
  s.updates = shelf.take<T>(rows * padded<T>(p.width));
  s.hidden = shelf.take<T>(rows * padded<T>(p.hidden));
  s.gates = shelf.take<T>(p.layers.input_gates ? 4 * rows * gates_width<T>(p) : 0);
  const int64_t wider = p.width > p.input_width ? p.width : p.input_width;
  s.words = shelf.take<uint32_t>(operand_size(p, rows, wider > p.hidden ? wider : p.hidden));
  s.slot_words = shelf.take<uint32_t>(p.layers.input_gates ? operand_size(p, rows, p.width) : 0);
  return s;
}

template <class T>
OBJSLOT_INLINE Vec<T> bounded(Vec<T> x) {
  return smaller(broadcast(T(sizeof(T) == 4 ? 120 : 1000)), x);
}
template <class T>
OBJSLOT_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp2<T>(bounded<T>(x * T(-1.44269504088896340736))));
}
template <class T>
OBJSLOT_INLINE Vec<T> tangent(Vec<T> x) {
  return T(1) - T(2) / (T(1) + exp2<T>(bounded<T>(x * T(2.88539008177792681472))));
}

// next = the GRU's answer to the updates, panel by panel of its units. `kept`: r, z, n, hidden part of n, or null.
template <class T>
static void advance_gru(const SlotRows& p, const AdvanceScratch<T>& s, int64_t rows, const T* slots, T* next, T* kept) {
  const T* input_bias = static_cast<const T*>(p.layers.input_gates_bias);
  const T* hidden_bias = static_cast<const T*>(p.layers.hidden_gates_bias);
  const int64_t stride = gates_width<T>(p);
  const Operand<T> updates = operand<T>(p, s.updates, padded<T>(p.width), rows, p.width, s.words);
  const Operand<T> before_them = operand<T>(p, slots, p.width, rows, p.width, s.slot_words);
  T* part[4];
  for (int g = 0; g < 4; ++g) part[g] = s.gates + g * rows * stride;
  for (int64_t c = 0; c < p.width; c += stride) {
    const int64_t columns = p.width - c < stride ? p.width - c : stride;
    for (int g = 0; g < 3; ++g)
      multiply<T>(p, p.input_gates[g], updates, input_bias ? input_bias + g * p.width + c : nullptr, part[g], stride,
                  false, c, columns);
    for (int g = 0; g < 3; ++g)
      multiply<T>(p, p.hidden_gates[g], before_them, hidden_bias ? hidden_bias + g * p.width + c : nullptr,
                  part[g == 2 ? 3 : g], stride, g < 2, c, columns);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t d = 0; d < columns; d += width<T>) {
        const int64_t at = j * stride + d, left = columns - d;
        const Vec<T> r = sigmoid<T>(load(part[0] + at)), z = sigmoid<T>(load(part[1] + at));
        const Vec<T> hidden = load(part[3] + at), n = tangent<T>(fused(r, hidden, load(part[2] + at)));
        const Vec<T> before = load_upto(slots + j * p.width + c + d, left);
        store_upto(next + j * p.width + c + d, fused(z, before - n, n), left);
        if (!kept) continue;
        T* out = kept + j * 4 * p.width + c + d;
        store_upto(out, r, left);
        store_upto(out + p.width, z, left);
        store_upto(out + 2 * p.width, n, left);
        store_upto(out + 3 * p.width, hidden, left);
      }
  }
}

// next += the MLP of its normalised rows
template <class T>
static void add_mlp(const SlotRows& p, const AdvanceScratch<T>& s, int64_t rows, T* next) {
  const T* norm = static_cast<const T*>(p.layers.norm_mlp);
  const T* norm_bias = static_cast<const T*>(p.layers.norm_mlp_bias);
  const int64_t stride = padded<T>(p.width), hidden_stride = padded<T>(p.hidden);
  for (int64_t j = 0; j < rows; ++j) {
    const T* row = next + j * p.width;
    normalise<T>(row, p.width, moments<T>(row, p.width, T(p.mlp_eps)), norm, norm_bias, s.normed + j * stride);
  }
  multiply<T>(p, p.mlp_in, operand<T>(p, s.normed, stride, rows, p.width, s.words),
              static_cast<const T*>(p.layers.mlp_in_bias), s.hidden, hidden_stride, false);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < p.hidden; d += width<T>) {
      T* at = s.hidden + j * hidden_stride + d;
      store(at, larger(Vec<T>{}, load(at)));
    }
  multiply<T>(p, p.mlp_out, operand<T>(p, s.hidden, hidden_stride, rows, p.hidden, s.words),
              static_cast<const T*>(p.layers.mlp_out_bias), next, p.width, true);
}

template <class T>
static void run_advance(const SlotRows& p, const SlotLoopKept* kept, const void* slots, void* next, void* query,
                        void* constant, void* workspace, int threads) {
  Shelf counter{nullptr};
  advance_scratch<T>(p, threads, counter);
  for_blocks(p, threads, [&](int64_t first, int64_t rows, int worker) {
    const FlushSubnormals flush;
    Shelf shelf{static_cast<char*>(workspace) + worker * counter.used};
    const AdvanceScratch<T> s = advance_scratch<T>(p, threads, shelf);
    const T* from = static_cast<const T*>(slots) + first * p.width;
    if (kept) {
      T* to = static_cast<T*>(next) + first * p.width;
      const int64_t stride = padded<T>(p.width);
      make_updates<T>(p, static_cast<const T*>(kept->means) + first * p.input_width,
                      static_cast<const T*>(kept->mass) + first, rows, s.updates, stride, s.words);
      if (p.layers.input_gates) {
        T* gates = static_cast<T*>(kept->gates);
        advance_gru<T>(p, s, rows, from, to, gates ? gates + first * 4 * p.width : nullptr);
      } else {
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t d = 0; d < p.width; ++d) to[j * p.width + d] = from[j * p.width + d] + s.updates[j * stride + d];
      }
      add_mlp<T>(p, s, rows, to);
      from = to;
    }
    if (query)
      make_queries<T>(p, from, rows, s.normed, padded<T>(p.width), static_cast<T*>(query) + first * p.input_width,
                      static_cast<T*>(constant) + first, s.words);
  });
}

static int64_t advance_workspace(const SlotRows& p, int threads) {
  Shelf shelf{nullptr};
  if (p.element == Element::float64)
    advance_scratch<double>(p, threads, shelf);
  else
    advance_scratch<float>(p, threads, shelf);
  return threads * shelf.used;
}

static void advance(const SlotRows& p, const SlotLoopKept* kept, const void* slots, void* next, void* query,
                    void* constant, void* workspace, int threads) {
  if (p.element == Element::float64)
    run_advance<double>(p, kept, slots, next, query, constant, workspace, threads);
  else
    run_advance<float>(p, kept, slots, next, query, constant, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotRowsKernels, tiles, packed_size, pack, statistics, advance_workspace, advance)
