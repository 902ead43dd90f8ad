// Label propagation for blocks of 8 x 8 query positions: the cosines to one piece of a row of keys at a time, of
// which only those above the smallest kept one are looked at again.
#include "objslot/propagate.h"

#include "objslot/threads.h"
#include "slot_tile.h"

namespace objslot::OBJSLOT_ISA {

constexpr int64_t side = 8, lanes = side * side, piece = 64;

template <class T>
struct PropagateScratch {
  T *packed, *zeros, *cosines, *threshold, *keys, *buffer;
  // What each query keeps, best first.
  T* best;
  int64_t *place, *count;
  T* mixed;
};

template <class T>
static PropagateScratch<T> propagate_scratch(const PropagateProblem& p, Shelf& shelf) {
  PropagateScratch<T> s;
  const int64_t width = padded<T>(p.features);
  s.packed = shelf.take<T>(p.features * lanes);
  s.zeros = shelf.take<T>(lanes);
  s.cosines = shelf.take<T>(piece * lanes);
  s.threshold = shelf.take<T>(lanes);
  s.keys = shelf.take<T>(native<T>(p.element) ? 0 : piece * width);
  s.buffer = shelf.take<T>(width > p.classes ? width : padded<T>(p.classes));
  s.best = shelf.take<T>(lanes * padded<T>(p.topk));
  s.place = shelf.take<int64_t>(lanes * p.topk);
  s.count = shelf.take<int64_t>(lanes);
  s.mixed = shelf.take<T>(padded<T>(p.classes));
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
  for (int64_t z = 0; z < lanes; z += width<T>) {
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

// Compares keys [x, x + count) of row y of a frame with every query of the block.
template <class T>
static void compare_piece(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, const T* lengths,
                          int64_t frame, int64_t y, int64_t x, int64_t count, bool anywhere) {
  const int64_t positions = p.height * p.width, place = (frame * p.height + y) * p.width + x;
  const int64_t first = (block.batch * p.frames * positions + place) * p.features;
  const T* rows = static_cast<const T*>(p.keys) + first;
  int64_t stride = p.features;
  if (!native<T>(p.element)) {
    stride = padded<T>(p.features);
    for (int64_t j = 0; j < count; ++j)
      read_row<T>(p.keys, p.element, first + j * p.features, p.features, s.keys + j * stride);
    rows = s.keys;
  }
  dots<T>(rows, stride, count, p.features, s.packed, s.zeros, lanes, s.cosines);
  for (int64_t j = 0; j < count; ++j) {
    T* row = s.cosines + j * lanes;
    for (int64_t z = 0; z < lanes; z += width<T>) store(row + z, load(row + z) * lengths[place + j]);
    if (!any_above<T>(row, s.threshold)) continue;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (row[lane] <= s.threshold[lane]) continue;
      const int64_t i = lane / side, k = lane % side;
      if (i >= block.rows || k >= block.columns) continue;
      const int64_t dy = y - block.top - i, dx = x + j - block.left - k;
      if (!anywhere && dy * dy + dx * dx >= p.radius * p.radius) continue;
      if (row[lane] == row[lane]) {
        keep<T>(p, s, lane, row[lane], place + j);
      } else {
        // NaN: nothing compares with it any more, and the result is NaN.
        s.count[lane] = -1;
        s.threshold[lane] = std::numeric_limits<T>::infinity();
      }
    }
  }
}

template <class T>
static void write_labels(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, void* out) {
  const int64_t positions = p.height * p.width;
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t k = 0; k < block.columns; ++k) {
      const int64_t lane = i * side + k, count = s.count[lane];
      const int64_t query = block.batch * positions + (block.top + i) * p.width + block.left + k;
      const T nothing = count < 0 ? std::numeric_limits<T>::quiet_NaN() : T(0);
      for (int64_t c = 0; c < p.classes; ++c) s.mixed[c] = nothing;
      T* weight = s.best + lane * padded<T>(p.topk);
      const T top = weight[0], factor = T(1.44269504088896340736 / p.temperature);
      T total = T(0);
      for (int64_t n = 0; n < count; n += width<T>) store(weight + n, exp2<T>((load(weight + n) - top) * factor));
      for (int64_t n = 0; n < count; ++n) total += weight[n];
      for (int64_t n = 0; n < count; ++n) {
        const int64_t from = block.batch * p.frames * positions + s.place[lane * p.topk + n];
        const T* row = read_row<T>(p.labels, p.label_element, from * p.classes, p.classes, s.buffer);
        const T share = weight[n] / total;
        for (int64_t c = 0; c < p.classes; ++c) s.mixed[c] += share * row[c];
      }
      write_row<T>(s.mixed, out, p.label_element, query * p.classes, p.classes);
    }
}

template <class T>
static void propagate_block(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, const T* lengths,
                            void* out) {
  const int64_t positions = p.height * p.width;
  clear(s.packed, p.features * lanes);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t i = lane / side, k = lane % side;
    const bool active = i < block.rows && k < block.columns;
    s.count[lane] = 0;
    s.threshold[lane] = active ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
    if (!active) continue;
    const int64_t query = block.batch * positions + (block.top + i) * p.width + block.left + k;
    const T* row = read_row<T>(p.query, p.element, query * p.features, p.features, s.buffer);
    const T inverse = inverse_length<T>(row, p.features);
    for (int64_t d = 0; d < p.features; ++d) s.packed[d * lanes + lane] = row[d] * inverse;
  }
  const int64_t bottom = block.top + block.rows - 1, right = block.left + block.columns - 1;
  for (int64_t frame = 0; frame < p.frames; ++frame) {
    const bool anywhere = frame < p.n_global;
    for (int64_t y = 0; y < p.height; ++y) {
      const int64_t offset = y < block.top ? block.top - y : y > bottom ? y - bottom : 0;
      const int64_t half = anywhere ? p.width : reach(p.radius, offset);
      if (half < 0) continue;
      const int64_t begin = most(0, block.left - half), end = least(p.width, right + half + 1);
      for (int64_t x = begin; x < end; x += piece)
        compare_piece<T>(p, s, block, lengths, frame, y, x, least(piece, end - x), anywhere);
    }
  }
  write_labels<T>(p, s, block, out);
}

