// The first stage of one element: the scores of its tokens.
#pragma once

#include "token_lengths.h"
#include "transport_stages.h"

namespace objslot::OBJSLOT_ISA {

// Factors of some tokens, and where their units are: in this thread's memory, unless all of them are kept.
template <class T>
static const T* make_units(const TransportProblem& p, const Stage<T>& s, const Tokens<T>& side, int64_t first,
                           int64_t count, const Team& team) {
  const int64_t stride = padded<T>(p.features);
  T* buffer = s.rows + team.worker * s.rows_size;
  T* const units = s.units_size ? s.units + team.worker * s.units_size : side.unit + first * stride;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = token_row(p, side, first + i, buffer);
    T* unit = units + i * stride;
    const T factor = p.cosine ? inverse_length(row, p.features, p.shortest) : T(1);
    side.factor[first + i] = factor;
    for (int64_t k = 0; k < p.features; ++k) unit[k] = row[k] * factor;
    // So small a factor has lost its digits, unless the token counts as zero.
    if (sizeof(T) == 4 && factor < T(1e-30) && factor != 0) {
      const double length = __builtin_sqrt(precise_square(row, p.features));
      for (int64_t k = 0; k < p.features; ++k) unit[k] = static_cast<T>(row[k] / length);
    }
    for (int64_t k = p.features; k < stride; ++k) unit[k] = 0;
  }
  return units;
}

// Calls use(first, rows) for this thread's rows of a result, at most `most` at a time.
template <class Use>
OBJSLOT_INLINE void for_groups(int64_t rows, int64_t most, const Team& team, const Use& use) {
  const int64_t shares = (rows + shared_rows - 1) / shared_rows;
  const int64_t last = team.end(shares) * shared_rows, end = last < rows ? last : rows;
  for (int64_t first = team.begin(shares) * shared_rows; first < end; first += most)
    use(first, end - first < most ? end - first : most);
}

template <class T>
static void scores_on_vectors(const TransportProblem& p, const Stage<T>& s, bool laid, const Team& team) {
  const int64_t features = padded<T>(p.features);
  const auto units = [&](int64_t first, int64_t count) { return make_units(p, s, s.y, first, count, team); };
  if (!laid) lay_panels_across(units, features, p.features, p.m, s.panels, team);
  team.wait();
  for_groups(p.n, block_rows, team, [&](int64_t first, int64_t rows) {
    const T* left = make_units(p, s, s.x, first, rows, team);
    multiply<T>({left, features, 1}, rows, s.panels, p.features, s.scores + first * s.stride, s.stride, p.m, nullptr);
  });
}

#ifdef OBJSLOT_TILES
// The factors of tokens from their squares.
template <Element E>
static void find_factors(const TransportProblem& p, const Tokens<float>& side, int64_t first, int64_t rows,
                         float* buffer) {
  const float shortest = static_cast<float>(p.shortest * p.shortest);
  for (int64_t i = first; i < first + rows; i += 16) {
    const __mmask16 lanes = lanes_upto(first + rows - i);
    const __m512 square = _mm512_maskz_loadu_ps(lanes, side.square + i);
    const __m512 factor =
        _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_sqrt_ps(_mm512_max_ps(_mm512_set1_ps(shortest), square)));
    _mm512_mask_storeu_ps(side.factor + i, lanes, p.cosine ? factor : _mm512_set1_ps(1.f));
    // Squares this small may be of numbers whose squares are no longer held in full.
    if (p.cosine && _mm512_mask_cmp_ps_mask(lanes, square, _mm512_set1_ps(1e-20f), _CMP_LT_OQ))
      for (int64_t j = i; j < i + 16 && j < first + rows; ++j)
        side.factor[j] = inverse_length(token_row(p, side, j, buffer), p.features, p.shortest);
  }
}

// Whether products on tiles were as exact as on vectors: no number overflows in one, and those that count as zero
// are too small to matter.
OBJSLOT_INLINE bool suited_tiles(const TransportProblem& p, const Stage<float>& s) {
  constexpr float most = 1e12f, least = 1e-12f;
  const float x = largest(s.x.size, p.n), y = largest(s.y.size, p.m);
  if (!(x <= most && y <= most)) return false;
  return p.cosine || (x >= least && y >= least && p.eps >= least);
}

// Tokens are multiplied as they are, and the products brought to those of units afterwards. First the tokens of the
// columns, as the right factor.
template <Element E>
static void lay_right(const TransportProblem& p, const Stage<float>& s, const Team& team) {
  const int64_t blocks = whole_tiles(p.m) / tile_rows;
  const Numbers y{s.y.base, p.features, p.m, p.features};
  const RowSizes sizes{s.y.square, s.y.size};
  for (int64_t block = team.begin(blocks); block < team.end(blocks); ++block) {
    const int64_t row = block * tile_rows, rows = p.m - row < tile_rows ? p.m - row : tile_rows;
    lay_transposed_columns<E, parts_of<E>>(y, block, s.right, &sizes);
    find_factors<E>(p, s.y, row, rows, s.rows + team.worker * s.rows_size);
  }
}

// Then those of the rows, some at a time.
template <Element E>
static void multiply_tokens(const TransportProblem& p, const Stage<float>& s, const Team& team) {
  constexpr int P = parts_of<E>;
  const int64_t depth = depth_blocks(p.features);
  uint16_t* left = s.left + team.worker * s.left_size;
  const Numbers x{s.x.base, p.features, p.n, p.features};
  const RowSizes sizes{s.x.square, s.x.size};
  for_groups(p.n, group_rows(p.features, p.m), team, [&](int64_t first, int64_t rows) {
    const int64_t whole = whole_tiles(rows);
    for (int64_t block = 0; block < whole / tile_rows; ++block) lay_rows<E, P>(x, first, block, left, &sizes);
    find_factors<E>(p, s.x, first, rows, s.rows + team.worker * s.rows_size);
    float* scores = s.scores + first * s.stride;
    multiply_tiles<P, P>(left, s.right, whole, s.stride, depth, scores, s.stride);
    for (int64_t i = 0; i < rows && p.cosine; ++i) {
      const Vec<float> factor = broadcast(s.x.factor[first + i]);
      for (int64_t j = 0; j < s.stride; j += 16) {
        float* entry = scores + i * s.stride + j;
        store(entry, factor * (load(entry) * load(s.y.factor + j)));
      }
    }
  });
}
#endif

// Calls use(E) with the element type as a constant of the type.
template <class Use>
OBJSLOT_INLINE void with_element(Element element, const Use& use) {
  if (element == Element::float16)
    use(std::integral_constant<Element, Element::float16>{});
  else if (element == Element::bfloat16)
    use(std::integral_constant<Element, Element::bfloat16>{});
  else
    use(std::integral_constant<Element, Element::float32>{});
}

// The scores of an element, and whether they were made on tiles. Where `laid`, the call before was for the same y and
// gave what `tiles` is, so that its right factor is there.
template <class T, class Run>
static bool make_scores(const TransportProblem& p, const Stage<T>& s, bool tiles, bool laid, const Run& run) {
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4) {
    if (tiles)
      with_element(p.element, [&](auto element) {
        run([&](const Team& team) {
          if (!laid) lay_right<decltype(element)::value>(p, s, team);
          team.wait();
          multiply_tokens<decltype(element)::value>(p, s, team);
        });
      });
    if (tiles && suited_tiles(p, s)) return true;
    laid = laid && !tiles;
  }
#endif
  (void)tiles;
  run([&](const Team& team) { scores_on_vectors(p, s, laid, team); });
  return false;
}

}  // namespace objslot::OBJSLOT_ISA
