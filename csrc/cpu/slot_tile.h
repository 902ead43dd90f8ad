// What the forward and the backward kernel of slot attention share: how slots lie in lanes, tiles of positions,
// and the softmax over the slots of a group.
#pragma once

#include <type_traits>
#include <utility>

#include "objslot/slot_attention.h"
#include "objslot/threads.h"
#include "slot_lanes.h"

namespace objslot::OBJSLOT_ISA {

constexpr int64_t tile = 64;
// Positions that one thread handles in a row. Shares depend on the shape alone, and are added in order: the result
// does not depend on the number of threads.
constexpr int64_t share = 512;

OBJSLOT_INLINE int64_t shares_of(int64_t positions) {
  const int64_t count = (positions + share / 2) / share;
  return count < 1 ? 1 : count;
}
OBJSLOT_INLINE int64_t share_begin(int64_t positions, int64_t shares, int64_t index) {
  const int64_t tiles = (positions + tile - 1) / tile;
  const int64_t begin = tiles * index / shares * tile;
  return begin < positions ? begin : positions;
}

// Groups start at multiples of `step` lanes: a power of two, or whole vectors. Lanes between them are padding,
// with logits of minus infinity and weights of zero.
struct Layout {
  int64_t groups, slots, step, lanes, rows;
};
template <class T>
OBJSLOT_INLINE Layout layout_of(int64_t groups, int64_t slots) {
  int64_t step = 1;
  while (step < slots && step < width<T>) step *= 2;
  if (step < slots) step = padded<T>(slots);
  return {groups, slots, step, padded<T>(groups * step), (groups - 1) * step + slots};
}

// Hands out parts of the workspace; from a null base it only counts.
struct Shelf {
  char* base;
  int64_t used = 0;
  template <class U>
  OBJSLOT_INLINE_MEMBER U* take(int64_t count) {
    char* part = base ? base + used : nullptr;
    used += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return reinterpret_cast<U*>(part);
  }
};

template <class T>
OBJSLOT_INLINE void clear(T* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
OBJSLOT_INLINE bool native(Element element) {
  return sizeof(T) == 8 || element == Element::float32;
}

template <class T>
OBJSLOT_INLINE void write_row(const T* row, void* base, Element element, int64_t offset, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (element != Element::float32) return write_half_row(row, base, element, offset, count);
  }
  __builtin_memcpy(static_cast<T*>(base) + offset, row, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
OBJSLOT_INLINE void write_zeros(void* base, Element element, int64_t offset, int64_t count) {
  const int64_t size = native<T>(element) ? sizeof(T) : 2;
  __builtin_memset(static_cast<char*>(base) + offset * size, 0, static_cast<size_t>(count * size));
}

// packed (count, lanes) in panels = factor * rows (groups * slots, count), turned; zero in padding lanes.
template <class T>
static void pack_transposed(const void* rows, Element element, int64_t offset, const Layout& layout, int64_t count,
                            T factor, T* packed) {
  pack_panels<T>(
      rows, element, layout.lanes, count, factor,
      [&](int64_t lane) {
        const int64_t g = lane / layout.step, i = lane % layout.step;
        return g < layout.groups && i < layout.slots ? offset + (g * layout.slots + i) * count : -1;
      },
      packed);
}

// The positions of a tile that some group reads, and what it weights them with.
template <class T>
struct Live {
  int32_t* index;  // (tile)
  int64_t count;
  bool all;
  T* mask;   // (groups, tile), by position
  T* lanes;  // (tile, lanes), by live position; unused without a mask
  // The position of the j-th one in the tile.
  OBJSLOT_INLINE_MEMBER int64_t at(int64_t j) const { return all ? j : index[j]; }
};

// The live rows of a tile in the arithmetic type: the memory itself where it will do, otherwise a copy.
template <class T>
static const T* live_rows(const void* base, Element element, int64_t offset, int64_t row_stride, int64_t columns,
                          const Live<T>& live, T* copy, int64_t* stride) {
  if (live.all && native<T>(element)) {
    *stride = row_stride;
    return static_cast<const T*>(base) + offset;
  }
  *stride = padded<T>(columns);
  for (int64_t j = 0; j < live.count; ++j) {
    T* target = copy + j * *stride;
    const int64_t at = live.at(j);
    const T* row = read_row<T>(base, element, offset + at * row_stride, columns, target);
    if (row != target) __builtin_memcpy(target, row, static_cast<size_t>(columns) * sizeof(T));
  }
  return copy;
}

// The rows [from, end) of keys or values at most, to be fetched ahead; nothing where they are not one piece of memory
// in the arithmetic type.
template <class T>
OBJSLOT_INLINE Ahead ahead_of(const void* base, Element element, int64_t offset, int64_t row_stride, int64_t columns,
                              int64_t from, int64_t end) {
  if (!base || !native<T>(element) || row_stride != columns || from >= end) return {};
  const T* begin = static_cast<const T*>(base) + offset + from * row_stride;
  const int64_t count = end - from < tile ? end - from : tile;
  return {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(begin + count * row_stride)};
}

// The live rows of the keys, normalised where the problem says so.
template <class T>
static const T* live_keys(const SlotAttentionProblem& p, int64_t batch, int64_t from, const Live<T>& live, T* copy,
                          int64_t* stride) {
  if (!p.row_mean)
    return live_rows<T>(p.k, p.element, batch * p.k_stride + from * p.k_row_stride, p.k_row_stride, p.width, live, copy,
                        stride);
  const T* means = static_cast<const T*>(p.row_mean) + batch * p.positions + from;
  const T* inverses = static_cast<const T*>(p.row_inverse) + batch * p.positions + from;
  *stride = padded<T>(p.width);
  for (int64_t j = 0; j < live.count; ++j) {
    const int64_t at = live.at(j);
    T* target = copy + j * *stride;
    const T* row = read_row<T>(p.k, p.element, batch * p.k_stride + (from + at) * p.k_row_stride, p.width, target);
    const Vec<T> mean = broadcast(means[at]), inverse = broadcast(inverses[at]);
    int64_t d = 0;
    for (; d + width<T> <= p.width; d += width<T>) store(target + d, (load(row + d) - mean) * inverse);
    if (d < p.width) store(target + d, (load_first(row + d, p.width - d) - mean) * inverse);
  }
  return copy;
}

// ---- softmax over the lanes of a group ----

template <class T, int S, int... lane>
OBJSLOT_INLINE Vec<T> exchanged(Vec<T> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ S)...);
}
// Every lane gets the result of its segment of `Step` lanes.
template <class T, int Step, bool Largest, int S = 1>
OBJSLOT_INLINE Vec<T> reduce_segments(Vec<T> v) {
  if constexpr (S < Step) {
    const Vec<T> other = exchanged<T, S>(v, std::make_integer_sequence<int, width<T>>());
    return reduce_segments<T, Step, Largest, 2 * S>(Largest ? larger(v, other) : v + other);
  } else {
    return v;
  }
}

// One over a sum of powers, to about a unit in the last place: a division takes as long as the power.
template <class T>
OBJSLOT_INLINE Vec<T> inverse_of(Vec<T> sum) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> first = (Vec<T>)_mm512_rcp14_ps((__m512)sum);
    return fused(first, fused(-first, sum, broadcast(T(1))), first);
  }
