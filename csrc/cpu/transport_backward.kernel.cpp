// Sinkhorn transport backward: scores, iteration and plan are made again, the gradient of the plan becomes that of
// the scores in place, and two products with the tokens follow.
#include "transport_move.h"

namespace objslot::OBJSLOT_ISA {

// The values, transposed, and the gradients, as the factors of products.
template <class T>
static void read_channels(const TransportProblem& p, const Stage<T>& s, const void* values, const void* grad,
                          const Team& team) {
  const int64_t lanes = padded<T>(p.channels);
  T* buffer = s.rows + team.worker * s.rows_size;
  for (int64_t i = team.begin(p.n); i < team.end(p.n); ++i) {
    T* row = s.grad + i * lanes;
    read_channel_row(p, grad, i, row, buffer);
    lay_panel_row(row, i, p.n, p.channels, s.grad_panels);
  }
  const auto rows_of_values = [&](int64_t first, int64_t count) {
    for (int64_t j = first; j < first + count; ++j) read_channel_row(p, values, j, s.values + j * lanes, buffer);
    return s.values + first * lanes;
  };
  lay_panels_across(rows_of_values, lanes, p.channels, p.m, s.crossed, team);
}

// The plan and its gradient, grad values'.
template <class T>
static void make_plan(const TransportProblem& p, const Stage<T>& s, const Team& team) {
  const int64_t m = p.m, columns = padded<T>(m), lanes = padded<T>(p.channels);
  T* rows = s.rows + team.worker * s.rows_size;
  const Plan<T> plan = Plan<T>::of(p, s);
  for_groups(p.n, plan_rows, team, [&](int64_t first, int64_t count) {
    {
      const FlushSubnormals flush;
      for (int64_t i = first; i < first + count; ++i) {
        T* target = s.plan + i * m;
        plan.make(s.scores + i * s.stride, i, m, m == columns ? target : rows);
        if (m != columns) copy_row(target, rows, m, false);
      }
    }
    multiply<T>({s.grad + first * lanes, lanes, 1}, count, s.crossed, p.channels, s.slope + first * m, m, m, nullptr);
  });
}

// The gradient of the values, plan' grad.
template <class T>
static void grad_values(const TransportProblem& p, const Stage<T>& s, void* out, const Team& team) {
  const int64_t lanes = padded<T>(p.channels);
  T* moved = s.panel + team.worker * s.panel_size;
  T* row_panels = s.row_panels + team.worker * s.row_panels_size;
  for_groups(p.m, block_rows, team, [&](int64_t first, int64_t count) {
    multiply<T>({s.plan + first, 1, p.m}, count, s.grad_panels, p.n, moved, lanes, lanes, row_panels);
    for (int64_t r = 0; r < count; ++r)
      write_element_row(p.value_element, out, first + r, p.channels, moved + r * lanes);
  });
}

// The gradient of token i from that of its unit, g * scale; the unit is row * factor.
template <class T>
OBJSLOT_INLINE void through_unit(const TransportProblem& p, const Tokens<T>& side, int64_t i, const T* row, T factor,
                                 T scale, T* g, void* out, bool streamed) {
  const int64_t d = p.features, whole = d / width<T> * width<T>;
  const T inverse_length = side.factor[i];
  Vec<T> share{};
  if (p.cosine) {
    Vec<T> even{}, odd{};
    int64_t k = 0;
    for (; k + 2 * width<T> <= d; k += 2 * width<T>) {
      even = fused(load(g + k), load(row + k), even);
      odd = fused(load(g + k + width<T>), load(row + k + width<T>), odd);
    }
    for (; k < d; k += width<T>) even = fused(load_upto(g + k, d - k), load_upto(row + k, d - k), even);
    share = broadcast(-sum_lanes<T>(even + odd) * factor * factor);
  }
  const bool direct = !(sizeof(T) == 4 && p.element != Element::float32);
  T* target = direct ? static_cast<T*>(out) + i * d : g;
  const Vec<T> all = broadcast(inverse_length * scale);
  if (direct && streamed && reinterpret_cast<uintptr_t>(target) % OBJSLOT_VECTOR_BYTES == 0) {
    for (int64_t k = 0; k < whole; k += width<T>) stream(target + k, all * fused(share, load(row + k), load(g + k)));
  } else {
    for (int64_t k = 0; k < whole; k += width<T>) store(target + k, all * fused(share, load(row + k), load(g + k)));
  }
  if (whole < d)
    store_first(target + whole,
                all * fused(share, load_first(row + whole, d - whole), load_first(g + whole, d - whole)), d - whole);
  if (!direct) write_element_row(p.element, out, i, d, g);
}

// What a gradient of tokens comes from: slope times the other tokens, or the transposed slope.
template <class T>
struct Towards {
  const Tokens<T>&own, &other;
  bool transposed;
  void* out;
  bool streamed;  // past the caches
};

template <class T>
static void towards_on_vectors(const TransportProblem& p, const Stage<T>& s, const Towards<T>& towards,
                               const Team& team) {
  const int64_t features = padded<T>(p.features);
  const Tokens<T>& own = towards.own;
  T* panel = s.panel + team.worker * s.panel_size;
  T* row_panels = s.row_panels + team.worker * s.row_panels_size;
  for (int64_t k = team.begin(towards.other.count); k < team.end(towards.other.count); ++k)
    lay_panel_row(towards.other.unit + k * features, k, towards.other.count, p.features, s.panels);
  team.wait();
  for_groups(own.count, block_rows, team, [&](int64_t first, int64_t rows) {
    const Factor<T> slope =
        towards.transposed ? Factor<T>{s.slope + first, 1, p.m} : Factor<T>{s.slope + first * p.m, p.m, 1};
    multiply<T>(slope, rows, s.panels, towards.other.count, panel, features, p.features, row_panels);
    for (int64_t r = 0; r < rows; ++r) {
      const T* unit = own.unit + (first + r) * features;
      through_unit<T>(p, own, first + r, unit, 1, 1, panel + r * features, towards.out, towards.streamed);
    }
  });
  if (towards.streamed) end_of_stream();
}

#ifdef OBJSLOT_TILES
// The power of two that brings a size to [1, 2), and its inverse; sizes at the ends of the range stay near them.
OBJSLOT_INLINE void scale_of(float size, float* scale, float* inverse) {
  int32_t bits;
  __builtin_memcpy(&bits, &size, 4);
  int32_t exponent = (bits >> 23 & 255) - 127;
  exponent = exponent == 128 ? 0 : exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  const int32_t up = (127 - exponent) << 23, down = (127 + exponent) << 23;
  __builtin_memcpy(scale, &up, 4);
  __builtin_memcpy(inverse, &down, 4);
}

// Scales of the rows and columns of the slope.
static void find_scales(const TransportProblem& p, const Stage<float>& s, const Team& team) {
  const int64_t whole_n = whole_tiles(p.n), whole_m = whole_tiles(p.m);
  float* tops = s.tops + team.worker * whole_m;
  fill(tops, whole_m, 0.f);
  for_groups(p.n, p.n, team, [&](int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; ++i) {
      Vec<float> top{};
      for (int64_t j = 0; j < p.m; j += 16) {
        const __m512 entry = (__m512)load_upto(s.slope + i * p.m + j, p.m - j);
        const Vec<float> size = (Vec<float>)_mm512_abs_ps(entry);
        top = larger(size, top);
        store(tops + j, larger(size, load(tops + j)));
      }
      scale_of(largest_lane<float>(top), s.scale_n + i, s.scale_n + whole_n + i);
    }
  });
  team.wait();
  for (int64_t j = team.begin(p.m); j < team.end(p.m); ++j) {
    float top = s.tops[j];
    for (int worker = 1; worker < team.size; ++worker)
      top = s.tops[worker * whole_m + j] > top ? s.tops[worker * whole_m + j] : top;
    scale_of(top, s.scale_m + j, s.scale_m + whole_m + j);
  }
}

