// Slot attention forward: one pass over keys and values; the weights of a tile never leave the cache.
#include "slot_tile_rows.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct ForwardScratch {
  T *qt, *eps, *bias, *weights, *sums, *mass, *tile_mass, *buffer, *keys, *values;
  Live<T> live;
  // On tiles: the slots by lane, packed, and packed weights; words of keys and values.
  T* rows;
  uint32_t *packed, *packed_weights, *words;
};

// Rows of the sums.
template <class T>
static int64_t sums_rows(const SlotAttentionProblem& p, const Layout& layout) {
#ifdef OBJSLOT_TILES
  if (tiles_serve(p)) return layout.lanes;
#endif
  (void)p;
  return layout.rows;
}

template <class T>
static ForwardScratch<T> forward_scratch(const SlotAttentionProblem& p, const Layout& layout, Shelf& shelf) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  const int64_t longest = keys > values ? keys : values;
  ForwardScratch<T> s;
  s.qt = shelf.take<T>(p.width * layout.lanes);
  s.eps = shelf.take<T>(layout.lanes);
  s.bias = shelf.take<T>(layout.lanes);
  s.weights = shelf.take<T>(tile * layout.lanes);
  s.sums = shelf.take<T>(sums_rows<T>(p, layout) * sums_stride<T>(p, p.value_width));
  s.mass = shelf.take<T>(layout.lanes);
  s.tile_mass = shelf.take<T>(layout.lanes);
  s.buffer = shelf.take<T>((longest > layout.lanes ? longest : layout.lanes) + tile);
  const bool copies = p.mask || p.row_mean || !native<T>(p.element);
  s.keys = shelf.take<T>(copies ? tile * keys : 0);
  s.values = shelf.take<T>(copies && p.v ? tile * values : 0);
  take_live(p, layout, shelf, s.live);
#ifdef OBJSLOT_TILES
  if (tiles_serve(p))
    with_precision(p.element, [&](auto precision) {
      constexpr Precision P = precision();
      const int64_t size = slot_parts<P> * block_words, lanes = layout.lanes;
      s.rows = shelf.take<T>(lanes * blocks_of(p.width) * block);
      s.packed = shelf.take<uint32_t>(blocks_of(lanes) * depth_of(p.width) * size);
      s.packed_weights = shelf.take<uint32_t>(blocks_of(lanes) * tile_depth * size);
      s.words = shelf.take<uint32_t>(words_of<P>(lanes, p.width));
    });
#endif
  return s;
}

// weights: logits to masked weights with eps; adds them to the mass. `probabilities`: where those of the tile are
// kept, or null.
template <class T, int Step>
OBJSLOT_INLINE void weigh(const Layout& layout, const ForwardScratch<T>& s, T* probabilities) {
  clear(s.tile_mass, layout.lanes);
  for (int64_t j = 0; j < s.live.count; ++j) {
    T* row = s.weights + j * layout.lanes;
    softmax_lanes<T, Step>(row, layout);
    if (probabilities) copy_lanes(row, layout, probabilities + s.live.at(j) * layout.lanes);
    const T* mask = s.live.lanes ? s.live.lanes + j * layout.lanes : nullptr;
    for (int64_t z = 0; z < layout.lanes; z += width<T>) {
      Vec<T> weight = load(row + z) + load(s.eps + z);
      if (mask) {
        const Vec<T> factor = load(mask + z);
        weight = factor == T(0) ? Vec<T>{} : weight * factor;
      }
      store(row + z, weight);
      store(s.tile_mass + z, load(s.tile_mass + z) + weight);
    }
  }
  for (int64_t z = 0; z < layout.lanes; z += width<T>) store(s.mass + z, load(s.mass + z) + load(s.tile_mass + z));
}

template <class T>
static void write_logits(const SlotAttentionProblem& p, const Layout& layout, const ForwardScratch<T>& s, int64_t batch,
                         int64_t begin, int64_t count, void* logits) {
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const T* column = s.weights + g * layout.step + i;
      T* row = s.buffer;
      if (!s.live.all) clear(row, count);
      for (int64_t j = 0; j < s.live.count; ++j)
        row[s.live.at(j)] = column[j * layout.lanes] * T(0.693147180559945309417);
      write_row<T>(row, logits, p.element, ((batch * p.groups + g) * p.slots + i) * p.positions + begin, count);
    }
}