#endif
  return T(1) / sum;
}

// Turns the logits of a position, in units of log2, into probabilities. Step 0: groups of several vectors.
template <class T, int Step>
OBJSLOT_INLINE void softmax_lanes(T* row, const Layout& layout) {
  if constexpr (Step > 0) {
    for (int64_t z = 0; z < layout.lanes; z += width<T>) {
      const Vec<T> logit = load(row + z);
      const Vec<T> power = exp2<T>(logit - reduce_segments<T, Step, true>(logit));
      store(row + z, power * inverse_of<T>(reduce_segments<T, Step, false>(power)));
    }
  } else {
    for (int64_t begin = 0; begin < layout.lanes; begin += layout.step) {
      Vec<T> top = load(row + begin);
      for (int64_t z = width<T>; z < layout.step; z += width<T>) top = larger(load(row + begin + z), top);
      top = reduce_segments<T, width<T>, true>(top);
      Vec<T> total{};
      for (int64_t z = 0; z < layout.step; z += width<T>) {
        const Vec<T> power = exp2<T>(load(row + begin + z) - top);
        store(row + begin + z, power);
        total += power;
      }
      const Vec<T> inverse = T(1) / reduce_segments<T, width<T>, false>(total);
      for (int64_t z = 0; z < layout.step; z += width<T>) store(row + begin + z, load(row + begin + z) * inverse);
    }
  }
}

// The kept probabilities of the positions from `from` on, null where none are.
template <class T, class Memory>
OBJSLOT_INLINE auto probabilities_of(const SlotAttentionProblem& p, const Layout& layout, Memory* all, int64_t batch,
                                     int64_t from) {
  using Entry = std::conditional_t<std::is_const_v<Memory>, const T, T>;
  return all ? static_cast<Entry*>(all) + (batch * p.positions + from) * layout.lanes : nullptr;
}

