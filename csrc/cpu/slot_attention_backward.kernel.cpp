// Slot attention backward: the weights are made again tile by tile, unless their probabilities were kept; k and v are
// read once, their gradients written once.
#include "slot_backward_tiles.h"

namespace objslot::OBJSLOT_ISA {

// Streaming pays for outputs that no cache keeps; it needs rows of whole, aligned vectors.
template <class T>
static bool streams(const SlotAttentionProblem& p, const void* out, int64_t columns, bool tiled) {
  const int64_t size = native<T>(p.element) ? sizeof(T) : 2;
  return (native<T>(p.element) || tiled) && columns * size % OBJSLOT_VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(out) % OBJSLOT_VECTOR_BYTES == 0 &&
         p.batch * p.positions * columns * size > (int64_t{4} << 20);
}

// The gradients of the mask that a tile of positions has given.
template <class T>
static void write_mask(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const BackwardScratch<T>& s,
                       int64_t batch, int64_t from, int64_t count) {
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t at = (batch * p.groups + g) * p.positions + from;
    T* row = s.grad_mask + g * tile;
    if (r.add_to_mask) {
      const T* before = read_row<T>(r.grad_mask, p.element, at, count, s.buffer);
      for (int64_t j = 0; j < count; ++j) row[j] += before[j];
    }
    write_row<T>(row, r.grad_mask, p.element, at, count);
  }
}

template <class T>
static void backward_share(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                           BackwardScratch<T>& s, int64_t batch, int64_t begin, int64_t end, bool tiled) {
  const int64_t feature_strides[2] = {padded<T>(p.width), padded<T>(p.value_width)};
  prepare<T>(p, r, layout, s, batch);
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    tiled =
        tiled && with_precision(p.element, [&](auto precision) { return prepare_tiles<precision()>(p, layout, s); });
#endif
  const bool stream_keys = streams<T>(p, r.grad_k, p.width, tiled);
  const bool stream_values = streams<T>(p, r.grad_v, p.value_width, tiled);
  bool packed = false;
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t count = end - from < tile ? end - from : tile;
    find_live<T>(p, layout, batch, from, count, s.buffer, s.live);
    const T *keys = nullptr, *values = nullptr;
    int64_t key_stride = 0, value_stride = 0;
    Ahead after{};
    const auto read = [&] {
      keys = values = live_keys<T>(p, batch, from, s.live, s.keys, &key_stride);
      value_stride = key_stride;
      if (p.v)
        values = live_rows<T>(p.v, p.element, batch * p.v_stride + from * p.v_row_stride, p.v_row_stride, p.value_width,
                              s.live, s.values, &value_stride);
    };
    const T* const probabilities = probabilities_of<T>(p, layout, r.probabilities, batch, from);
    bool on_tiles = false;
#ifdef OBJSLOT_TILES
    if constexpr (sizeof(T) == 4)
      if (tiled) {
        if (p.row_mean) read();
        on_tiles = with_precision(p.element, [&](auto precision) {
          return multiply_on_tiles<precision()>(p, layout, s, keys, batch, from, end, !probabilities);
        });
      }
#endif
    if (!on_tiles) {
      if (!packed) pack_lanes<T>(p, layout, s, batch, !probabilities);
      packed = true;
      if (!keys) read();
      const auto keys_ahead = [&](int64_t position) {
        return ahead_of<T>(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, position, end);
      };
      const auto values_ahead = [&](int64_t position) {
        return ahead_of<T>(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, position, end);
      };
      if (probabilities) {
        dots<T>(values, value_stride, s.live.count, p.value_width, s.dzt, s.centre, layout.lanes, s.slopes,
                p.v && r.grad_q ? keys_ahead(from) : Ahead{});
        after = p.v ? values_ahead(from + tile) : keys_ahead(from + tile);
      } else {
        dots<T>(keys, key_stride, s.live.count, p.width, s.qt, s.bias, layout.lanes, s.weights, values_ahead(from));
        dots<T>(values, value_stride, s.live.count, p.value_width, s.dzt, s.centre, layout.lanes, s.slopes,
                keys_ahead(from + tile));
      }
    }
    if (r.grad_logits) read_logit_grads<T>(p, r, layout, s, batch, from, count);
    if (r.grad_mask) clear(s.grad_mask, p.groups * tile);
    with_step<T>(layout, [&](auto step) { back_through_softmax<T, step()>(r, layout, s, probabilities); });
    if (r.grad_mask) write_mask<T>(p, r, s, batch, from, count);
#ifdef OBJSLOT_TILES
    if constexpr (sizeof(T) == 4)
      if (on_tiles && with_precision(p.element, [&](auto precision) {
            return gradients_on_tiles<precision()>(p, r, layout, s, keys, batch, from, count, stream_keys,
                                                   stream_values);
          }))
        continue;
#endif
    if (!keys) read();
    const Term<T> terms[2] = {{s.slopes, s.q_rows}, {s.weights, s.dz_rows}};
    const int64_t row = batch * p.positions + from;
    if (r.grad_k && p.v)
      write_product<T, 1>(layout, s.live, terms, feature_strides, p.width, r.grad_k, p.element, row * p.width, count,
                          s.grad_keys, stream_keys);
    if (r.grad_k && p.row_mean) {
      spread<T, 2>(terms, layout.lanes, layout.rows, feature_strides, s.live.count, p.width, s.grad_keys,
                   feature_strides[0], false);
      write_normalised<T>(p, r, s, keys, batch, from, count);
    } else if (r.grad_k && !p.v) {
      write_product<T, 2>(layout, s.live, terms, feature_strides, p.width, r.grad_k, p.element, row * p.width, count,
                          s.grad_keys, stream_keys);
    }
    if (r.grad_v)
      write_product<T, 1>(layout, s.live, terms + 1, feature_strides + 1, p.value_width, r.grad_v, p.element,
                          row * p.value_width, count, s.grad_values, stream_values);
    if (r.grad_q)
      gather<T>(s.slopes, layout.lanes, layout.rows, s.live.count, keys, key_stride, p.width, s.grad_q,
                sums_stride<T>(p, p.width), after);
  }
  if (stream_keys || stream_values) end_of_stream();
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    if (tiled && r.grad_q &&
        !sound_rows(s.grad_q, layout.lanes, sums_stride<T>(p, p.width), sums_stride<T>(p, p.width))) {
      SlotAttentionGradient again = r;
      again.grad_k = again.grad_v = again.grad_mask = nullptr;
      backward_share<T>(p, again, layout, s, batch, begin, end, false);
    }