template <class T>
static int64_t workspace_size(const PropagateProblem& p, int threads, int64_t* scratch) {
  Shelf shelf{nullptr};
  propagate_scratch<T>(p, shelf);
  *scratch = shelf.used;
  return threads * shelf.used + p.batch * p.frames * p.height * p.width * static_cast<int64_t>(sizeof(T));
}

template <class T>
static void run_propagate(const PropagateProblem& p, void* out, void* workspace, int threads) {
  int64_t scratch;
  workspace_size<T>(p, threads, &scratch);
  char* base = static_cast<char*>(workspace);
  T* lengths = reinterpret_cast<T*>(base + threads * scratch);
  const int64_t context = p.frames * p.height * p.width;
  parallel_for(p.batch * context, threads, [&](int64_t first, int64_t last, int worker) {
    Shelf shelf{base + worker * scratch};
    PropagateScratch<T> s = propagate_scratch<T>(p, shelf);
    for (int64_t row = first; row < last; ++row)
      lengths[row] =
          inverse_length<T>(read_row<T>(p.keys, p.element, row * p.features, p.features, s.buffer), p.features);
  });
  const int64_t down = (p.height + side - 1) / side, across = (p.width + side - 1) / side;
  parallel_for(p.batch * down * across, threads, [&](int64_t first, int64_t last, int worker) {
    Shelf shelf{base + worker * scratch};
    PropagateScratch<T> s = propagate_scratch<T>(p, shelf);
    clear(s.zeros, lanes);
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / (down * across), top = item / across % down * side, left = item % across * side;
      const Block block{batch, top, left, least(side, p.height - top), least(side, p.width - left)};
      propagate_block<T>(p, s, block, lengths + batch * context, out);
    }
  });
}

static int64_t workspace(const PropagateProblem& p, int threads) {
  int64_t scratch;
  return p.element == Element::float64 ? workspace_size<double>(p, threads, &scratch)
                                       : workspace_size<float>(p, threads, &scratch);
}

static void run(const PropagateProblem& p, void* out, void* workspace, int threads) {
  if (p.element == Element::float64)
    run_propagate<double>(p, out, workspace, threads);
  else
    run_propagate<float>(p, out, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(PropagateKernels, workspace, run)
