// Queries of one block of label propagation, and which keys each of them keeps.
#pragma once

#include "objslot/propagate.h"
#include "propagate_tiles.h"
#include "slot_tile.h"

namespace objslot::OBJSLOT_ISA {

constexpr int64_t high = 8, wide = 16, lanes = high * wide, piece_keys = 64;
// Queries that are compared together: as many as one block of a product takes. Their features lie side by side, and
// so stay in a first-level cache while the keys of a piece pass by.
template <class T>
constexpr int64_t panel = (registers == 32 ? 4 : 2) * width<T>;
static_assert(lanes % panel<float> == 0 && lanes % panel<double> == 0);

template <class T>
struct PropagateScratch {
  T* packed;  // (panels, features, lanes of a panel): the queries
  T *zeros, *cosines, *threshold, *keys, *buffer;
  // What each query keeps, best first.
  T* best;
  int64_t *place, *count;
  T* mixed;
  // Where tiles are used: the queries' and a piece's, as bfloat16.
  uint16_t *query_tiles, *key_tiles;

  OBJSLOT_INLINE_MEMBER T* queries(int64_t features, int64_t lane) const {
    return packed + lane / panel<T> * panel<T> * features + lane % panel<T>;
  }
};

template <class T>
static PropagateScratch<T> propagate_scratch(const PropagateProblem& p, Shelf& shelf) {
  PropagateScratch<T> s;
  const int64_t width = padded<T>(p.features);
  s.packed = shelf.take<T>(p.features * lanes);
  s.zeros = shelf.take<T>(panel<T>);
  s.cosines = shelf.take<T>(piece_keys * lanes);
  s.threshold = shelf.take<T>(lanes);
  s.keys = shelf.take<T>(native<T>(p.element) ? 0 : piece_keys * width);
  s.buffer = shelf.take<T>(width > p.classes ? width : padded<T>(p.classes));
  s.best = shelf.take<T>(lanes * padded<T>(p.topk));
  s.place = shelf.take<int64_t>(lanes * p.topk);
  s.count = shelf.take<int64_t>(lanes);
  s.mixed = shelf.take<T>(padded<T>(p.classes));
#ifdef OBJSLOT_TILES
  if (p.tiles) {
    s.query_tiles = shelf.take<uint16_t>(operand_size(lanes, p.features, 1));
    s.key_tiles = shelf.take<uint16_t>(operand_size(piece_keys, p.features, 1));
  }
#endif
  return s;
}

OBJSLOT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
OBJSLOT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The largest x with x * x + offset * offset < radius * radius, or -1.
OBJSLOT_INLINE int64_t reach(int64_t radius, int64_t offset) {
  const int64_t rest = radius * radius - offset * offset;
  if (rest <= 0) return -1;
  int64_t x = static_cast<int64_t>(__builtin_sqrt(static_cast<double>(rest)));
  while (x * x >= rest) --x;
  while ((x + 1) * (x + 1) < rest) ++x;
  return x;
}

template <class T>
static T inverse_length(const T* row, int64_t count) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < count; ++d) total += row[d] * row[d];
  const T length = __builtin_sqrt(total), shortest = T(1e-12);
  return T(1) / (length <= shortest ? shortest : length);
}

template <class T>
OBJSLOT_INLINE bool any_above(const T* cosines, const T* threshold) {
  bool found = false;
  for (int64_t z = 0; z < panel<T>; z += width<T>) {
    // Written so that NaN counts as above.
    const auto above = ~(load(cosines + z) <= load(threshold + z));
#if defined(__AVX512F__)
    found |= _mm512_test_epi32_mask((__m512i)above, (__m512i)above) != 0;
#elif defined(__AVX2__)
    found |= !_mm256_testz_si256((__m256i)above, (__m256i)above);
#elif defined(__SSE2__)
    found |= _mm_movemask_epi8((__m128i)above) != 0;
#else
    for (int lane = 0; lane < width<T>; ++lane) found |= above[lane] != 0;
#endif
  }
  return found;
}

struct Block {
  int64_t batch, top, left, rows, columns;
};

template <class T>
static void keep(const PropagateProblem& p, PropagateScratch<T>& s, int64_t lane, T cosine, int64_t place) {
  T* best = s.best + lane * padded<T>(p.topk);
  int64_t* places = s.place + lane * p.topk;
  int64_t at = s.count[lane] < p.topk ? s.count[lane]++ : p.topk - 1;
  for (; at > 0 && best[at - 1] < cosine; --at) {
    best[at] = best[at - 1];
    places[at] = places[at - 1];
  }
  best[at] = cosine;
  places[at] = place;
  if (s.count[lane] == p.topk) s.threshold[lane] = best[p.topk - 1];
}

// Keys [x, x + count) of row y of a frame.
struct Piece {
  int64_t frame, y, x, count;
  bool anywhere;
};

// Takes the cosines of one key with `number` queries from `lane` on for what they are: kept, too small, or too far.
template <class T>
OBJSLOT_INLINE void look_at(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, const Piece& piece,
                            int64_t j, const T* cosines, int64_t first, int64_t number) {
  const int64_t place = (piece.frame * p.height + piece.y) * p.width + piece.x + j;
  for (int64_t lane = first; lane < first + number; ++lane) {
    const T cosine = cosines[lane - first];
    if (cosine <= s.threshold[lane]) continue;
    const int64_t i = lane / wide, k = lane % wide;
    if (i >= block.rows || k >= block.columns) continue;
    const int64_t dy = piece.y - block.top - i, dx = piece.x + j - block.left - k;
    if (!piece.anywhere && dy * dy + dx * dx >= p.radius * p.radius) continue;
    if (cosine == cosine) {
      keep<T>(p, s, lane, cosine, place);
    } else {
      // NaN: nothing compares with it any more, and the result is NaN.
      s.count[lane] = -1;
      s.threshold[lane] = std::numeric_limits<T>::infinity();
    }
  }
}

}  // namespace objslot::OBJSLOT_ISA