#endif
}

template <class T>
static void write_slots(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                        int64_t batch, T* grad_q, const T* grad_bias) {
  const int64_t keys = sums_stride<T>(p, p.width);
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t lane = g * layout.step, slot = (batch * p.groups + g) * p.slots;
    if (r.grad_bias) write_row<T>(grad_bias + lane, r.grad_bias, p.element, slot, p.slots);
    if (!r.grad_q) continue;
    for (int64_t i = 0; i < p.slots; ++i) {
      T* row = grad_q + (lane + i) * keys;
      for (int64_t d = 0; d < keys; d += width<T>) store(row + d, load(row + d) * T(p.scale));
      write_row<T>(row, r.grad_q, p.element, (slot + i) * p.width, p.width);
    }
  }
}

template <class T>
static int64_t backward_plan(const SlotAttentionProblem& p, int threads, char* base, char** partial) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  Shelf scratch{nullptr};
  backward_scratch<T>(p, layout, scratch);
  const int64_t shares = shares_of(p.positions);
  const int64_t one = layout.lanes * (sums_stride<T>(p, p.width) + 1);
  if (partial) *partial = base + threads * scratch.used;
  return threads * scratch.used + (shares > 1 ? p.batch * shares * one * static_cast<int64_t>(sizeof(T)) : 0);
}

template <class T>
static void run_backward(const SlotAttentionProblem& p, const SlotAttentionGradient& r, void* workspace, int threads) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  const int64_t shares = shares_of(p.positions), keys = sums_stride<T>(p, p.width);
  const int64_t one = layout.lanes * (keys + 1);
  char *base = static_cast<char*>(workspace), *partial_base;
  Shelf counter{nullptr};
  backward_scratch<T>(p, layout, counter);
  backward_plan<T>(p, threads, base, &partial_base);
  T* partial = reinterpret_cast<T*>(partial_base);
  parallel_for(p.batch * shares, threads, [&](int64_t first, int64_t last, int worker) {
    const FlushSubnormals flush;
    Shelf shelf{base + worker * counter.used};
    BackwardScratch<T> s = backward_scratch<T>(p, layout, shelf);
    if (!p.mask) s.live.lanes = nullptr;
#ifdef OBJSLOT_TILES
    const bool tiled = tiles_serve(p);
    const TileRegisters tile_registers(tiled);
#else
    constexpr bool tiled = false;
#endif
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / shares, index = item % shares;
      if (shares > 1) {
        s.grad_q = partial + item * one;
        s.grad_bias = s.grad_q + layout.lanes * keys;
      }
      backward_share<T>(p, r, layout, s, batch, share_begin(p.positions, shares, index),
                        share_begin(p.positions, shares, index + 1), tiled);
      if (shares == 1) write_slots<T>(p, r, layout, batch, s.grad_q, s.grad_bias);
    }
  });
  if (shares == 1) return;
  parallel_for(p.batch, threads, [&](int64_t first, int64_t last, int) {
    const FlushSubnormals flush;
    for (int64_t batch = first; batch < last; ++batch) {
      T* total = partial + batch * shares * one;
      for (int64_t index = 1; index < shares; ++index)
        for (int64_t d = 0; d < one; d += width<T>) store(total + d, load(total + d) + load(total + index * one + d));
      write_slots<T>(p, r, layout, batch, total, total + layout.lanes * keys);
    }
  });
}

static int64_t backward_workspace(const SlotAttentionProblem& p, int threads) {
  return p.element == Element::float64 ? backward_plan<double>(p, threads, nullptr, nullptr)
                                       : backward_plan<float>(p, threads, nullptr, nullptr);
}

static void backward(const SlotAttentionProblem& p, const SlotAttentionGradient& r, void* workspace, int threads) {
  if (p.element == Element::float64)
    run_backward<double>(p, r, workspace, threads);
  else
    run_backward<float>(p, r, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotAttentionBackwardKernels, backward_workspace, backward)
