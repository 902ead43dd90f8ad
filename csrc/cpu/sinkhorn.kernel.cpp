// Sinkhorn's algorithm forward: exponentiate once with the row maximum taken out, then scale.
#include "sinkhorn_log.h"

namespace objslot::OBJSLOT_ISA {

// A matrix up to this many bytes leaves room for the next one in a second-level cache.
constexpr int64_t prefetch_bytes = int64_t{300} << 10;

template <class T>
struct State {
  T* kernel;            // (n, columns): 2^(scores * scale + offset of the row), at most about 1
  T* offset;            // (n): minus the scaled maximum of the row
  T* x;                 // (n)
  T* next_x;            // (n)
  T* y;                 // (columns), zero in the padding
  T* sums;              // (chunks, columns)
  T* gaps;              // (chunks): share of the marginal error
  unsigned char* lost;  // (chunks): a sum was too small to be exact
  LogState<T> log;
};

template <class T>
static State<T> lay_out(Arena& arena, const Matrix<T>& matrix, int threads) {
  const int64_t n = matrix.n, columns = matrix.columns, chunks = matrix.chunks();
  State<T> s;
  s.kernel = arena.take<T>(n * columns);
  s.offset = arena.take<T>(n);
  s.x = arena.take<T>(n);
  s.next_x = arena.take<T>(n);
  s.y = arena.take<T>(columns);
  s.sums = arena.take<T>(chunks * columns);
  s.gaps = arena.take<T>(chunks);
  s.lost = arena.take<unsigned char>(chunks);
  s.log = {arena.take<T>(n), arena.take<T>(columns), arena.take<T>(chunks * columns), s.sums,
           arena.take<T>(threads * block * columns)};
  return s;
}

// A sum below limit * (largest weight) may lack terms that the exponential rounded to zero.
template <class T>
constexpr T range_limit =
    sizeof(T) == 4 ? T(1.26217745e-29) : T(1e-288);  // 2^-96; 2^-126 and 30 bits to spare

template <class T>
OBJSLOT_INLINE T exponentiate_row(const T* row, T scale, int64_t m, T* kernel, T* offset) {
  const T shift = -largest(row, m) * scale;
  *offset = shift;
  const Vec<T> scales = broadcast(scale), shifts = broadcast(shift);
  constexpr int W = width<T>;
  Vec<T> even{}, odd{};
  int64_t j = 0;
  for (; j + 2 * W <= m; j += 2 * W) {
    const Vec<T> first = exp2<T>(fused(load(row + j), scales, shifts));
    const Vec<T> second = exp2<T>(fused(load(row + j + W), scales, shifts));
    store(kernel + j, first);
    store(kernel + j + W, second);
    even += first;
    odd += second;
  }
  for (; j < m; j += W) {
    const int64_t left = m - j;
    Vec<T> value = exp2<T>(fused(left < W ? load_first(row + j, left) : load(row + j), scales, shifts));
    if (left < W) value = keep_first<T>(value, left);
    store(kernel + j, value);
    even += value;
  }
  return sum_lanes<T>(even + odd);
}

// First iteration, rows: makes the kernel, x and the column sums of one chunk.
template <class T>
OBJSLOT_INLINE void first_chunk(const Matrix<T>& matrix, State<T>& s, int64_t chunk, T limit, int worker) {
  const int64_t columns = matrix.columns;
  const int64_t end = end_of_chunk(matrix, chunk);
  T* sums = s.sums + chunk * columns;
  fill(sums, columns, T(0));
  bool lost = false;
  for (int64_t i = chunk * chunk_rows; i < end; i += block) {
    const int64_t count = end - i < block ? end - i : block;
    T* kernel = s.kernel + i * columns;
    for (int64_t r = 0; r < count; ++r) {
      const T* row = matrix.row(i + r, s.log.rows + worker * block * columns);
      T total = exponentiate_row(row, matrix.scale, matrix.m, kernel + r * columns, s.offset + i + r);
      const T mass = matrix.a_at(i + r);
      if (matrix.start) {
        dot_rows<T, 1>(kernel + r * columns, columns, s.y, columns, &total);
        lost |= !(total > limit) && mass != T(0);
      } else {
        lost |= !(total >= T(0.5));
      }
      s.x[i + r] = mass == T(0) ? T(0) : mass / total;
    }
    if (count == block)
      add_rows<T, block>(kernel, columns, s.x + i, columns, sums);
    else
      for (int64_t r = 0; r < count; ++r)
        add_rows<T, 1>(kernel + r * columns, columns, s.x + i + r, columns, sums);
  }
  s.lost[chunk] = lost;
}

// Further iterations: one sweep serves the rows and the columns. Also the error of the iteration before.
template <class T>
OBJSLOT_INLINE void next_chunk(const Matrix<T>& matrix, State<T>& s, int64_t chunk, T limit,
                               Prefetch& ahead) {
  const int64_t columns = matrix.columns;
  const int64_t end = end_of_chunk(matrix, chunk);
  T* sums = s.sums + chunk * columns;
  fill(sums, columns, T(0));
  bool lost = false;
  T gap = 0;
  for (int64_t i = chunk * chunk_rows; i < end; i += block) {
    const int64_t count = end - i < block ? end - i : block;
    const T* kernel = s.kernel + i * columns;
    T totals[block];
    if (count == block)
      dot_rows<T, block>(kernel, columns, s.y, columns, totals);
    else
      for (int64_t r = 0; r < count; ++r)
        dot_rows<T, 1>(kernel + r * columns, columns, s.y, columns, totals + r);
    for (int64_t r = 0; r < count; ++r) {
      const T mass = matrix.a_at(i + r);
      lost |= !(totals[r] > limit) && mass != T(0);
      const T missing = s.x[i + r] * totals[r] - mass;
      gap += missing < T(0) ? -missing : missing;
      s.next_x[i + r] = mass == T(0) ? T(0) : mass / totals[r];
    }
    if (count == block)
      add_rows<T, block>(kernel, columns, s.next_x + i, columns, sums);
    else
      for (int64_t r = 0; r < count; ++r)
        add_rows<T, 1>(kernel + r * columns, columns, s.next_x + i + r, columns, sums);
    ahead.advance();
  }
  s.lost[chunk] = lost;
  s.gaps[chunk] = gap;
}

// Columns: y from the sums of all chunks. Returns false where the iteration has left the safe range.
template <class T>
OBJSLOT_INLINE bool set_columns(const Matrix<T>& matrix, State<T>& s, const T* x) {
  const int64_t columns = matrix.columns, chunks = matrix.chunks();
  bool safe = true;
  for (int64_t c = 0; c < chunks; ++c) safe &= !s.lost[c];
  const T limit = largest(x, matrix.n) * T(matrix.n) * range_limit<T>;
  Bits<T> bad{};
  for (int64_t j = 0; j < columns; j += width<T>) {
    Vec<T> sum = load(s.sums + j);
    for (int64_t c = 1; c < chunks; ++c) sum += load(s.sums + c * columns + j);
    const int64_t left = matrix.m - j;
    Vec<T> mass = broadcast(matrix.b0);
    if (matrix.b) mass = left < width<T> ? load_first(matrix.b + j, left) : load(matrix.b + j);
    if (left < width<T>) mass = keep_first<T>(mass, left);
    const Bits<T> none = mass == T(0);
    bad |= ~(sum > limit) & ~none;
    store(s.y + j, none ? Vec<T>{} : mass / sum);
  }
  for (int lane = 0; lane < width<T>; ++lane) safe &= !bad[lane];
  return safe;
}

template <class T>
OBJSLOT_INLINE void write_plan_chunk(const Matrix<T>& matrix, State<T>& s, const SinkhornResult& result,
                                     int64_t index, int64_t chunk, bool streamed, int worker,
                                     Prefetch& ahead) {
  const int64_t m = matrix.m, columns = matrix.columns;
  const int64_t end = end_of_chunk(matrix, chunk);
  const bool half = sizeof(T) == 4 && matrix.element != Element::float32;
  T* buffer = s.log.rows + worker * block * columns;
  const bool direct =
      !half && m == columns && reinterpret_cast<uintptr_t>(result.plan) % OBJSLOT_VECTOR_BYTES == 0;
  for (int64_t i = chunk * chunk_rows; i < end; ++i) {
    const T* kernel = s.kernel + i * columns;
    const int64_t offset = (index * matrix.n + i) * m;
    const Vec<T> x = broadcast(s.x[i]);
    T* target = direct ? static_cast<T*>(result.plan) + offset : buffer;
    if (direct && streamed)
      for (int64_t j = 0; j < columns; j += width<T>)
        stream(target + j, x * (load(kernel + j) * load(s.y + j)));
    else
      for (int64_t j = 0; j < columns; j += width<T>)
        store(target + j, x * (load(kernel + j) * load(s.y + j)));
    if constexpr (sizeof(T) == 4)
      if (half) write_half_row(buffer, result.plan, matrix.element, offset, m);
    if (!half && !direct) copy_row(static_cast<T*>(result.plan) + offset, buffer, m, streamed);
    if (i % block == block - 1) ahead.advance();
  }
  if (streamed) end_of_stream();
}

template <class T>
OBJSLOT_INLINE T add_up(const T* parts, int64_t count) {
  T sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += parts[c];
  return sum;
}

// Where the results of one matrix go.
template <class T>
struct Keeper {
  const SinkhornProblem& p;
  const SinkhornResult& result;
  int64_t index;