template <Element E>
static void towards_on_tiles(const TransportProblem& p, const Stage<float>& s, const Towards<float>& towards,
                             const Team& team) {
  constexpr int R = parts_of<E>, L = E == Element::float32 ? 3 : 2;
  const Tokens<float>&own = towards.own, &other = towards.other;
  const int64_t features = whole_tiles(p.features), blocks = features / tile_rows, depth = depth_blocks(other.count);
  const float* lengths = E == Element::float32 || !p.cosine ? nullptr : other.factor;
  const float* scales = towards.transposed ? s.scale_m : s.scale_n;
  const float* inverse = scales + whole_tiles(own.count);
  const Numbers slope{
      s.slope, p.m, p.n, p.m, towards.transposed ? lengths : scales, towards.transposed ? scales : lengths};
  // Numbers of the half types are multiplied as they are, and the lengths with the slope.
  const Numbers right{other.base, p.features, other.count, p.features, lengths ? nullptr : other.factor};
  for (int64_t block = team.begin(blocks); block < team.end(blocks); ++block) lay_columns<E, R>(right, block, s.right);
  team.wait();
  uint16_t* left = s.left + team.worker * s.left_size;
  float* buffer = s.rows + team.worker * s.rows_size;
  // Two panels in turn: the rows of one are finished while those of the next are multiplied.
  const int64_t group = group_rows(other.count, p.features);
  float* const panels = s.panel + team.worker * s.panel_size;
  float *panel = panels, *waiting = nullptr;
  int64_t next = 0, end = 0;
  const auto finish = [&](int64_t count) {
    for (int64_t stop = next + count < end ? next + count : end; next < stop; ++next, waiting += features)
      through_unit(p, own, next, token_row(p, own, next, buffer), own.factor[next], inverse[next], waiting, towards.out,
                   towards.streamed);
  };
  for_groups(own.count, group, team, [&](int64_t first, int64_t rows) {
    const int64_t whole = whole_tiles(rows);
    for (int64_t block = 0; block < whole / tile_rows; ++block)
      if (towards.transposed)
        lay_transposed_rows<Element::float32, L>(slope, first, block, left);
      else
        lay_rows<Element::float32, L>(slope, first, block, left);
    const int64_t steps = whole / tile_pair * (features / tile_pair), share = (end - next + steps - 1) / steps;
    multiply_tiles_between<L, R>(left, s.right, whole, features, depth, panel, features, [&] { finish(share); });
    finish(end - next);
    waiting = panel;
    next = first;
    end = first + rows;
    panel = panel == panels ? panels + group * features : panels;
  });
  finish(end - next);
  if (towards.streamed) end_of_stream();
}
#endif

