// The thin matrix products of slot attention that sum over features or over the positions of a tile.
#pragma once

#include <type_traits>

#include "half_types.h"
#include "vector_functions.h"

namespace objslot::OBJSLOT_ISA {

#if defined(__AVX512F__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

// Memory that will be read soon, fetched bit by bit while products run: the next rows lie in a cache further out.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  template <int lines = 2>
  OBJSLOT_INLINE_MEMBER void fetch() {
    if (at >= end) return;
#pragma GCC unroll 8
    for (int k = 0; k < lines; ++k) __builtin_prefetch(at + 64 * k, 0, 2);
    at += 64 * lines;
  }
};

// The same at an even pace, so that as many calls as are expected reach the end: more at a time would keep the rows
// that are needed now waiting.
class Pace {
 public:
  // `valid`: any memory, for when there is nothing to be fetched.
  OBJSLOT_INLINE_MEMBER Pace(const Ahead& ahead, int64_t calls, const void* valid) {
    const bool any = ahead.end - ahead.at > bytes;
    at_ = any ? ahead.at : static_cast<const char*>(valid);
    last_ = any ? ahead.end - bytes : at_;
    step_ = (last_ - at_) / (calls > 0 ? calls : 1) + 1;
    if (step_ > bytes) step_ = bytes;
  }
  OBJSLOT_INLINE_MEMBER void fetch() {
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + 64, 0, 2);
    at_ += step_;
    at_ = at_ < last_ ? at_ : last_;
  }

 private:
  static constexpr int64_t bytes = 128;
  const char *at_, *last_;
  int64_t step_;
};

// Panels of the right factor of dots: (terms, lanes of the panel), one after the other.
constexpr int dot_vectors = registers == 32 ? 4 : 2;

// Lanes of a panel. A row of 32 registers is read in pieces of whole lines; elsewhere a panel is one piece of memory,
// so that its lines do not fall into few sets of the first cache.
template <class T>
OBJSLOT_INLINE int64_t panel_lanes(int64_t lanes) {
  return registers == 32 ? lanes : dot_vectors * width<T>;
}

// Terms that are multiplied at once: a panel of them stays in the first cache while rows go by.
constexpr int64_t most_terms = registers == 32 ? std::numeric_limits<int64_t>::max() : 192;

// Terms for which something is fetched ahead.
constexpr int fetch_terms = 4;

// out[j][0, KV vectors) = sum over the terms i of x[j][i] * panel[i][...], + start[j], for so many rows j.
template <class T, int KV, int Rows>
OBJSLOT_INLINE void dot_block(const T* x, int64_t stride, int64_t terms, const T* panel, int64_t step, const T* start,
                              int64_t start_stride, T* out, int64_t lanes, Pace& pace) {
  constexpr int bases = (Rows + 3) / 4;
  Vec<T> total[Rows][KV] = {};
  const T* base[bases];
#pragma GCC unroll 4
  for (int r = 0; r < bases; ++r) base[r] = x + 4 * r * stride;
  const int64_t stride3 = 3 * stride;
  const auto add_term = [&]() __attribute__((always_inline)) {
    Vec<T> value[KV];
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z) value[z] = load(panel + z * width<T>);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> factor = broadcast(base[r / 4][r % 4 == 3 ? stride3 : r % 4 * stride]);
#pragma GCC unroll 4
      for (int z = 0; z < KV; ++z) total[r][z] = fused(factor, value[z], total[r][z]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < bases; ++r) ++base[r];
    panel += step;
  };
  int64_t i = 0;
  for (; i + fetch_terms <= terms; i += fetch_terms) {
    pace.fetch();
#pragma GCC unroll 4
    for (int k = 0; k < fetch_terms; ++k) add_term();
  }
  for (; i < terms; ++i) add_term();
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int z = 0; z < KV; ++z)
      store(out + r * lanes + z * width<T>, total[r][z] + load(start + r * start_stride + z * width<T>));
}

// Rows of a block of so many vectors.
constexpr int rows_of_dots(int vectors) {
  if (vectors == 1) return 12;
  if (registers == 16) return 6;
  return vectors == 4 ? 4 : 8;
}

template <class T, int KV>
static void dot_panel(const T* x, int64_t stride, int64_t rows, int64_t terms, const T* panel, int64_t step,
                      const T* start, int64_t start_stride, T* out, int64_t lanes, Pace& pace) {
  constexpr int R = rows_of_dots(KV);
  int64_t j = 0;
  const auto block = [&](auto count) __attribute__((always_inline)) {
    for (; j + count() <= rows; j += count())
      dot_block<T, KV, count()>(x + j * stride, stride, terms, panel, step, start + j * start_stride, start_stride,
                                out + j * lanes, lanes, pace);
  };
  block(std::integral_constant<int, R>());
  if constexpr (R > 4) block(std::integral_constant<int, 4>());
  block(std::integral_constant<int, 2>());
  block(std::integral_constant<int, 1>());
}