// Sums (rows, values padded) and mass (lanes) over a share of the positions of one element of the batch.
template <class T>
static void forward_share(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                          ForwardScratch<T>& s, int64_t batch, int64_t begin, int64_t end) {
  const int64_t sums_width = sums_stride<T>(p, p.value_width);
  lane_constants<T>(p, layout, batch, s.buffer, s.eps, s.bias);
  pack_transposed<T>(p.q, p.slot_element, batch * p.q_stride, layout, p.width, T(p.scale * 1.44269504088896340736),
                     s.qt);
  clear(s.sums, sums_rows<T>(p, layout) * sums_width);
  clear(s.mass, layout.lanes);
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t count = end - from < tile ? end - from : tile;
    find_live<T>(p, layout, batch, from, count, s.buffer, s.live);
    int64_t key_stride, value_stride;
    const T* keys = live_keys<T>(p, batch, from, s.live, s.keys, &key_stride);
    const Ahead next_keys = ahead_of<T>(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from + tile, end);
    const Ahead next_values = ahead_of<T>(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, end);
    dots<T>(keys, key_stride, s.live.count, p.width, s.qt, s.bias, layout.lanes, s.weights, next_values);
    if (r.logits) write_logits<T>(p, layout, s, batch, from, count, r.logits);
    T* const probabilities = probabilities_of<T>(p, layout, r.probabilities, batch, from);
    with_step<T>(layout, [&](auto step) { weigh<T, step()>(layout, s, probabilities); });
    const T* rows = keys;
    value_stride = key_stride;
    if (p.v)
      rows = live_rows<T>(p.v, p.element, batch * p.v_stride + from * p.v_row_stride, p.v_row_stride, p.value_width,
                          s.live, s.values, &value_stride);
    gather<T>(s.weights, layout.lanes, layout.rows, s.live.count, rows, value_stride, p.value_width, s.sums, sums_width,
              next_keys);
  }
}

#ifdef OBJSLOT_TILES
// The slots of an element of the batch by lane; zeros in padding. Rows are of whole blocks.
static void lane_rows(const void* slots, Element element, int64_t offset, const Layout& layout, int64_t columns,
                      float* buffer, float* rows) {
  const int64_t stride = blocks_of(columns) * block;
  if (layout.groups * layout.slots < layout.lanes || stride > columns) clear(rows, layout.lanes * stride);
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t i = 0; i < layout.slots; ++i) {
      const float* row = read_row<float>(slots, element, offset + (g * layout.slots + i) * columns, columns, buffer);
      __builtin_memcpy(rows + (g * layout.step + i) * stride, row, static_cast<size_t>(columns) * sizeof(float));
    }
}

// The same on tiles; false where the numbers are not fit for them.
template <Precision P>
static bool forward_share_on_tiles(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                                   ForwardScratch<float>& s, int64_t batch, int64_t begin, int64_t end) {
  const int64_t lanes = layout.lanes, columns = blocks_of(p.width) * block,
                stride = sums_stride<float>(p, p.value_width);
  const int64_t keys = batch * p.k_stride, values = batch * p.v_stride;
  lane_constants<float>(p, layout, batch, s.buffer, s.eps, s.bias);
  lane_rows(p.q, p.slot_element, batch * p.q_stride, layout, p.width, s.buffer, s.rows);
  if (!sound_rows(s.rows, lanes, columns, columns)) return false;
  pack_lanes_right<P, query_parts<P>>(s.rows, lanes, columns, s.packed);
  const float factor = static_cast<float>(p.scale * 1.44269504088896340736);
  clear(s.sums, lanes * stride);
  clear(s.mass, lanes);
  for (int64_t from = begin; from < end; from += tile) {
    find_live<float>(p, layout, batch, from, end - from < tile ? end - from : tile, s.buffer, s.live);
    TileRows rows;
    point_to(rows, p.k, p.element, keys, p.k_row_stride, p.width, from, s.live);
    if (p.row_mean) normalise(rows, p, batch, from, s.live);
    const Ahead next_keys = tile_ahead(p.k, p.element, keys, p.k_row_stride, p.width, from + tile, end);
    rows.ahead = tile_ahead(p.v, p.element, values, p.v_row_stride, p.value_width, from, end);
    multiply_rows<P, query_parts<P>>(rows, s.packed, lanes, s.words, s.weights);
    if (!finish_products(s.weights, s.live.count, lanes, factor, s.bias, false)) return false;
    if (r.logits) write_logits<float>(p, layout, s, batch, from, end - from < tile ? end - from : tile, r.logits);
    float* const probabilities = probabilities_of<float>(p, layout, r.probabilities, batch, from);
    with_step<float>(layout, [&](auto step) { weigh<float, step()>(layout, s, probabilities); });
    pack_weights_turned<slot_parts<P>>(s.weights, s.live.count, lanes, s.packed_weights);
    if (p.v) point_to(rows, p.v, p.element, values, p.v_row_stride, p.value_width, from, s.live);
    rows.ahead = next_keys;
    gather_rows<P>(rows, s.packed_weights, lanes, s.words, s.sums);
  }
  return sound_rows(s.sums, lanes, stride, stride);
}
#endif

