// Slot attention backward: the weights are made again tile by tile; k and v are read once, their gradients
// written once.
#include "slot_tile.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct BackwardScratch {
  // q and the gradient of the updates over the mass: packed by lane, and as rows.
  T *qt, *dzt, *q_rows, *dz_rows;
  T *eps, *bias, *centre;
  T *weights, *slopes, *logit_grads, *sums, *row;
  T *grad_q, *grad_bias, *grad_mask;
  T *buffer, *keys, *values, *grad_keys, *grad_values;
  Live<T> live;
};

template <class T>
static BackwardScratch<T> backward_scratch(const SlotAttentionProblem& p, const Layout& layout, Shelf& shelf) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  const int64_t longest = keys > values ? keys : values;
  BackwardScratch<T> s;
  s.qt = shelf.take<T>(p.width * layout.lanes);
  s.dzt = shelf.take<T>(p.value_width * layout.lanes);
  s.q_rows = shelf.take<T>(layout.rows * keys);
  s.dz_rows = shelf.take<T>(layout.rows * values);
  s.eps = shelf.take<T>(layout.lanes);
  s.bias = shelf.take<T>(layout.lanes);
  s.centre = shelf.take<T>(layout.lanes);
  s.weights = shelf.take<T>(tile * layout.lanes);
  s.slopes = shelf.take<T>(tile * layout.lanes);
  s.logit_grads = shelf.take<T>(tile * layout.lanes);
  s.sums = shelf.take<T>(layout.lanes);
  s.row = shelf.take<T>(layout.lanes);
  s.grad_q = shelf.take<T>(layout.rows * keys);
  s.grad_bias = shelf.take<T>(layout.lanes);
  s.grad_mask = shelf.take<T>(p.groups * tile);
  s.buffer = shelf.take<T>((longest > layout.lanes ? longest : layout.lanes) + tile);
  const bool copies = p.mask || p.row_mean || !native<T>(p.element);
  s.keys = shelf.take<T>(copies ? tile * keys : 0);
  s.values = shelf.take<T>(copies && p.v ? tile * values : 0);
  s.grad_keys = shelf.take<T>(copies ? tile * keys : 0);
  s.grad_values = shelf.take<T>(copies && p.v ? tile * values : 0);
  s.live.index = shelf.take<int32_t>(tile);
  s.live.mask = shelf.take<T>(p.mask ? p.groups * tile : 0);
  s.live.lanes = shelf.take<T>(p.mask ? tile * layout.lanes : 0);
  return s;
}

// What does not depend on the position: q, the upper gradient over the mass, and the slope's centre
// <grad_updates, updates> / mass.
template <class T>
static void prepare(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                    BackwardScratch<T>& s, int64_t batch) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  lane_constants<T>(p, layout, batch, s.buffer, s.eps, s.bias);
  pack_transposed<T>(p.q, p.element, batch * p.q_stride, layout, p.width, T(p.scale * 1.44269504088896340736),
                     s.buffer, s.qt);
  clear(s.q_rows, layout.rows * keys);
  clear(s.dz_rows, layout.rows * values);
  clear(s.dzt, p.value_width * layout.lanes);
  clear(s.centre, layout.lanes);
  clear(s.grad_q, layout.rows * keys);
  clear(s.grad_bias, layout.lanes);
  const T scale = T(p.scale);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const int64_t lane = g * layout.step + i, slot = (batch * p.groups + g) * p.slots + i;
      const T* q = read_row<T>(p.q, p.element, batch * p.q_stride + (g * p.slots + i) * p.width, p.width, s.buffer);
      T* q_row = s.q_rows + lane * keys;
      for (int64_t d = 0; d < p.width; ++d) q_row[d] = scale * q[d];
      if (!r.grad_updates) continue;
      T* dz = s.dz_rows + lane * values;
      const T* grad = read_row<T>(r.grad_updates, p.element, slot * p.value_width, p.value_width, dz);
      const T* update = read_row<T>(r.updates, p.element, slot * p.value_width, p.value_width, s.buffer);
      const T inverse = reciprocal_or_zero(static_cast<const T*>(r.mass)[slot]);
      T inner = T(0);