// out (rows, lanes) = x (rows, d) packed (d, lanes) + bias (lanes)
template <class T>
OBJSLOT_INLINE void dots(const T* x, int64_t stride, int64_t rows, int64_t d, const T* packed, const T* bias,
                         int64_t lanes, T* out, const Ahead& ahead = {}) {
  const int64_t most = panel_lanes<T>(lanes), parts = d <= most_terms ? 1 : (d + most_terms - 1) / most_terms;
  const int64_t vectors = lanes / width<T>, panels = (vectors + dot_vectors - 1) / dot_vectors;
  const int64_t blocks = rows / rows_of_dots(vectors < dot_vectors ? static_cast<int>(vectors) : dot_vectors);
  Pace pace(ahead, panels * blocks * (d / fetch_terms), packed);
  for (int64_t begin = 0; begin < lanes; begin += most) {
    const int64_t in_panel = lanes - begin < most ? lanes - begin : most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = d * part / parts, terms = d * (part + 1) / parts - from;
      for (int64_t z = 0; z < in_panel; z += dot_vectors * width<T>) {
        const int64_t left = (in_panel - z) / width<T>;
        const auto panel = [&](auto count) __attribute__((always_inline)) {
          const T* const start = part ? out + begin + z : bias + begin + z;
          dot_panel<T, count()>(x + from, stride, rows, terms, packed + begin * d + from * in_panel + z, in_panel,
                                start, part ? lanes : 0, out + begin + z, lanes, pace);
        };
        if (left == 1) panel(std::integral_constant<int, 1>());
        if constexpr (dot_vectors == 2) {
          if (left >= 2) panel(std::integral_constant<int, 2>());
        } else {
          if (left == 2) panel(std::integral_constant<int, 2>());
          if (left == 3) panel(std::integral_constant<int, 3>());
          if (left >= 4) panel(std::integral_constant<int, 4>());
        }
      }
    }
  }
}

// sums[r][C vectors] += sum over the rows j of weights[j][r] * v[j][...]; Part: only the first `part` lanes.
template <class T, int R, int C, bool Part>
OBJSLOT_INLINE void gather_block(const T* weights, int64_t lanes, int64_t rows, const T* v, int64_t stride,
                                 int64_t part, T* sums, int64_t sums_stride, Pace& pace) {
  Vec<T> total[R][C] = {};
  for (int64_t j = 0; j < rows; ++j) {
    pace.fetch();
    Vec<T> value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      value[c] = Part ? load_first(v + j * stride + c * width<T>, part) : load(v + j * stride + c * width<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = broadcast(weights[j * lanes + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = fused(weight, value[c], total[r][c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* sum = sums + r * sums_stride + c * width<T>;
      if constexpr (Part)
        store_first(sum, load_first(sum, part) + total[r][c], part);
      else
        store(sum, load(sum) + total[r][c]);
    }
}

// The same for `count` slots, Most of them at most.
template <class T, int Most, int C, bool Part>
static void gather_slots(int64_t count, const T* weights, int64_t lanes, int64_t rows, const T* v, int64_t stride,
                         int64_t part, T* sums, int64_t sums_stride, Pace& pace) {
  if constexpr (Most > 1)
    if (count < Most)
      return gather_slots<T, Most - 1, C, Part>(count, weights, lanes, rows, v, stride, part, sums, sums_stride, pace);
  gather_block<T, Most, C, Part>(weights, lanes, rows, v, stride, part, sums, sums_stride, pace);
}

// Slots of a block of so many vectors; into how many blocks slots are divided.
template <int C>
constexpr int slots_of_gather = registers == 32 ? (C == 3 ? 8 : 12) : (C == 2 ? 6 : 8);
template <int C>
OBJSLOT_INLINE int64_t blocks_of_slots(int64_t slots) {
  return (slots + slots_of_gather<C> - 1) / slots_of_gather<C>;
}

template <class T, int C, bool Part>
static void gather_columns(const T* weights, int64_t lanes, int64_t slots, int64_t rows, const T* v, int64_t stride,
                           int64_t part, T* sums, int64_t sums_stride, Pace& pace) {
  const int64_t blocks = blocks_of_slots<C>(slots);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = slots * block / blocks, count = slots * (block + 1) / blocks - begin;
    gather_slots<T, slots_of_gather<C>, C, Part>(count, weights + begin, lanes, rows, v, stride, part,
                                                 sums + begin * sums_stride, sums_stride, pace);
  }
}

// sums (slots, columns) += weights (rows, slots)^T v (rows, columns)
template <class T>
OBJSLOT_INLINE void gather(const T* weights, int64_t lanes, int64_t slots, int64_t rows, const T* v, int64_t stride,
                           int64_t columns, T* sums, int64_t sums_stride, const Ahead& ahead) {
  constexpr int C = registers == 32 ? 3 : 2;
  Pace pace(ahead, columns / (C * width<T>)*blocks_of_slots<C>(slots) * rows, v);
  int64_t d = 0;
  for (; d + C * width<T> <= columns; d += C * width<T>)
    gather_columns<T, C, false>(weights, lanes, slots, rows, v + d, stride, 0, sums + d, sums_stride, pace);
  for (; d + width<T> <= columns; d += width<T>)
    gather_columns<T, 1, false>(weights, lanes, slots, rows, v + d, stride, 0, sums + d, sums_stride, pace);
  if (d < columns)
    gather_columns<T, 1, true>(weights, lanes, slots, rows, v + d, stride, columns - d, sums + d, sums_stride, pace);
}

}  // namespace objslot::OBJSLOT_ISA