template <class T>
static void run_share(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                      ForwardScratch<T>& s, int64_t batch, int64_t begin, int64_t end) {
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    if (tiles_serve(p) && with_precision(p.element, [&](auto precision) {
          return forward_share_on_tiles<precision()>(p, r, layout, s, batch, begin, end);
        }))
      return;
#endif
  forward_share<T>(p, r, layout, s, batch, begin, end);
}

template <class T>
static void write_updates(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                          int64_t batch, T* sums, const T* mass) {
  const int64_t values = sums_stride<T>(p, p.value_width);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const int64_t lane = g * layout.step + i, out = (batch * p.groups + g) * p.slots + i;
      T* row = sums + lane * values;
      const T inverse = reciprocal_or_zero(mass[lane]);
      for (int64_t d = 0; d < values; d += width<T>) store(row + d, load(row + d) * inverse);
      write_row<T>(row, r.updates, p.slot_element, out * p.value_width, p.value_width);
      static_cast<T*>(r.mass)[out] = mass[lane];
    }
}

template <class T>
static int64_t forward_plan(const SlotAttentionProblem& p, int threads, char* base, char** partial) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  Shelf scratch{nullptr};
  forward_scratch<T>(p, layout, scratch);
  const int64_t shares = shares_of(p.positions);
  const int64_t one = sums_rows<T>(p, layout) * sums_stride<T>(p, p.value_width) + layout.lanes;
  if (partial) *partial = base + threads * scratch.used;
  return threads * scratch.used + (shares > 1 ? p.batch * shares * one * static_cast<int64_t>(sizeof(T)) : 0);
}

template <class T>
static void run_forward(const SlotAttentionProblem& p, const SlotAttentionResult& r, void* workspace, int threads) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  const int64_t shares = shares_of(p.positions), sums = sums_rows<T>(p, layout) * sums_stride<T>(p, p.value_width);
  const int64_t one = sums + layout.lanes;
  char *base = static_cast<char*>(workspace), *partial_base;
  Shelf counter{nullptr};
  forward_scratch<T>(p, layout, counter);
  forward_plan<T>(p, threads, base, &partial_base);
  T* partial = reinterpret_cast<T*>(partial_base);
  parallel_for(p.batch * shares, threads, [&](int64_t first, int64_t last, int worker) {
    const FlushSubnormals flush;
    Shelf shelf{base + worker * counter.used};
    ForwardScratch<T> s = forward_scratch<T>(p, layout, shelf);
    if (!p.mask) s.live.lanes = nullptr;
#ifdef OBJSLOT_TILES
    const TileRegisters tile_registers(tiles_serve(p));
#endif
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / shares, index = item % shares;
      if (shares > 1) {
        s.sums = partial + item * one;
        s.mass = s.sums + sums;
      }
      run_share<T>(p, r, layout, s, batch, share_begin(p.positions, shares, index),
                   share_begin(p.positions, shares, index + 1));
      if (shares == 1) write_updates<T>(p, r, layout, batch, s.sums, s.mass);
    }
  });
  if (shares == 1) return;
  parallel_for(p.batch, threads, [&](int64_t first, int64_t last, int) {
    const FlushSubnormals flush;
    for (int64_t batch = first; batch < last; ++batch) {
      T* total = partial + batch * shares * one;
      for (int64_t index = 1; index < shares; ++index)
        for (int64_t d = 0; d < one; d += width<T>) store(total + d, load(total + d) + load(total + index * one + d));
      write_updates<T>(p, r, layout, batch, total, total + sums);
    }
  });
}

static int64_t forward_workspace(const SlotAttentionProblem& p, int threads) {
  return p.element == Element::float64 ? forward_plan<double>(p, threads, nullptr, nullptr)
                                       : forward_plan<float>(p, threads, nullptr, nullptr);
}

static void forward(const SlotAttentionProblem& p, const SlotAttentionResult& r, void* workspace, int threads) {
  if (p.element == Element::float64)
    run_forward<double>(p, r, workspace, threads);
  else
    run_forward<float>(p, r, workspace, threads);
}

static int64_t lanes(const SlotAttentionProblem& p) {
  return p.element == Element::float64 ? layout_of<double>(p.groups, p.slots).lanes
                                       : layout_of<float>(p.groups, p.slots).lanes;
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotAttentionKernels, forward_workspace, forward, lanes)