#pragma omp simd reduction(+ : inner)
      for (int64_t d = 0; d < p.value_width; ++d) inner += grad[d] * update[d];
      s.centre[lane] = -inner * inverse;
      T* column = s.dzt + lane;
      for (int64_t d = 0; d < p.value_width; ++d) {
        dz[d] = grad[d] * inverse;
        column[d * layout.lanes] = dz[d];
      }
    }
}

// The gradient of the logits by live position and lane, zero in padding.
template <class T>
static void read_logit_grads(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                             const BackwardScratch<T>& s, int64_t batch, int64_t begin, int64_t count) {
  clear(s.logit_grads, s.live.count * layout.lanes);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const T* row = read_row<T>(r.grad_logits, p.element,
                                 ((batch * p.groups + g) * p.slots + i) * p.positions + begin, count, s.buffer);
      T* column = s.logit_grads + g * layout.step + i;
      for (int64_t j = 0; j < s.live.count; ++j) column[j * layout.lanes] = row[s.live.all ? j : s.live.index[j]];
    }
}

// weights: logits to masked weights with eps. slopes: gradient of the weights to gradient of the logits.
template <class T, int Step>
OBJSLOT_INLINE void back_through_softmax(const SlotAttentionGradient& r, const Layout& layout,
                                         const BackwardScratch<T>& s) {
  for (int64_t j = 0; j < s.live.count; ++j) {
    T* row = s.weights + j * layout.lanes;
    T* slope = s.slopes + j * layout.lanes;
    const T* mask = s.live.lanes ? s.live.lanes + j * layout.lanes : nullptr;
    softmax_lanes<T, Step>(row, layout);
    if (r.grad_mask) {
      for (int64_t z = 0; z < layout.lanes; z += width<T>)
        store(s.row + z, load(slope + z) * (load(row + z) + load(s.eps + z)));
      sum_groups<T, Step>(s.row, layout, s.sums);
      const int64_t at = s.live.all ? j : s.live.index[j];
      for (int64_t g = 0; g < layout.groups; ++g)
        s.grad_mask[g * tile + at] = mask[g * layout.step] == T(0) ? T(0) : s.sums[g * layout.step];
    }
    for (int64_t z = 0; z < layout.lanes; z += width<T>) {
      Vec<T> product = load(row + z) * load(slope + z);
      if (mask) {
        const Vec<T> factor = load(mask + z);
        product = factor == T(0) ? Vec<T>{} : product * factor;
      }
      store(slope + z, product);
    }
    sum_groups<T, Step>(slope, layout, s.sums);
    for (int64_t z = 0; z < layout.lanes; z += width<T>) {
      const Vec<T> probability = load(row + z);
      Vec<T> weight = probability + load(s.eps + z);
      Vec<T> grad = load(slope + z) - probability * load(s.sums + z);
      if (mask) {
        const Vec<T> factor = load(mask + z);
        weight = factor == T(0) ? Vec<T>{} : weight * factor;
        grad = factor == T(0) ? Vec<T>{} : grad;
      }
      if (r.grad_logits) grad += load(s.logit_grads + j * layout.lanes + z);
      store(row + z, weight);
      store(slope + z, grad);
    }
  }
  if (!r.grad_bias) return;
  clear(s.sums, layout.lanes);
  for (int64_t j = 0; j < s.live.count; ++j)
    for (int64_t z = 0; z < layout.lanes; z += width<T>)
      store(s.sums + z, load(s.sums + z) + load(s.slopes + j * layout.lanes + z));
  for (int64_t z = 0; z < layout.lanes; z += width<T>)
    store(s.grad_bias + z, load(s.grad_bias + z) + load(s.sums + z));
}

