// The steps of slot attention backward on one tile of positions.
#pragma once

#include "slot_spread.h"
#include "slot_tile_rows.h"

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
  // On tiles: q and the upper gradient packed for products with rows and over the lanes; the weights and the slopes for
  // products over the lanes, the slopes also for those over positions; words of keys and values; two blocks of columns
  // of a product.
  uint32_t *packed_q, *packed_dz, *packed_q_rows, *packed_dz_rows;
  uint32_t *weight_words, *slope_words, *packed_slopes, *words;
  T* product;
};

template <class T>
static BackwardScratch<T> backward_scratch(const SlotAttentionProblem& p, const Layout& layout, Shelf& shelf) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  const int64_t longest = keys > values ? keys : values;
  BackwardScratch<T> s;
  s.qt = shelf.take<T>(p.width * layout.lanes);
  s.dzt = shelf.take<T>(p.value_width * layout.lanes);
  s.q_rows = shelf.take<T>(layout.lanes * keys);
  s.dz_rows = shelf.take<T>(layout.lanes * values);
  s.eps = shelf.take<T>(layout.lanes);
  s.bias = shelf.take<T>(layout.lanes);
  s.centre = shelf.take<T>(layout.lanes);
  s.weights = shelf.take<T>(tile * layout.lanes);
  s.slopes = shelf.take<T>(tile * layout.lanes);
  s.logit_grads = shelf.take<T>(tile * layout.lanes);
  s.sums = shelf.take<T>(layout.lanes);
  s.row = shelf.take<T>(layout.lanes);
  s.grad_q = shelf.take<T>(layout.lanes * sums_stride<T>(p, p.width));
  s.grad_bias = shelf.take<T>(layout.lanes);
  s.grad_mask = shelf.take<T>(p.groups * tile);
  s.buffer = shelf.take<T>((longest > layout.lanes ? longest : layout.lanes) + tile);
  const bool copies = p.mask || p.row_mean || !native<T>(p.element);
  s.keys = shelf.take<T>(copies ? tile * keys : 0);
  s.values = shelf.take<T>(copies && p.v ? tile * values : 0);
  s.grad_keys = shelf.take<T>(copies ? tile * keys : 0);
  s.grad_values = shelf.take<T>(copies && p.v ? tile * values : 0);
  take_live(p, layout, shelf, s.live);
#ifdef OBJSLOT_TILES
  if (tiles_serve(p))
    with_precision(p.element, [&](auto precision) {
      constexpr Precision P = precision();
      constexpr int64_t size = slot_parts<P> * block_words;
      const int64_t lanes = blocks_of(layout.lanes), lane_depth = depth_of(layout.lanes);
      const int64_t longer = p.width > p.value_width ? p.width : p.value_width;
      s.packed_q = shelf.take<uint32_t>(lanes * depth_of(p.width) * size);
      s.packed_dz = shelf.take<uint32_t>(lanes * depth_of(p.value_width) * size);
      s.packed_q_rows = shelf.take<uint32_t>(lane_depth * blocks_of(p.width) * size);
      s.packed_dz_rows = shelf.take<uint32_t>(lane_depth * blocks_of(p.value_width) * size);
      s.weight_words = shelf.take<uint32_t>(lane_depth * blocks_of(tile) * size);
      s.slope_words = shelf.take<uint32_t>(lane_depth * blocks_of(tile) * size);
      s.packed_slopes = shelf.take<uint32_t>(lanes * tile_depth * size);
      s.words = shelf.take<uint32_t>(words_of<P>(layout.lanes, longer));
      s.product = shelf.take<T>(tile * 2 * block);
    });
#endif
  return s;
}

// What does not depend on the position: q, the upper gradient over the mass, and the slope's centre
// <grad_updates, updates> / mass.
template <class T>
static void prepare(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                    BackwardScratch<T>& s, int64_t batch) {
  const int64_t keys = padded<T>(p.width), values = padded<T>(p.value_width);
  lane_constants<T>(p, layout, batch, s.buffer, s.eps, s.bias);
  // What no slot writes to.
  if (layout.groups * layout.slots < layout.lanes || keys > p.width) clear(s.q_rows, layout.lanes * keys);
  if (layout.groups * layout.slots < layout.lanes || values > p.value_width || !r.grad_updates)
    clear(s.dz_rows, layout.lanes * values);
  clear(s.centre, layout.lanes);
  clear(s.grad_q, layout.lanes * sums_stride<T>(p, p.width));
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
      for (int64_t d = 0; d < p.value_width; ++d) dz[d] = grad[d] * inverse;
    }
}

