// One iteration of Sinkhorn's algorithm by scalings: the kernel of a matrix, and the sweeps over it.
#pragma once

#include "sinkhorn_log.h"
#include "sinkhorn_rows.h"

namespace objslot::OBJSLOT_ISA {

// The kernel of one thread is kept up to this many bytes, and always where exponentials are slow.
template <class T>
constexpr int64_t most_kept =
    OBJSLOT_VECTOR_BYTES == 64 && sizeof(T) == 4 ? int64_t{1} << 20 : std::numeric_limits<int64_t>::max();
template <class T>
struct State {
  T* kernel;            // (n, columns): 2^(scores * scale + offset of the row), at most about 1; or null
  T* offset;            // (n): minus the scaled maximum of the row
  T* x;                 // (n)
  T* next_x;            // (n)
  T* y;                 // (columns), zero in the padding
  T* sums;              // (chunks, columns)
  T* gaps;              // (chunks): share of the marginal error
  unsigned char* lost;  // (chunks): a sum was too small to be exact
  unsigned char* bad;   // (threads): likewise of the columns
  T* rows;              // (threads, sweep_rows + 1, columns)
  LogState<T> log;
};

template <class T>
static bool keeps_kernel(const SinkhornProblem& p, int threads) {
  const int64_t bytes = p.n * padded<T>(p.m) * static_cast<int64_t>(sizeof(T));
  return (p.batch < threads ? bytes / threads : bytes) <= most_kept<T>;
}

template <class T>
static State<T> lay_out(Arena& arena, const SinkhornProblem& p, int threads, int size) {
  const Matrix<T> matrix = element_of<T>(p, 0);
  const int64_t n = matrix.n, columns = matrix.columns, chunks = matrix.chunks();
  State<T> s;
  s.kernel = keeps_kernel<T>(p, threads) ? arena.take<T>(n * columns) : nullptr;
  s.offset = arena.take<T>(n);
  s.x = arena.take<T>(n);
  s.next_x = arena.take<T>(n);
  s.y = arena.take<T>(columns);
  s.sums = arena.take<T>(chunks * columns);
  s.gaps = arena.take<T>(chunks);
  s.lost = arena.take<unsigned char>(chunks);
  s.bad = arena.take<unsigned char>(size);
  s.rows = arena.take<T>(size * (sweep_rows + 1) * columns);
  s.log = {arena.take<T>(n), arena.take<T>(columns), arena.take<T>(chunks * columns), s.sums, s.rows};
  return s;
}

// Rows that the place of a row of the plan is fetched ahead.
constexpr int64_t rows_ahead = 4;

// The plan of an earlier matrix that waits to be written.
template <class T>
struct Pending {
  PlanRows<T> rows;
  int64_t next = 0, end = 0;
  T* buffer = nullptr;
  OBJSLOT_INLINE_MEMBER void advance() {
    if (next >= end) return;
    rows.fetch(next + rows_ahead);
    rows.write(next++, buffer);
  }
  OBJSLOT_INLINE_MEMBER void finish() {
    while (next < end) rows.write(next++, buffer);
  }
};

// x = a / totals for `count` rows from `i` on, and whether a total that counts is not above the limit.
template <class T>
OBJSLOT_INLINE Bits<T> set_rows(const Matrix<T>& matrix, int64_t i, int64_t count, const T* totals, T limit, T* x) {
  Bits<T> bad{};
  for (int64_t r = 0; r < count; r += width<T>) {
    const int64_t left = count - r;
    Vec<T> mass = matrix.a ? load_upto(matrix.a + i + r, left) : broadcast(matrix.a0);
    const Vec<T> total = load_upto(totals + r, left);
    Vec<T> factor = mass == T(0) ? Vec<T>{} : mass / total;
    Bits<T> lost = ~(total > limit) & ~(mass == T(0));
    if (left < width<T>) {
      store_first(x + i + r, factor, left);
      lost = lost & (keep_first<T>(broadcast(T(1)), left) == T(1));
    } else {
      store(x + i + r, factor);
    }
    bad |= lost;
  }
  return bad;
}

template <class T>
OBJSLOT_INLINE bool any(Bits<T> bits) {
  bool found = false;
  for (int lane = 0; lane < width<T>; ++lane) found |= bits[lane] != 0;
  return found;
}

// What the rows lack of a, or have above it, with x as it was.
template <class T>
OBJSLOT_INLINE T missing(const Matrix<T>& matrix, int64_t i, int64_t count, const T* x, const T* totals) {
  Vec<T> gap{};
  for (int64_t r = 0; r < count; r += width<T>) {
    const int64_t left = count - r;
    const Vec<T> mass = matrix.a ? load_upto(matrix.a + i + r, left) : broadcast(matrix.a0);
    Vec<T> difference = load_upto(x + i + r, left) * load_upto(totals + r, left) - mass;
    difference = difference < T(0) ? -difference : difference;
    gap += left < width<T> ? keep_first<T>(difference, left) : difference;
  }
  return sum_lanes<T>(gap);
}

// First iteration, rows: makes the kernel, x and the column sums of one chunk.
template <class T>
OBJSLOT_INLINE void first_chunk(const Matrix<T>& matrix, State<T>& s, int64_t chunk, T* rows, Pending<T>& pending) {
  const int64_t columns = matrix.columns;
  const int64_t end = end_of_chunk(matrix, chunk);
  // Without a start the largest entry of a row is 1.
  const T limit = matrix.start ? least_sum(T(1), matrix.m) : T(0.25);
  T* sums = s.sums + chunk * columns;
  fill(sums, columns, T(0));
  Bits<T> lost{};
  for (int64_t i = chunk * chunk_rows; i < end; i += sweep_rows) {
    const int64_t count = end - i < sweep_rows ? end - i : sweep_rows;
    T* kernel = s.kernel ? s.kernel + i * columns : rows;
    const T* row[sweep_rows];
    Vec<T> parts[sweep_rows] = {};
    T shifts[sweep_rows], totals[sweep_rows];
    for (int64_t r = 0; r < count; ++r) {
      row[r] = matrix.row(i + r, kernel + r * columns);
      parts[r] = largest_lanes(row[r], matrix.m);
    }
    largest_lanes_of<T, sweep_rows>(parts, shifts);
    for (int64_t r = 0; r < count; ++r) {
      const T shift = -shifts[r] * matrix.scale;
      T* target = kernel + r * columns;
      s.offset[i + r] = shift;
      if (matrix.start)
        parts[r] = exponentiate_row<T, true>(row[r], matrix.scale, shift, matrix.m, s.y, target);
      else
        parts[r] = exponentiate_row<T, false>(row[r], matrix.scale, shift, matrix.m, nullptr, target);
      pending.advance();
    }
    sum_lanes_of<T, sweep_rows>(parts, totals);
    lost |= set_rows(matrix, i, count, totals, limit, s.x);
    add_block(kernel, columns, count, s.x + i, columns, sums, NoPrefetch{});
  }
  s.lost[chunk] = any<T>(lost);
}

// Further iterations: one sweep serves the rows and the columns. Also the error of the iteration before.
template <class T>
OBJSLOT_INLINE void next_chunk(const Matrix<T>& matrix, State<T>& s, int64_t chunk, T limit, T* rows, Prefetch& ahead) {
  const int64_t columns = matrix.columns;
  const int64_t end = end_of_chunk(matrix, chunk);
  T* sums = s.sums + chunk * columns;
  fill(sums, columns, T(0));
  Bits<T> lost{};
  T gap = 0;
  T totals[2][sweep_rows];
  const auto visit = [&](int64_t i, T* found) __attribute__((always_inline)) {
    const int64_t count = end - i < sweep_rows ? end - i : sweep_rows;
    if (s.kernel) return dot_block(s.kernel + i * columns, columns, count, s.y, columns, found, ahead);
    Vec<T> parts[sweep_rows] = {};
    for (int64_t r = 0; r < count; ++r) {
      T* target = rows + r * columns;
      parts[r] =
          exponentiate_row<T, true>(matrix.row(i + r, target), matrix.scale, s.offset[i + r], matrix.m, s.y, target);
    }
    sum_lanes_of<T, sweep_rows>(parts, found);
  };
  int turn = 0;
  if (s.kernel) visit(chunk * chunk_rows, totals[0]);
  for (int64_t i = chunk * chunk_rows; i < end; i += sweep_rows, turn ^= 1) {
    const int64_t count = end - i < sweep_rows ? end - i : sweep_rows;
    const T* kernel = s.kernel ? s.kernel + i * columns : rows;
    if (!s.kernel) visit(i, totals[turn]);
    lost |= set_rows(matrix, i, count, totals[turn], limit, s.next_x);
    gap += missing(matrix, i, count, s.x, totals[turn]);
    // Before the quotients are needed, which take their time.
    if (s.kernel && i + sweep_rows < end) visit(i + sweep_rows, totals[turn ^ 1]);
    add_block(kernel, columns, count, s.next_x + i, columns, sums, ahead);
  }
  s.lost[chunk] = any<T>(lost);
  s.gaps[chunk] = gap;
}

// Columns: y from the sums of all chunks. Returns false where the iteration has left the safe range.
template <class T>
OBJSLOT_INLINE bool set_columns(const Matrix<T>& matrix, State<T>& s, const T* x, const Team& team) {
  const int64_t columns = matrix.columns, chunks = matrix.chunks();
  const T limit = least_sum(largest(x, matrix.n), matrix.n);
  const int64_t vectors = columns / width<T>;
  Bits<T> bad{};
  for (int64_t j = team.begin(vectors) * width<T>; j < team.end(vectors) * width<T>; j += width<T>) {
    Vec<T> sum = load(s.sums + j);
    for (int64_t c = 1; c < chunks; ++c) sum += load(s.sums + c * columns + j);
    const int64_t left = matrix.m - j;
    Vec<T> mass = matrix.b ? load_upto(matrix.b + j, left) : broadcast(matrix.b0);
    if (left < width<T>) mass = keep_first<T>(mass, left);
    const Bits<T> none = mass == T(0);
    bad |= ~(sum > limit) & ~none;
    store(s.y + j, none ? Vec<T>{} : mass / sum);
  }
  bool lost = any<T>(bad);
  s.bad[team.worker] = lost;
  // Before the team goes on to the next sweep, which writes them.
  for (int64_t c = 0; c < chunks; ++c) lost |= s.lost[c] != 0;
  team.wait();
  for (int worker = 0; worker < team.size; ++worker) lost |= s.bad[worker] != 0;
  return !lost;
}

template <class T>
OBJSLOT_INLINE T add_up(const T* parts, int64_t count) {
  T sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += parts[c];
  return sum;
}

}  // namespace objslot::OBJSLOT_ISA
