// What the forward and the backward kernel of slot attention share: tiles of positions and their live rows.
#pragma once

#include <type_traits>

#include "objslot/slot_attention.h"
#include "objslot/threads.h"
#include "slot_groups.h"

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

// The kept probabilities of the positions from `from` on, null where none are.
template <class T, class Memory>
OBJSLOT_INLINE auto probabilities_of(const SlotAttentionProblem& p, const Layout& layout, Memory* all, int64_t batch,
                                     int64_t from) {
  using Entry = std::conditional_t<std::is_const_v<Memory>, const T, T>;
  return all ? static_cast<Entry*>(all) + (batch * p.positions + from) * layout.lanes : nullptr;
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