// Writes rows (live positions, columns) of a sum of products to their places; zeros where nothing is live.
template <class T, int Terms>
static void write_product(const Layout& layout, const Live<T>& live, const Term<T>* terms,
                          const int64_t* features_stride, int64_t columns, void* out, Element element, int64_t offset,
                          int64_t count, T* copy, bool streamed) {
  if (live.all && native<T>(element)) {
    spread<T, Terms>(terms, layout.lanes, layout.rows, features_stride, count, columns,
                     static_cast<T*>(out) + offset, columns, streamed);
    return;
  }
  const int64_t stride = padded<T>(columns);
  spread<T, Terms>(terms, layout.lanes, layout.rows, features_stride, live.count, columns, copy, stride, false);
  if (!live.all) write_zeros<T>(out, element, offset, count * columns);
  for (int64_t j = 0; j < live.count; ++j)
    write_row<T>(copy + j * stride, out, element, offset + (live.all ? j : live.index[j]) * columns, columns);
}

// The gradient of normalised keys: added to what is there, then passed back through the normalisation, as asked.
template <class T>
static void write_normalised(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                             const BackwardScratch<T>& s, const Term<T>* terms, const int64_t* features_stride,
                             const T* keys, int64_t batch, int64_t from, int64_t count) {
  const int64_t stride = padded<T>(p.width), row = batch * p.positions + from;
  const T* inverses = static_cast<const T*>(p.row_inverse) + row;
  T* out = static_cast<T*>(r.grad_k) + row * p.width;
  spread<T, 2>(terms, layout.lanes, layout.rows, features_stride, s.live.count, p.width, s.grad_keys, stride, false);
  if (!s.live.all && !r.add_to_k) clear(out, count * p.width);
  for (int64_t j = 0; j < s.live.count; ++j) {
    const int64_t at = s.live.all ? j : s.live.index[j];
    T* grad = s.grad_keys + j * stride;
    T* target = out + at * p.width;
    const T* key = keys + j * stride;
    Vec<T> sum{}, inner{};
    int64_t d = 0;
    for (; d + width<T> <= p.width; d += width<T>) {
      Vec<T> value = load(grad + d);
      if (r.add_to_k) value += load(target + d);
      store(r.through_norm ? grad + d : target + d, value);
      sum += value;
      inner += value * load(key + d);
    }
    const int64_t part = p.width - d;
    if (part > 0) {
      Vec<T> value = load_first(grad + d, part);
      if (r.add_to_k) value += load_first(target + d, part);
      if (r.through_norm)
        store(grad + d, value);
      else
        store_first(target + d, value, part);
      sum += value;
      inner += value * load_first(key + d, part);
    }
    if (!r.through_norm) continue;
    const Vec<T> inverse = broadcast(inverses[at]), mean = broadcast(sum_lanes<T>(sum) / T(p.width));
    const Vec<T> slope = broadcast(sum_lanes<T>(inner) / T(p.width));
    for (d = 0; d + width<T> <= p.width; d += width<T>)
      store(target + d, (load(grad + d) - mean - load(key + d) * slope) * inverse);
    if (part > 0) store_first(target + d, (load(grad + d) - mean - load(key + d) * slope) * inverse, part);
  }
}

// Streaming pays for outputs that no cache keeps; it needs rows of whole, aligned vectors.
template <class T>
static bool streams(const SlotAttentionProblem& p, const void* out, int64_t columns) {
  return native<T>(p.element) && columns % width<T> == 0 &&
         reinterpret_cast<uintptr_t>(out) % OBJSLOT_VECTOR_BYTES == 0 &&
         p.batch * p.positions * columns * static_cast<int64_t>(sizeof(T)) > (int64_t{4} << 20);
}

