// What the Sinkhorn kernels share: one element of the batch, the memory they work in, sweeps over a few rows.
#pragma once

#include "half_types.h"
#include "lane_sums.h"
#include "objslot/threads.h"
#include "vector_functions.h"

namespace objslot::OBJSLOT_ISA {

// Column sums are made for this many rows at a time and then added in order, whichever thread made them: the
// result does not depend on the number of threads.
constexpr int64_t chunk_rows = 64;
// Rows that one sweep handles together, so that weights are loaded once for all of them.
constexpr int block = 4;
// Rows of a sweep that does nothing but add up products; it divides chunk_rows, and whole vectors make it up.
constexpr int64_t sweep_rows = OBJSLOT_VECTOR_BYTES == 64 ? 16 : 8;
// A matrix up to this many bytes leaves room for the next one in a second-level cache.
constexpr int64_t prefetch_bytes = int64_t{300} << 10;
// Results above this many bytes are written past the caches.
constexpr int64_t stream_bytes = int64_t{4} << 20;
// The same where a backward reads them again, from a third-level cache if they are left there. Many iterations want
// the second level for themselves.
constexpr int64_t reread_bytes = int64_t{16} << 20;
constexpr int64_t few_iterations = 10;
// Entries a thread should have at least: starting one costs some microseconds.
constexpr int64_t entries_per_thread = 16384;

template <class T>
constexpr T ln2 = T(0.693147180559945309417);
template <class T>
constexpr T log2_e = T(1.44269504088896340736);

// Hands out parts of the workspace; from a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  // Of memory that is there, where the other kind only counts.
  OBJSLOT_INLINE_MEMBER static Arena in(char* memory) {
    if (!memory) __builtin_unreachable();
    return {memory};
  }
  template <class T>
  OBJSLOT_INLINE_MEMBER T* take(int64_t count) {
    char* part = base ? base + used : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(part);
  }
};

// One matrix of the batch and its marginals.
template <class T>
struct Matrix {
  const void* scores;
  Element element;
  int64_t offset, row_stride, n, m, columns;  // columns: m rounded up to whole vectors
  T scale;                                    // log2(e) / eps
  T inverse_eps;
  const T* a;  // null: a0 each
  const T* b;
  const T* start;
  T a0, b0;

  OBJSLOT_INLINE_MEMBER const T* row(int64_t i, T* buffer) const {
    return read_row<T>(scores, element, offset + i * row_stride, m, buffer);
  }
  OBJSLOT_INLINE_MEMBER T a_at(int64_t i) const { return a ? a[i] : a0; }
  OBJSLOT_INLINE_MEMBER int64_t chunks() const { return (n + chunk_rows - 1) / chunk_rows; }
};

template <class T>
static Matrix<T> element_of(const SinkhornProblem& p, int64_t index) {
  return {p.scores,
          p.element,
          index * p.batch_stride,
          p.row_stride,
          p.n,
          p.m,
          padded<T>(p.m),
          T(1.44269504088896340736 / p.eps),
          T(1 / p.eps),
          p.a ? static_cast<const T*>(p.a) + index * p.a_stride : nullptr,
          p.b ? static_cast<const T*>(p.b) + index * p.b_stride : nullptr,
          p.start ? static_cast<const T*>(p.start) + index * p.start_stride : nullptr,
          T(1) / T(p.n),
          T(1) / T(p.m)};
}

