// What one element of the batch is worked on in.
#pragma once

#include "objslot/transport.h"
#include "sinkhorn_log.h"
#include "tile_products.h"
#include "vector_products.h"

namespace objslot::OBJSLOT_ISA {

// Rows of the plan that are made and used together.
constexpr int64_t plan_rows = 2 * product_rows;
// Rows of a result that the threads share out.
constexpr int64_t shared_rows = 32;
// Bytes that a factor of a product on tiles may take to stay in a second-level cache.
constexpr int64_t factor_bytes = int64_t{1} << 20;
// Rows of a result that are made together: see group_rows.
constexpr int64_t few_rows = 64, most_rows = 256;

// Tokens of one side.
template <class T>
struct Tokens {
  const void* base;  // (count, features)
  int64_t count;
  T* factor;             // (count): one over the length, or 1 for dot products
  T* unit;               // (count, padded features), backward of products on vectors: tokens times factor
  float *square, *size;  // (count), where products are made on tiles: see RowSizes
};

// What an element is worked on in; what each thread has is marked with its own.
template <class T>
struct Stage {
  Tokens<T> x, y;
  int64_t stride;   // of the scores
  T* scores;        // (n, stride), both rounded up to whole tiles
  T* history_f;     // (1 + n_iters, n)
  T* history_g;     // (n_iters, m)
  int64_t count;    // as in SinkhornHistory
  T* values;        // (m, lanes of the channels): in panels forward
  uint16_t* right;  // the right factor of a product on tiles
  T* panels;        // the same of one on vectors, in panels
  // Backward alone.
  T* plan;         // (n, m)
  T* slope;        // (n, m): gradient of the plan, then of the scores
  T* grad;         // (n, lanes of the channels)
  T* grad_panels;  // the same in panels
  T* crossed;      // (channels, columns), in panels: the values, transposed
  float* scale_n;  // (2, n): powers of two that bring the rows of the slope near 1, and their inverses
  float* scale_m;  // (2, m): the same of the columns
  float* tops;     // (threads, m)
  // For each thread.
  uint16_t* left;  // the left factor of a product on tiles
  T* row_panels;   // a block of that of one on vectors
  T* units;        // (block_rows, padded features), forward on vectors: some of the tokens' units
  T* panel;        // (rows, whole tiles of features): those of a result
  T* rows;         // (plan_rows, columns), and a row of features or channels
  int64_t left_size, row_panels_size, units_size, panel_size, rows_size;
  char* sinkhorn;
};

OBJSLOT_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows of a result of so many terms and columns that are made together: few, where the right factor stays in a
// second-level cache beside the left one, otherwise as many as it has room for.
OBJSLOT_INLINE int64_t group_rows(int64_t terms, int64_t columns) {
  const int64_t whole = round_up(terms, 32);
  if (whole * round_up(columns, 32) * 6 <= factor_bytes) return few_rows;
  const int64_t fitting = factor_bytes / (whole * 6) / shared_rows * shared_rows;
  return fitting < few_rows ? few_rows : fitting > most_rows ? most_rows : fitting;
}

// Words of 16 bits that its left factor then has at most, for so many terms or fewer.
OBJSLOT_INLINE int64_t left_words(int64_t terms, int64_t columns) {
  const int64_t whole = round_up(terms, 32);
  if (whole * round_up(columns, 32) * 6 <= factor_bytes) return 3 * few_rows * whole;
  const int64_t fitting = factor_bytes / 6, least = few_rows * whole, most = most_rows * whole;
  return round_up(3 * (fitting < least ? least : fitting < most ? fitting : most), 32);
}

// Threads that have enough to do: starting one costs some microseconds.
OBJSLOT_INLINE int useful_threads(const TransportProblem& p, int threads) {
  const int64_t useful = p.batch * p.n * p.m * (p.features + p.channels + 16) / 1000000;
  return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

// Calls body(index, worker, together, run) for every element: `together` threads work on one, and run(stage) calls
// stage(team) on them.
template <class Body>
static void for_elements(const TransportProblem& p, int threads, const Body& body) {
  if (p.batch < threads) {
    const auto run = [&](const auto& stage) { run_team(threads, stage); };
    for (int64_t index = 0; index < p.batch; ++index) body(index, 0, threads, run);
    return;
  }
  parallel_for(p.batch, threads, [&](int64_t begin, int64_t end, int worker) {
    const auto run = [](const auto& stage) { stage(Team{}); };
    for (int64_t index = begin; index < end; ++index) body(index, worker, 1, run);
  });
}

template <class T>
static SinkhornProblem scores_problem(const TransportProblem& p, int64_t index, const T* scores, int64_t stride) {
  const auto part = [&](const void* base, int64_t step) {
    return base ? static_cast<const T*>(base) + index * step : nullptr;
  };
  return {scores,    sizeof(T) == 8 ? Element::float64 : Element::float32,
          1,         p.n,
          p.m,       0,
          stride,    part(p.a, p.a_stride),
          0,         part(p.b, p.b_stride),
          0,         part(p.start, p.start_stride),
          0,         p.eps,
          p.n_iters, p.tol};
}

// `threads` work on the element together.
template <class T>
static Stage<T> lay_out(Arena& arena, const TransportProblem& p, const SinkhornTables& sinkhorn, bool backward,
                        bool tiles, int threads) {
  const int64_t columns = padded<T>(p.m), lanes = padded<T>(p.channels), features = padded<T>(p.features);
  const int64_t n = p.n, m = p.m, longest = n > m ? n : m;
  const int64_t whole_n = round_up(n, 32), whole_m = round_up(m, 32), whole_features = round_up(p.features, 32);
  Stage<T> s{};
  const auto tokens = [&](int64_t count) {
    Tokens<T> side{};
    side.count = count;
    side.factor = arena.take<T>(round_up(count, 32));
    side.square = arena.take<float>(count);
    side.size = arena.take<float>(count);
    return side;
  };
  s.x = tokens(n);
  s.y = tokens(m);
  s.stride = whole_m;
  s.scores = arena.take<T>(whole_n * whole_m);
  s.history_f = arena.take<T>((1 + p.n_iters) * n);
  s.history_g = arena.take<T>(p.n_iters * m);
  s.values = arena.take<T>(m * lanes);
  if (backward) {
    s.plan = arena.take<T>(n * m);
    s.slope = arena.take<T>(n * m);
    s.grad = arena.take<T>(n * lanes);
    s.grad_panels = arena.take<T>(n * lanes);
    s.crossed = arena.take<T>(p.channels * columns);
    s.scale_n = arena.take<float>(2 * whole_n);
    s.scale_m = arena.take<float>(2 * whole_m);
    s.tops = arena.take<float>(threads * whole_m);
  }
  s.rows_size = round_up(plan_rows * columns + whole_features + plan_rows * lanes, 16);
  const int64_t most = tiles ? 2 * most_rows : block_rows;
  const int64_t panel_rows = round_up(longest, 32) < most ? round_up(longest, 32) : most;
  s.panel_size = backward ? panel_rows * (whole_features > lanes ? whole_features : lanes) : 0;
  s.left_size = !tiles ? 0 : left_words(p.features, m);
  if (tiles && backward && left_words(longest, p.features) > s.left_size) s.left_size = left_words(longest, p.features);
  s.row_panels_size = backward ? round_up(left_entries<T>(m, n), 16) : 0;
  s.rows = arena.take<T>(threads * s.rows_size);
  s.row_panels = arena.take<T>(threads * s.row_panels_size);
  s.panel = arena.take<T>(threads * s.panel_size);
  const SinkhornProblem scores = scores_problem<T>(p, 0, s.scores, s.stride);
  const int64_t ahead = sinkhorn.forward.forward_workspace(scores, threads);
  const int64_t back = backward ? sinkhorn.backward.workspace(scores, threads) : 0;
  s.sinkhorn = arena.take<char>(ahead > back ? ahead : back);
  // Either tiles or vectors are used for an element.
  Arena other = arena;
  s.left = arena.take<uint16_t>(threads * s.left_size);
  s.right = tiles ? arena.take<uint16_t>(3 * whole_features * (whole_n > whole_m ? whole_n : whole_m)) : nullptr;
  s.units_size = backward ? 0 : block_rows * features;
  s.units = other.take<T>(threads * s.units_size);
  if (backward) {
    s.x.unit = other.take<T>(n * features);
    s.y.unit = other.take<T>(m * features);
  }
  s.panels =
      other.take<T>(backward && longest * features > p.features * columns ? longest * features : p.features * columns);
  if (other.used > arena.used) arena.used = other.used;
  return s;
}

OBJSLOT_INLINE int64_t size_of(Element element) {
  return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2;
}

template <class T>
static void point_at(const TransportProblem& p, int64_t index, Stage<T>& s) {
  const int64_t size = size_of(p.element);
  s.x.base = static_cast<const char*>(p.x) + index * p.x_stride * size;
  s.y.base = static_cast<const char*>(p.y) + index * p.y_stride * size;
}

// Token i in the arithmetic type.
template <class T>
OBJSLOT_INLINE const T* token_row(const TransportProblem& p, const Tokens<T>& side, int64_t i, T* buffer) {
  return read_row<T>(side.base, p.element, i * p.features, p.features, buffer);
}

// Writes row i of a dense matrix of some element type.
template <class T>
OBJSLOT_INLINE void write_element_row(Element element, void* base, int64_t i, int64_t size, const T* row) {
  if constexpr (sizeof(T) == 4)
    if (element != Element::float32) return write_half_row(row, base, element, i * size, size);
  copy_row(static_cast<T*>(base) + i * size, row, size, false);
}

// The part of the workspace that belongs to a worker.
template <class T>
static Stage<T> stage_of(const TransportProblem& p, const SinkhornTables& sinkhorn, bool backward, bool tiles,
                         int together, char* base, int worker) {
  Arena counted{nullptr};
  lay_out<T>(counted, p, sinkhorn, backward, tiles, together);
  Arena arena = Arena::in(base + worker * counted.used);
  return lay_out<T>(arena, p, sinkhorn, backward, tiles, together);
}

template <class T>
static int64_t workspace_of(const TransportProblem& p, const SinkhornTables& sinkhorn, bool backward, bool tiles,
                            int threads) {
  Arena arena{nullptr};
  lay_out<T>(arena, p, sinkhorn, backward, tiles, p.batch < threads ? threads : 1);
  return p.batch < threads ? arena.used : arena.used * threads;
}

}  // namespace objslot::OBJSLOT_ISA