template <class T>
static void backward_share(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                           BackwardScratch<T>& s, int64_t batch, int64_t begin, int64_t end) {
  const int64_t feature_strides[2] = {padded<T>(p.width), padded<T>(p.value_width)};
  const int64_t keys_padded = feature_strides[0];
  prepare<T>(p, r, layout, s, batch);
  const bool stream_keys = streams<T>(p, r.grad_k, p.width), stream_values = streams<T>(p, r.grad_v, p.value_width);
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t count = end - from < tile ? end - from : tile;
    find_live<T>(p, layout, batch, from, count, s.buffer, s.live);
    int64_t key_stride, value_stride;
    const T* keys = live_keys<T>(p, batch, from, s.live, s.keys, &key_stride);
    const T* values = keys;
    value_stride = key_stride;
    if (p.v)
      values = live_rows<T>(p.v, p.element, batch * p.v_stride + from * p.v_row_stride, p.v_row_stride, p.value_width,
                            s.live, s.values, &value_stride);
    const Ahead next_keys =
        ahead_of<T>(p.k, p.element, batch * p.k_stride, p.k_row_stride, p.width, from + tile, end);
    const Ahead next_values =
        ahead_of<T>(p.v, p.element, batch * p.v_stride, p.v_row_stride, p.value_width, from, end);
    dots<T>(keys, key_stride, s.live.count, p.width, s.qt, s.bias, layout.lanes, s.weights, next_values);
    dots<T>(values, value_stride, s.live.count, p.value_width, s.dzt, s.centre, layout.lanes, s.slopes, next_keys);
    if (r.grad_logits) read_logit_grads<T>(p, r, layout, s, batch, from, count);
    if (r.grad_mask) clear(s.grad_mask, p.groups * tile);
    with_step<T>(layout, [&](auto step) { back_through_softmax<T, step()>(r, layout, s); });
    if (r.grad_mask)
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t at = (batch * p.groups + g) * p.positions + from;
        T* row = s.grad_mask + g * tile;
        if (r.add_to_mask) {
          const T* before = read_row<T>(r.grad_mask, p.element, at, count, s.buffer);
          for (int64_t j = 0; j < count; ++j) row[j] += before[j];
        }
        write_row<T>(row, r.grad_mask, p.element, at, count);
      }
    const Term<T> terms[2] = {{s.slopes, s.q_rows}, {s.weights, s.dz_rows}};
    const int64_t row = batch * p.positions + from;
    if (r.grad_k && p.v)
      write_product<T, 1>(layout, s.live, terms, feature_strides, p.width, r.grad_k, p.element, row * p.width, count,
                          s.grad_keys, stream_keys);
    if (r.grad_k && p.row_mean)
      write_normalised<T>(p, r, layout, s, terms, feature_strides, keys, batch, from, count);
    else if (r.grad_k && !p.v)
      write_product<T, 2>(layout, s.live, terms, feature_strides, p.width, r.grad_k, p.element, row * p.width, count,
                          s.grad_keys, stream_keys);
    if (r.grad_v)
      write_product<T, 1>(layout, s.live, terms + 1, feature_strides + 1, p.value_width, r.grad_v, p.element,
                          row * p.value_width, count, s.grad_values, stream_values);
    if (r.grad_q)
      gather<T>(s.slopes, layout.lanes, layout.rows, s.live.count, keys, key_stride, p.width, s.grad_q, keys_padded,
                {});
  }
  if (stream_keys || stream_values) end_of_stream();
}

template <class T>
static void write_slots(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                        int64_t batch, T* grad_q, const T* grad_bias) {
  const int64_t keys = padded<T>(p.width);
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
  const int64_t one = layout.rows * padded<T>(p.width) + layout.lanes;
  if (partial) *partial = base + threads * scratch.used;
  return threads * scratch.used + (shares > 1 ? p.batch * shares * one * static_cast<int64_t>(sizeof(T)) : 0);
}

template <class T>
static void run_backward(const SlotAttentionProblem& p, const SlotAttentionGradient& r, void* workspace,
                         int threads) {
  const Layout layout = layout_of<T>(p.groups, p.slots);
  const int64_t shares = shares_of(p.positions), keys = padded<T>(p.width);
  const int64_t one = layout.rows * keys + layout.lanes;
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
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / shares, index = item % shares;
      if (shares > 1) {
        s.grad_q = partial + item * one;
        s.grad_bias = s.grad_q + layout.rows * keys;
      }
      backward_share<T>(p, r, layout, s, batch, share_begin(p.positions, shares, index),
                        share_begin(p.positions, shares, index + 1));
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
      write_slots<T>(p, r, layout, batch, total, total + layout.rows * keys);
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