// Whole matrices for each thread, or all threads on one matrix where there are fewer matrices than threads.
OBJSLOT_INLINE int useful_threads(const SinkhornProblem& p, int threads) {
  const int64_t useful = p.batch * p.n * p.m / entries_per_thread;
  return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

// Whether matrices of all the batch are written past the caches.
template <class T>
OBJSLOT_INLINE bool goes_past_caches(const SinkhornProblem& p, bool reread) {
  const int64_t bytes = p.batch * p.n * p.m * static_cast<int64_t>(sizeof(T));
  return bytes > (reread && p.n_iters <= few_iterations ? reread_bytes : stream_bytes);
}

// Calls visit(chunk) for every chunk of rows of this thread's share, then waits for the team. Sweeps that turn
// back and forth find the rows of the last turn in the cache.
template <class T, class Visit>
OBJSLOT_INLINE void for_chunks(const Matrix<T>& matrix, const Team& team, bool backwards, const Visit& visit) {
  const int64_t begin = team.begin(matrix.chunks()), end = team.end(matrix.chunks());
  for (int64_t chunk = begin; chunk < end; ++chunk) visit(backwards ? begin + end - 1 - chunk : chunk);
  team.wait();
}
template <class T, class Visit>
OBJSLOT_INLINE void for_chunks(const Matrix<T>& matrix, const Team& team, const Visit& visit) {
  for_chunks(matrix, team, false, visit);
}

// What one thread does for the team.
template <class Work>
OBJSLOT_INLINE void alone(const Team& team, const Work& work) {
  if (team.worker == 0) work();
  team.wait();
}

template <class T>
OBJSLOT_INLINE int64_t end_of_chunk(const Matrix<T>& matrix, int64_t chunk) {
  const int64_t end = (chunk + 1) * chunk_rows;
  return end < matrix.n ? end : matrix.n;
}

// Fetches the next matrix into the cache while this one is worked on: a few lines with every vector of a sweep, for
// more at once would keep the sweep waiting.
struct Prefetch {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t lines = 0;
  // Spread over so many vectors.
  static OBJSLOT_INLINE_MEMBER Prefetch of(const char* data, int64_t bytes, int64_t vectors) {
    return {data, data + bytes, (bytes / 64 + vectors - 1) / vectors};
  }
  OBJSLOT_INLINE_MEMBER void advance() {
    if (next >= end) return;
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(next + 64 * line, 0, 2);
    next += 64 * lines;
  }
};

// Where there is nothing to fetch.
struct NoPrefetch {
  OBJSLOT_INLINE_MEMBER void advance() const {}
};

// Sweeps that fetch: not so many that the first rows are evicted again.
OBJSLOT_INLINE int64_t sweeps_ahead(int64_t sweeps) { return sweeps < 1 ? 1 : sweeps < 3 ? sweeps : 3; }

// Vectors of one sweep that adds up rows and columns.
template <class T>
OBJSLOT_INLINE int64_t vectors_of_sweep(const SinkhornProblem& p) {
  const int64_t vectors = 2 * (p.n / sweep_rows) * (p.m / width<T>);
  return vectors < 1 ? 1 : vectors;
}

// sums[r] = sum over j of rows[r][j] * weights[j]; the weights are padded with zeros.
template <class T, int R, class Ahead = NoPrefetch>
OBJSLOT_INLINE void dot_rows(const T* rows, int64_t stride, const T* weights, int64_t m, T* sums, Ahead&& ahead = {}) {
  Vec<T> total[R] = {};
  const int64_t whole = m / width<T> * width<T>;
  for (int64_t j = 0; j < whole; j += width<T>) {
    const Vec<T> weight = load(weights + j);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[r] = fused(weight, load(rows + r * stride + j), total[r]);
    ahead.advance();
  }
  if (whole < m) {
    const Vec<T> weight = load(weights + whole);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[r] = fused(weight, load_first(rows + r * stride + whole, m - whole), total[r]);
  }
  sum_lanes_of<T, R>(total, sums);
}

// The same for `count` rows of a sweep.
template <class T, class Ahead>
OBJSLOT_INLINE void dot_block(const T* rows, int64_t stride, int64_t count, const T* weights, int64_t m, T* sums,
                              Ahead&& ahead) {
  if (count == sweep_rows) return dot_rows<T, sweep_rows>(rows, stride, weights, m, sums, ahead);
  int64_t r = 0;
  for (; r + block <= count; r += block) dot_rows<T, block>(rows + r * stride, stride, weights, m, sums + r);
  for (; r < count; ++r) dot_rows<T, 1>(rows + r * stride, stride, weights, m, sums + r);
}

// sums[j] += sum over r of factors[r] * rows[r][j]; sums is padded.
template <class T, int R, class Ahead = NoPrefetch>
OBJSLOT_INLINE void add_rows(const T* rows, int64_t stride, const T* factors, int64_t m, T* sums, Ahead&& ahead = {}) {
  Vec<T> factor[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) factor[r] = broadcast(factors[r]);
  const int64_t whole = m / width<T> * width<T>;
  for (int64_t j = 0; j < whole; j += width<T>) {
    Vec<T> even = load(sums + j), odd{};
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 2) {
      even = fused(factor[r], load(rows + r * stride + j), even);
      if (r + 1 < R) odd = fused(factor[r + 1], load(rows + (r + 1) * stride + j), odd);
    }
    store(sums + j, R > 1 ? even + odd : even);
    ahead.advance();
  }
  if (whole < m) {
    Vec<T> sum = load(sums + whole);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum = fused(factor[r], load_first(rows + r * stride + whole, m - whole), sum);
    store(sums + whole, sum);
  }
}

