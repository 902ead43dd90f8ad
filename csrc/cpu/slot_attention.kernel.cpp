// Slot attention forward: one pass over keys and values; the weights of a tile never leave the cache.
#include "slot_tile.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct ForwardScratch {
  T *qt, *eps, *bias, *weights, *sums, *mass, *tile_mass, *buffer, *keys, *values;
  Live<T> live;
};

template <class T>
static ForwardScratch<T> forward_scratch(const SlotAttentionProblem& p, const Layout& layout, Shelf& shelf) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  const int64_t longest = keys > values ? keys : values;
  ForwardScratch<T> s;
  s.qt = shelf.take<T>(p.width * layout.lanes);
  s.eps = shelf.take<T>(layout.lanes);
  s.bias = shelf.take<T>(layout.lanes);
  s.weights = shelf.take<T>(tile * layout.lanes);
  s.sums = shelf.take<T>(layout.rows * values);
  s.mass = shelf.take<T>(layout.lanes);
  s.tile_mass = shelf.take<T>(layout.lanes);
  s.buffer = shelf.take<T>((longest > layout.lanes ? longest : layout.lanes) + tile);
  const bool copies = p.mask || p.row_mean || !native<T>(p.element);
  s.keys = shelf.take<T>(copies ? tile * keys : 0);
  s.values = shelf.take<T>(copies && p.v ? tile * values : 0);
  s.live.index = shelf.take<int32_t>(tile);
  s.live.mask = shelf.take<T>(p.mask ? p.groups * tile : 0);
  s.live.lanes = shelf.take<T>(p.mask ? tile * layout.lanes : 0);
  return s;
}

// weights: probabilities to masked weights with eps; adds them to the mass.
template <class T, int Step>
OBJSLOT_INLINE void weigh(const Layout& layout, const ForwardScratch<T>& s) {
  clear(s.tile_mass, layout.lanes);
  for (int64_t j = 0; j < s.live.count; ++j) {
    T* row = s.weights + j * layout.lanes;
    softmax_lanes<T, Step>(row, layout);
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
static void write_logits(const SlotAttentionProblem& p, const Layout& layout, const ForwardScratch<T>& s,
                         int64_t batch, int64_t begin, int64_t count, void* logits) {
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const T* column = s.weights + g * layout.step + i;
      T* row = s.buffer;
      if (!s.live.all) clear(row, count);
      for (int64_t j = 0; j < s.live.count; ++j)
        row[s.live.all ? j : s.live.index[j]] = column[j * layout.lanes] * T(0.693147180559945309417);
      write_row<T>(row, logits, p.element, ((batch * p.groups + g) * p.slots + i) * p.positions + begin, count);
    }
}

// Sums (rows, values padded) and mass (lanes) over a share of the positions of one element of the batch.
template <class T>
static void forward_share(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                          ForwardScratch<T>& s, int64_t batch, int64_t begin, int64_t end) {
  const int64_t values = padded<T>(p.value_width);
  lane_constants<T>(p, layout, batch, s.buffer, s.eps, s.bias);
  pack_transposed<T>(p.q, p.element, batch * p.q_stride, layout, p.width, T(p.scale * 1.44269504088896340736),
                     s.buffer, s.qt);
  clear(s.sums, layout.rows * values);
  clear(s.mass, layout.lanes);
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t count = end - from < tile ? end - from : tile;
    find_live<T>(p, layout, batch, from, count, s.buffer, s.live);
    int64_t key_stride, value_stride;
    const T* keys = live_keys<T>(p, batch, from, s.live, s.keys, &key_stride);
    const Ahead next_keys =
        ahead_of<T>(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from + tile, end);
    const Ahead next_values =
        ahead_of<T>(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, end);
    dots<T>(keys, key_stride, s.live.count, p.width, s.qt, s.bias, layout.lanes, s.weights, next_values);
    if (r.logits) write_logits<T>(p, layout, s, batch, from, count, r.logits);
    with_step<T>(layout, [&](auto step) { weigh<T, step()>(layout, s); });
    const T* rows = keys;
    value_stride = key_stride;
    if (p.v)
      rows = live_rows<T>(p.v, p.element, batch * p.v_stride + from * p.v_row_stride, p.v_row_stride, p.value_width,
                          s.live, s.values, &value_stride);
    gather<T>(s.weights, layout.lanes, layout.rows, s.live.count, rows, value_stride, p.value_width, s.sums, values,
              next_keys);
  }
}

template <class T>
static void write_updates(const SlotAttentionProblem& p, const SlotAttentionResult& r, const Layout& layout,
                          int64_t batch, T* sums, const T* mass) {
  const int64_t values = padded<T>(p.value_width);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const int64_t lane = g * layout.step + i, out = (batch * p.groups + g) * p.slots + i;
      T* row = sums + lane * values;
      const T inverse = reciprocal_or_zero(mass[lane]);
      for (int64_t d = 0; d < values; d += width<T>) store(row + d, load(row + d) * inverse);
      write_row<T>(row, r.updates, p.element, out * p.value_width, p.value_width);
      static_cast<T*>(r.mass)[out] = mass[lane];
    }
}

template <class T>
static int64_t forward_plan(const SlotAttentionProblem& p, int threads, char* base, char** partial) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  Shelf scratch{nullptr};
  forward_scratch<T>(p, layout, scratch);
  const int64_t shares = shares_of(p.positions);
  const int64_t one = layout.rows * padded<T>(p.value_width) + layout.lanes;
  if (partial) *partial = base + threads * scratch.used;
  return threads * scratch.used + (shares > 1 ? p.batch * shares * one * static_cast<int64_t>(sizeof(T)) : 0);
}

template <class T>
static void run_forward(const SlotAttentionProblem& p, const SlotAttentionResult& r, void* workspace, int threads) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  const int64_t shares = shares_of(p.positions), values = padded<T>(p.value_width);
  const int64_t one = layout.rows * values + layout.lanes;
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
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / shares, index = item % shares;
      if (shares > 1) {
        s.sums = partial + item * one;
        s.mass = s.sums + layout.rows * values;
      }
      forward_share<T>(p, r, layout, s, batch, share_begin(p.positions, shares, index),
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
      write_updates<T>(p, r, layout, batch, total, total + layout.rows * values);
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

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotAttentionKernels, forward_workspace, forward)