template <class T>
OBJSLOT_INLINE void copy_lanes(const T* row, const Layout& layout, T* out) {
  for (int64_t z = 0; z < layout.lanes; z += width<T>) store(out + z, load(row + z));
}

// sums over the lanes of each group, in every lane of the group
template <class T, int Step>
OBJSLOT_INLINE void sum_groups(const T* row, const Layout& layout, T* sums) {
  if constexpr (Step > 0) {
    for (int64_t z = 0; z < layout.lanes; z += width<T>)
      store(sums + z, reduce_segments<T, Step, false>(load(row + z)));
  } else {
    for (int64_t begin = 0; begin < layout.lanes; begin += layout.step) {
      Vec<T> total{};
      for (int64_t z = 0; z < layout.step; z += width<T>) total += load(row + begin + z);
      total = reduce_segments<T, width<T>, false>(total);
      for (int64_t z = 0; z < layout.step; z += width<T>) store(sums + begin + z, total);
    }
  }
}

// Calls body with the step of the layout as a constant.
template <class T, class Body>
OBJSLOT_INLINE void with_step(const Layout& layout, const Body& body) {
  switch (layout.step) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 4:
      if constexpr (width<T> >= 4) return body(std::integral_constant<int, 4>());
      break;
    case 8:
      if constexpr (width<T> >= 8) return body(std::integral_constant<int, 8>());
      break;
    case 16:
      if constexpr (width<T> >= 16) return body(std::integral_constant<int, 16>());
      break;
  }
  body(std::integral_constant<int, 0>());
}

template <class T, int Step, int... lane>
OBJSLOT_INLINE Vec<T> repeated(Vec<T> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane / Step)...);
}
// lanes: the value of every group in all its lanes, zero past the last group. Reads whole vectors of values.
template <class T, int Step>
OBJSLOT_INLINE void spread_groups(T* values, const Layout& layout, T* lanes) {
  if constexpr (Step > 0) {
    for (int64_t g = layout.groups; g < layout.lanes / Step; ++g) values[g] = T(0);
    for (int64_t z = 0; z < layout.lanes; z += width<T>)
      store(lanes + z, repeated<T, Step>(load(values + z / Step), std::make_integer_sequence<int, width<T>>()));
  } else {
    for (int64_t z = 0; z < layout.lanes; z += width<T>) store(lanes + z, broadcast(values[z / layout.step]));
  }
}

// `buffer`: as long as the lanes and a tile.
template <class T>
static void find_live(const SlotAttentionProblem& p, const Layout& layout, int64_t batch, int64_t begin, int64_t count,
                      T* buffer, Live<T>& live) {
  live.count = 0;
  if (!p.mask) {
    live.count = count;
    live.all = true;
    return;
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    const T* row = read_row<T>(p.mask, p.element, batch * p.mask_stride + g * p.positions + begin, count, buffer);
    __builtin_memcpy(live.mask + g * tile, row, static_cast<size_t>(count) * sizeof(T));
  }
  for (int64_t j = 0; j < count; ++j) {
    bool read = false;
    for (int64_t g = 0; g < p.groups; ++g) read |= (buffer[g] = live.mask[g * tile + j]) != T(0);
    if (!read) continue;
    T* lanes = live.lanes + live.count * layout.lanes;
    with_step<T>(layout, [&](auto step) { spread_groups<T, step()>(buffer, layout, lanes); });
    live.index[live.count++] = static_cast<int32_t>(j);
  }
  live.all = live.count == count;
}

// The constants of the lanes: eps, zero in padding; bias in units of log2, minus infinity in padding.
template <class T>
static void lane_constants(const SlotAttentionProblem& p, const Layout& layout, int64_t batch, T* buffer, T* eps,
                           T* bias) {
  for (int64_t lane = 0; lane < layout.lanes; ++lane) {
    eps[lane] = T(0);
    // Past the last group nobody looks, but the numbers stay numbers.
    bias[lane] = lane < layout.groups * layout.step ? -std::numeric_limits<T>::infinity() : T(0);
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    const T* row =
        p.bias ? read_row<T>(p.bias, p.slot_element, batch * p.bias_stride + g * p.slots, p.slots, buffer) : nullptr;
    for (int64_t i = 0; i < p.slots; ++i) {
      eps[g * layout.step + i] = T(p.eps);
      bias[g * layout.step + i] = row ? row[i] * T(1.44269504088896340736) : T(0);
    }
  }
}

template <class T>
OBJSLOT_INLINE T reciprocal_or_zero(T mass) {
  return mass == T(0) ? T(0) : T(1) / mass;
}

}  // namespace objslot::OBJSLOT_ISA