// The same for `count` rows of a sweep.
template <class T, class Ahead>
OBJSLOT_INLINE void add_block(const T* rows, int64_t stride, int64_t count, const T* factors, int64_t m, T* sums,
                              Ahead&& ahead) {
  if (count == sweep_rows) return add_rows<T, sweep_rows>(rows, stride, factors, m, sums, ahead);
  int64_t r = 0;
  for (; r + block <= count; r += block) add_rows<T, block>(rows + r * stride, stride, factors + r, m, sums);
  for (; r < count; ++r) add_rows<T, 1>(rows + r * stride, stride, factors + r, m, sums);
}

template <class T>
OBJSLOT_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t j = 0; j < count; ++j) p[j] = value;
}

// A vector with the largest number among its lanes.
template <class T>
OBJSLOT_INLINE Vec<T> largest_lanes(const T* p, int64_t count) {
  if (count >= width<T>) {
    Vec<T> tops = load(p);
    for (int64_t j = 0; j + width<T> <= count; j += width<T>) tops = larger(load(p + j), tops);
    return larger(load(p + count - width<T>), tops);
  }
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < count; ++j)
    if (p[j] > top) top = p[j];
  return broadcast(top);
}

template <class T>
OBJSLOT_INLINE T largest(const T* p, int64_t count) {
  return largest_lane<T>(largest_lanes(p, count));
}

// A sum of so many weighted entries of a kernel holds every term that counts where it is above this: neither what the
// exponential rounded to zero, at most 2^-126 times the largest weight each, nor what small weights made too small to
// be added up, at most 2^-126 each, is then more than 2^-26 of it. Of float64 likewise.
template <class T>
OBJSLOT_INLINE T least_sum(T largest_weight, int64_t count) {
  constexpr T range_limit = sizeof(T) == 4 ? T(1.26217745e-29) : T(1e-288);  // 2^-96
  const T weight = largest_weight > T(0.0625) ? largest_weight : T(0.0625);
  return weight * T(count) * range_limit;
}

// Writes count numbers of a row, past the caches where `streamed`; a row need not be aligned.
template <class T>
OBJSLOT_INLINE void copy_row(T* target, const T* row, int64_t count, bool streamed) {
  int64_t j = 0;
  if (streamed) {
    const int64_t offset = reinterpret_cast<uintptr_t>(target) % OBJSLOT_VECTOR_BYTES / sizeof(T);
    const int64_t head = offset ? width<T> - offset : 0;
    for (; j < head && j < count; ++j) target[j] = row[j];
    for (; j + width<T> <= count; j += width<T>) stream(target + j, load(row + j));
  } else {
    for (; j + width<T> <= count; j += width<T>) store(target + j, load(row + j));
  }
  if (j < count) store_first(target + j, load_first(row + j, count - j), count - j);
}

// The first y, as a scaling with the largest at 1 and zero in the padding: a factor common to all columns
// only changes x.
template <class T>
OBJSLOT_INLINE void first_scaling(const Matrix<T>& matrix, T* y) {
  if (!matrix.start) {
    fill(y, matrix.m, T(1));
    fill(y + matrix.m, matrix.columns - matrix.m, T(0));
    return;
  }
  const T top = largest(matrix.start, matrix.m);
  for (int64_t j = 0; j < matrix.columns; j += width<T>) {
    const int64_t left = matrix.m - j;
    Vec<T> value = exp2<T>((load_upto(matrix.start + j, left) - top) * log2_e<T>);
    if (left < width<T>) value = keep_first<T>(value, left);
    store(y + j, value);
  }
}

// The logarithm of a scaling, and of its offset in powers of two, as a natural logarithm.
template <class T>
OBJSLOT_INLINE void potentials(const T* scaling, const T* offset, int64_t count, T* out) {
  for (int64_t j = 0; j < count; j += width<T>) {
    const int64_t left = count - j;
    Vec<T> value = log2<T>(load_upto(scaling + j, left));
    if (offset) value += load_upto(offset + j, left);
    value *= ln2<T>;
    if (left < width<T>)
      store_first(out + j, value, left);
    else
      store(out + j, value);
  }
}

}  // namespace objslot::OBJSLOT_ISA