// q, where logits are to be made, and the upper gradient by lane, for products without tiles.
template <class T>
static void pack_lanes(const SlotAttentionProblem& p, const Layout& layout, BackwardScratch<T>& s, int64_t batch,
                       bool logits) {
  if (logits)
    pack_transposed<T>(p.q, p.element, batch * p.q_stride, layout, p.width, T(p.scale * 1.44269504088896340736), s.qt);
  const int64_t values = padded<T>(p.value_width);
  pack_panels<T>(
      s.dz_rows, Element::float32, layout.lanes, p.value_width, T(1), [&](int64_t lane) { return lane * values; },
      s.dzt);
}

// The gradient of the logits by live position and lane, zero in padding.
template <class T>
static void read_logit_grads(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const Layout& layout,
                             const BackwardScratch<T>& s, int64_t batch, int64_t begin, int64_t count) {
  clear(s.logit_grads, s.live.count * layout.lanes);
  for (int64_t g = 0; g < p.groups; ++g)
    for (int64_t i = 0; i < p.slots; ++i) {
      const T* row = read_row<T>(r.grad_logits, p.element, ((batch * p.groups + g) * p.slots + i) * p.positions + begin,
                                 count, s.buffer);
      T* column = s.logit_grads + g * layout.step + i;
      for (int64_t j = 0; j < s.live.count; ++j) column[j * layout.lanes] = row[s.live.at(j)];
    }
}

// weights: logits, or the tile's kept probabilities in their place, to masked weights with eps. slopes: gradient of the
// weights to gradient of the logits.
template <class T, int Step>
OBJSLOT_INLINE void back_through_softmax(const SlotAttentionGradient& r, const Layout& layout,
                                         const BackwardScratch<T>& s, const T* probabilities) {
  for (int64_t j = 0; j < s.live.count; ++j) {
    T* row = s.weights + j * layout.lanes;
    T* slope = s.slopes + j * layout.lanes;
    const T* mask = s.live.lanes ? s.live.lanes + j * layout.lanes : nullptr;
    if (probabilities)
      copy_lanes(probabilities + s.live.at(j) * layout.lanes, layout, row);
    else
      softmax_lanes<T, Step>(row, layout);
    if (mask && r.grad_mask) {
      for (int64_t z = 0; z < layout.lanes; z += width<T>)
        store(s.row + z, load(slope + z) * (load(row + z) + load(s.eps + z)));
      sum_groups<T, Step>(s.row, layout, s.sums);
      const int64_t at = s.live.at(j);
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
  for (int64_t z = 0; z < layout.lanes; z += width<T>) store(s.grad_bias + z, load(s.grad_bias + z) + load(s.sums + z));
}

// Writes rows (live positions, columns) of a sum of products to their places; zeros where nothing is live.
template <class T, int Terms>
static void write_product(const Layout& layout, const Live<T>& live, const Term<T>* terms,
                          const int64_t* features_stride, int64_t columns, void* out, Element element, int64_t offset,
                          int64_t count, T* copy, bool streamed) {
  if (live.all && native<T>(element)) {
    spread<T, Terms>(terms, layout.lanes, layout.rows, features_stride, count, columns, static_cast<T*>(out) + offset,
                     columns, streamed);
    return;
  }
  const int64_t stride = padded<T>(columns);
  spread<T, Terms>(terms, layout.lanes, layout.rows, features_stride, live.count, columns, copy, stride, false);
  if (!live.all) write_zeros<T>(out, element, offset, count * columns);
  for (int64_t j = 0; j < live.count; ++j)
    write_row<T>(copy + j * stride, out, element, offset + live.at(j) * columns, columns);
}

// The gradient of normalised keys, from s.grad_keys: added to what is there, then passed back through the
// normalisation, as asked.
template <class T>
static void write_normalised(const SlotAttentionProblem& p, const SlotAttentionGradient& r, const BackwardScratch<T>& s,
                             const T* keys, int64_t batch, int64_t from, int64_t count) {
  const int64_t stride = padded<T>(p.width), row = batch * p.positions + from;
  const T* inverses = static_cast<const T*>(p.row_inverse) + row;
  T* out = static_cast<T*>(r.grad_k) + row * p.width;
  if (!s.live.all && !r.add_to_k) clear(out, count * p.width);
  for (int64_t j = 0; j < s.live.count; ++j) {
    const int64_t at = s.live.at(j);
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

}  // namespace objslot::OBJSLOT_ISA
