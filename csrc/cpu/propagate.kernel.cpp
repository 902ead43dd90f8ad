// Label propagation for blocks of 8 x 16 query positions: the cosines to one piece of a row of keys at a time, of
// which only those above the smallest kept one are looked at again.
#include "objslot/threads.h"
#include "propagate_best.h"

namespace objslot::OBJSLOT_ISA {

#ifdef OBJSLOT_TILES
// The same as below, with exact cosines only where rough ones say that they may be large enough.
static void compare_roughly(const PropagateProblem& p, PropagateScratch<float>& s, const Block& block,
                            const Piece& piece, const float* rows, int64_t stride, const float* lengths) {
  constexpr int at_once = 8;
  round_keys(rows, stride, piece.count, p.features, s.key_tiles);
  multiply_tiles<1, 1>(s.key_tiles, s.query_tiles, whole_tiles(piece.count), lanes, depth_blocks(p.features), s.cosines,
                       lanes);
  for (int64_t lane = 0; lane < lanes; lane += tile_rows) {
    uint8_t found[piece_keys + at_once];
    const int64_t number = candidates<lanes>(s.cosines + lane, lengths, s.threshold + lane, piece.count, found);
    const float* queries = s.queries(p.features, lane);
    alignas(64) float exact[at_once * tile_rows];
    for (int64_t first = 0; first < number; first += at_once) {
      const int64_t left = number - first < at_once ? number - first : at_once;
      if (left > 2) {
        // The last ones are filled up with what is there.
        for (int64_t r = left; r < at_once; ++r) found[first + r] = found[first];
        exact_products<at_once, panel<float>>(rows, stride, found + first, p.features, queries, exact);
      } else {
        for (int64_t r = 0; r < left; ++r)
          exact_products<1, panel<float>>(rows, stride, found + first + r, p.features, queries, exact + r * tile_rows);
      }
      for (int64_t r = 0; r < left; ++r) {
        float* cosines = exact + r * tile_rows;
        const int64_t j = found[first + r];
        for (int64_t z = 0; z < tile_rows; ++z) cosines[z] *= lengths[j];
        look_at<float>(p, s, block, piece, j, cosines, lane, tile_rows);
      }
    }
  }
}
#endif

// Compares the keys of a piece with every query of the block.
template <class T>
static void compare_piece(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, const T* lengths,
                          const Piece& piece) {
  const int64_t positions = p.height * p.width, place = (piece.frame * p.height + piece.y) * p.width + piece.x;
  const int64_t first = (block.batch * p.frames * positions + place) * p.features;
  const T* rows = static_cast<const T*>(p.keys) + first;
  int64_t stride = p.features;
  if (!native<T>(p.element)) {
    stride = padded<T>(p.features);
    for (int64_t j = 0; j < piece.count; ++j)
      read_row<T>(p.keys, p.element, first + j * p.features, p.features, s.keys + j * stride);
    rows = s.keys;
  }
  lengths += place;
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4) {
    if (p.tiles) return compare_roughly(p, s, block, piece, rows, stride, lengths);
  }
#endif
  for (int64_t lane = 0; lane < lanes; lane += panel<T>) {
    dots<T>(rows, stride, piece.count, p.features, s.queries(p.features, lane), s.zeros, panel<T>, s.cosines);
    for (int64_t j = 0; j < piece.count; ++j) {
      T* row = s.cosines + j * panel<T>;
      for (int64_t z = 0; z < panel<T>; z += width<T>) store(row + z, load(row + z) * lengths[j]);
      if (any_above<T>(row, s.threshold + lane)) look_at<T>(p, s, block, piece, j, row, lane, panel<T>);
    }
  }
}

template <class T>
static void write_labels(const PropagateProblem& p, PropagateScratch<T>& s, const Block& block, void* out) {
  const int64_t positions = p.height * p.width;
  for (int64_t i = 0; i < block.rows; ++i)
    for (int64_t k = 0; k < block.columns; ++k) {
      const int64_t lane = i * wide + k, count = s.count[lane];
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
    const int64_t i = lane / wide, k = lane % wide;
    const bool active = i < block.rows && k < block.columns;
    s.count[lane] = 0;
    s.threshold[lane] = active ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
    if (!active) continue;
    const int64_t query = block.batch * positions + (block.top + i) * p.width + block.left + k;
    const T* row = read_row<T>(p.query, p.element, query * p.features, p.features, s.buffer);
    const T inverse = inverse_length<T>(row, p.features);
    T* queries = s.queries(p.features, lane);
    for (int64_t d = 0; d < p.features; ++d) queries[d * panel<T>] = row[d] * inverse;
  }
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4) {
    if (p.tiles)
      for (int64_t lane = 0, words = operand_size(panel<T>, p.features, 1); lane < lanes; lane += panel<T>)
        round_queries<panel<T>>(s.queries(p.features, lane), p.features, s.query_tiles + lane / panel<T> * words);
  }
#endif
  const int64_t bottom = block.top + block.rows - 1, right = block.left + block.columns - 1;
  for (int64_t frame = 0; frame < p.frames; ++frame) {
    const bool anywhere = frame < p.n_global;
    for (int64_t y = 0; y < p.height; ++y) {
      const int64_t offset = y < block.top ? block.top - y : y > bottom ? y - bottom : 0;
      const int64_t half = anywhere ? p.width : reach(p.radius, offset);
      if (half < 0) continue;
      const int64_t begin = most(0, block.left - half), end = least(p.width, right + half + 1);
      for (int64_t x = begin; x < end; x += piece_keys)
        compare_piece<T>(p, s, block, lengths, {frame, y, x, least(piece_keys, end - x), anywhere});
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
  const int64_t down = (p.height + high - 1) / high, across = (p.width + wide - 1) / wide;
  parallel_for(p.batch * down * across, threads, [&](int64_t first, int64_t last, int worker) {
    Shelf shelf{base + worker * scratch};
    PropagateScratch<T> s = propagate_scratch<T>(p, shelf);
    clear(s.zeros, panel<T>);
    for (int64_t item = first; item < last; ++item) {
      const int64_t batch = item / (down * across), top = item / across % down * high, left = item % across * wide;
      const Block block{batch, top, left, least(high, p.height - top), least(wide, p.width - left)};
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