template <class T>
static void grad_tokens(const TransportProblem& p, const Stage<T>& s, const Towards<T>& towards, bool tiles,
                        const Team& team) {
#ifdef OBJSLOT_TILES
  if constexpr (sizeof(T) == 4)
    if (tiles)
      return with_element(p.element,
                          [&](auto element) { towards_on_tiles<decltype(element)::value>(p, s, towards, team); });
#endif
  (void)tiles;
  towards_on_vectors(p, s, towards, team);
}

// One element; run(stage) calls stage(team) on the threads that work on it.
template <class T, class Run>
static void move_back(const TransportProblem& p, const TransportGradient& result, const SinkhornTables& sinkhorn,
                      int64_t index, Stage<T> s, bool tiles, int threads, const Run& run) {
  const int64_t token = size_of(p.element), value = size_of(p.value_element);
  const auto part = [&](void* base, int64_t entries, int64_t size) {
    return static_cast<char*>(base) + index * entries * size;
  };
  const auto marginal = [&](void* base, int64_t count) {
    return base ? static_cast<T*>(base) + index * count : nullptr;
  };
  const auto streamed = [&](int64_t count) { return p.batch * count * p.features * token > stream_bytes; };
  point_at(p, index, s);
  tiles = make_scores(p, s, tiles, false, run);
  const SinkhornProblem scores = scores_problem<T>(p, index, s.scores, s.stride);
  const SinkhornHistory history = history_of(s);
  sinkhorn.forward.forward(scores, {nullptr, nullptr, nullptr, nullptr, history}, s.sinkhorn, threads);
  run([&](const Team& team) {
    const char* grad = static_cast<const char*>(result.grad) + index * p.n * p.channels * value;
    const char* values = static_cast<const char*>(p.values) + index * p.values_stride * value;
    read_channels(p, s, values, grad, team);
    team.wait();
    make_plan(p, s, team);
    team.wait();
    grad_values(p, s, part(result.values, p.m * p.channels, value), team);
  });
  // The gradient of the scores takes the place of that of the plan.
  sinkhorn.backward.run(
      scores,
      {s.slope, 0, p.m, nullptr, nullptr, s.plan, history, s.slope, marginal(result.a, p.n), marginal(result.b, p.m)},
      s.sinkhorn, threads);
  run([&](const Team& team) {
#ifdef OBJSLOT_TILES
    if constexpr (sizeof(T) == 4)
      if (tiles) {
        find_scales(p, s, team);
        team.wait();
      }
#endif
    grad_tokens(p, s, {s.x, s.y, false, part(result.x, p.n * p.features, token), streamed(p.n)}, tiles, team);
    // The next right factor takes the place of this one.
    team.wait();
    grad_tokens(p, s, {s.y, s.x, true, part(result.y, p.m * p.features, token), streamed(p.m)}, tiles, team);
  });
}

template <class T>
static void move_all_back(const TransportProblem& p, const TransportGradient& result, const SinkhornTables& sinkhorn,
                          bool tiles, char* base, int threads) {
  for_elements(p, threads, [&](int64_t index, int worker, int together, const auto& run) {
    const Stage<T> s = stage_of<T>(p, sinkhorn, true, tiles, together, base, worker);
    move_back(p, result, sinkhorn, index, s, tiles, together, run);
  });
}

static int64_t workspace(const TransportProblem& p, const SinkhornTables& sinkhorn, bool tiles, int threads) {
  threads = useful_threads(p, threads);
  return p.element == Element::float64 ? workspace_of<double>(p, sinkhorn, true, tiles, threads)
                                       : workspace_of<float>(p, sinkhorn, true, tiles, threads);
}

static void run(const TransportProblem& p, const TransportGradient& result, const SinkhornTables& sinkhorn, bool tiles,
                void* workspace, int threads) {
  threads = useful_threads(p, threads);
  char* base = static_cast<char*>(workspace);
  p.element == Element::float64 ? move_all_back<double>(p, result, sinkhorn, tiles, base, threads)
                                : move_all_back<float>(p, result, sinkhorn, tiles, base, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(TransportBackwardKernels, workspace, run)