  OBJSLOT_INLINE_MEMBER bool history() const { return result.history.f; }
  OBJSLOT_INLINE_MEMBER void keep(int64_t count, const T* f, const T* g) const {
    if (!history()) return;
    keep_rows(count, f);
    T* target = static_cast<T*>(result.history.g) + ((count - 1) * p.batch + index) * p.m;
    __builtin_memcpy(target, g, p.m * sizeof(T));
  }
  OBJSLOT_INLINE_MEMBER void keep_rows(int64_t slot, const T* f) const {
    T* target = static_cast<T*>(result.history.f) + (slot * p.batch + index) * p.n;
    __builtin_memcpy(target, f, p.n * sizeof(T));
  }
  OBJSLOT_INLINE_MEMBER T* f() const { return static_cast<T*>(result.f) + index * p.n; }
  OBJSLOT_INLINE_MEMBER T* g() const { return static_cast<T*>(result.g) + index * p.m; }
  OBJSLOT_INLINE_MEMBER void finish(int64_t count, T error) const {
    if (result.history.count) result.history.count[index] = count;
    if (result.error) static_cast<T*>(result.error)[index] = error;
  }
};

// The whole of one matrix by scalings. Returns false, with nothing usable written, when they leave the range.
template <class T>
static bool solve_by_scaling(const Matrix<T>& matrix, State<T>& s, const Keeper<T>& keeper, Prefetch ahead,
                             int threads) {
  const SinkhornProblem& p = keeper.p;
  const SinkhornResult& result = keeper.result;
  const bool early = p.tol >= 0;
  const int64_t chunks = matrix.chunks();
  if (matrix.start) first_scaling(matrix, s.y);
  const T first_limit = T(matrix.m) * range_limit<T>;
  for_chunks(matrix, threads,
             [&](int64_t chunk, int worker) { first_chunk(matrix, s, chunk, first_limit, worker); });
  if (!set_columns(matrix, s, s.x)) return false;

  const auto sweep = [&]() {
    const T limit = largest(s.y, matrix.m) * T(matrix.m) * range_limit<T>;
    for_chunks(matrix, threads, [&](int64_t chunk, int) { next_chunk(matrix, s, chunk, limit, ahead); });
  };
  int64_t count = 1;
  T error = 0;
  if (keeper.history()) keeper.keep_rows(0, s.offset);
  keeper.keep(1, s.x, s.y);
  while (count < p.n_iters || early || result.error) {
    sweep();
    error = add_up(s.gaps, chunks);
    if (count == p.n_iters || (early && !(error > T(p.tol)))) break;
    // The sums belong to the next iteration already.
    T* swap = s.x;
    s.x = s.next_x;
    s.next_x = swap;
    if (!set_columns(matrix, s, s.x)) return false;
    keeper.keep(++count, s.x, s.y);
  }
  if (result.f) {
    potentials(s.x, s.offset, matrix.n, keeper.f());
    potentials<T>(s.y, nullptr, matrix.m, keeper.g());
  }
  keeper.finish(count, error);
  if (!result.plan) return true;
  const bool streamed = p.batch * p.n * p.m * static_cast<int64_t>(sizeof(T)) > stream_bytes;
  for_chunks(matrix, threads, [&](int64_t chunk, int worker) {
    write_plan_chunk(matrix, s, result, keeper.index, chunk, streamed, worker, ahead);
  });
  return true;
}

// The whole of one matrix in the log domain.
template <class T>
static void solve_by_logarithms(const Matrix<T>& matrix, State<T>& s, const Keeper<T>& keeper, int threads) {
  const SinkhornProblem& p = keeper.p;
  const SinkhornResult& result = keeper.result;
  const bool early = p.tol >= 0;
  const int64_t chunks = matrix.chunks(), columns = matrix.columns;
  if (matrix.start)
    __builtin_memcpy(s.log.g, matrix.start, matrix.m * sizeof(T));
  else
    fill(s.log.g, matrix.m, T(0));
  fill(s.log.g + matrix.m, columns - matrix.m, -std::numeric_limits<T>::infinity());

  const auto visit_plan = [&](auto&& use) {
    for_chunks(matrix, threads, [&](int64_t chunk, int worker) {
      T* buffer = s.log.rows + worker * block * columns;
      s.gaps[chunk] = 0;
      for (int64_t i = chunk * chunk_rows; i < end_of_chunk(matrix, chunk); ++i) {
        plan_row(matrix.row(i, buffer), matrix.inverse_eps, s.log.f[i], s.log.g, matrix.m, buffer + columns);
        use(chunk, i, buffer + columns);
      }
    });
  };
  const auto measure = [&](int64_t chunk, int64_t i, T* row) {
    T total = 0;
    for (int64_t j = 0; j < matrix.m; ++j) total += row[j];
    const T missing = total - matrix.a_at(i);
    s.gaps[chunk] += missing < T(0) ? -missing : missing;
  };

  int64_t count = 0;
  T error = 0;
  while (count < p.n_iters) {
    log_iteration(matrix, s.log, threads);
    keeper.keep(++count, s.log.f, s.log.g);
    if (!early) continue;
    visit_plan(measure);
    error = add_up(s.gaps, chunks);
    if (!(error > T(p.tol))) break;
  }
  if (result.f) {
    __builtin_memcpy(keeper.f(), s.log.f, matrix.n * sizeof(T));
    __builtin_memcpy(keeper.g(), s.log.g, matrix.m * sizeof(T));
  }
  if (result.error && !early) {
    visit_plan(measure);
    error = add_up(s.gaps, chunks);
  }
  keeper.finish(-count, error);
  if (!result.plan) return;
  visit_plan([&](int64_t, int64_t i, T* row) {
    const int64_t offset = (keeper.index * matrix.n + i) * matrix.m;
    if constexpr (sizeof(T) == 4)
      if (matrix.element != Element::float32)
        return write_half_row(row, result.plan, matrix.element, offset, matrix.m);
    copy_row(static_cast<T*>(result.plan) + offset, row, matrix.m, false);
  });
}

template <class T>
static int64_t workspace_of(const SinkhornProblem& p, int threads) {
  Arena arena{nullptr};
  lay_out(arena, element_of<T>(p, 0), p.batch < threads ? threads : 1);
  return p.batch < threads ? arena.used : arena.used * threads;
}

template <class T>
static void solve(const SinkhornProblem& p, const SinkhornResult& result, void* workspace, int threads) {
  const auto one = [&](int64_t index, bool more, Arena arena, int team) {
    const FlushSubnormals flush;
    const Matrix<T> matrix = element_of<T>(p, index);
    State<T> s = lay_out(arena, matrix, team);
    Prefetch ahead;
    const int64_t bytes = p.n * matrix.columns * static_cast<int64_t>(sizeof(T));
    if (more && bytes <= prefetch_bytes && p.element != Element::float16 && p.element != Element::bfloat16) {
      // Spread over the last sweeps, but not so thin that the first rows are evicted again.
      const int64_t sweeps = p.n_iters < 3 ? p.n_iters : 3;
      ahead.next =
          static_cast<const char*>(p.scores) + (index + 1) * p.batch_stride * static_cast<int64_t>(sizeof(T));
      ahead.end = ahead.next + ((p.n - 1) * p.row_stride + p.m) * static_cast<int64_t>(sizeof(T));
      ahead.step = ((ahead.end - ahead.next) / (sweeps * ((p.n + block - 1) / block)) + 63) / 64 * 64;
    }
    const Keeper<T> keeper{p, result, index};
    if (!solve_by_scaling(matrix, s, keeper, ahead, team)) solve_by_logarithms(matrix, s, keeper, team);
  };
  if (p.batch < threads) {
    for (int64_t index = 0; index < p.batch; ++index)
      one(index, false, Arena{static_cast<char*>(workspace)}, threads);
    return;
  }
  const int64_t share = workspace_of<T>(p, 1);
  parallel_for(p.batch, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t index = begin; index < end; ++index)
      one(index, index + 1 < end, Arena{static_cast<char*>(workspace) + worker * share}, 1);
  });
}

static int64_t forward_workspace(const SinkhornProblem& p, int threads) {
  threads = useful_threads(p, threads);
  return p.element == Element::float64 ? workspace_of<double>(p, threads) : workspace_of<float>(p, threads);
}

static void forward(const SinkhornProblem& p, const SinkhornResult& result, void* workspace, int threads) {
  threads = useful_threads(p, threads);
  p.element == Element::float64 ? solve<double>(p, result, workspace, threads)
                                : solve<float>(p, result, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SinkhornKernels, forward_workspace, forward)
