// Both plans of a pair of frames from one kernel matrix, applied to the values and never stored.
//
// With K = exp(scores / eps), one plan sets the rows first, the other one, on the transposed scores, the columns.
// Both iterations are sums over the rows and the columns of the same K, so that one sweep serves both, and K is
// exponentiated once, with the maximum of every row taken out: the second plan then starts from x = e^maximum
// in place of x = 1.
#include "objslot/alignment.h"

#include "sinkhorn_rows.h"
#include "transport_move.h"

namespace objslot::OBJSLOT_ISA {

// Rows of a sweep that handles two weights for each row.
constexpr int pair_rows = 4;
// Rows of a product with the values.
constexpr int value_rows = 8;

// One of the two plans: x of the rows, y of the columns.
template <class T>
struct Scaling {
  T* x;     // (n)
  T* y;     // (columns)
  T* sums;  // (columns)
};

template <class T>
struct PairWork {
  T* offset;   // (n)
  T* weights;  // (columns, lanes of the channels)
  Scaling<T> forth, back;
};

template <class T>
OBJSLOT_INLINE T least(const T* weights, int64_t count) {
  return least_sum(largest(weights, count), count);
}

// products[w][r] = sum over j of rows[r][j] * weights_w[j], for two weights w.
template <class T, int R>
OBJSLOT_INLINE void dot_twice(const T* rows, int64_t stride, const T* first, const T* second, int64_t columns, T* one,
                              T* two) {
  Vec<T> even[R] = {}, odd[R] = {};
  for (int64_t j = 0; j < columns; j += width<T>) {
    const Vec<T> a = load(first + j), b = load(second + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = load(rows + r * stride + j);
      even[r] = fused(a, value, even[r]);
      odd[r] = fused(b, value, odd[r]);
    }
  }
  sum_lanes_of<T, R>(even, one);
  sum_lanes_of<T, R>(odd, two);
}

// sums_w[j] += sum over r of factors_w[r] * rows[r][j], for two factors w.
template <class T, int R>
OBJSLOT_INLINE void add_twice(const T* rows, int64_t stride, const T* first, const T* second, int64_t columns, T* one,
                              T* two) {
  Vec<T> a[R], b[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    a[r] = broadcast(first[r]);
    b[r] = broadcast(second[r]);
  }
  for (int64_t j = 0; j < columns; j += width<T>) {
    Vec<T> even = load(one + j), odd = load(two + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = load(rows + r * stride + j);
      even = fused(a[r], value, even);
      odd = fused(b[r], value, odd);
    }
    store(one + j, even);
    store(two + j, odd);
  }
}

// y = mass / sum; false where a sum is too small to be exact.
template <class T>
OBJSLOT_INLINE bool divide(const T* mass, T uniform, const T* sums, T limit, int64_t n, T* y) {
  Bits<T> bad{};
  for (int64_t j = 0; j < n; j += width<T>) {
    const int64_t left = n - j;
    Vec<T> share = mass ? load_upto(mass + j, left) : broadcast(uniform);
    if (left < width<T>) share = keep_first<T>(share, left);
    const Bits<T> none = share == T(0);
    const Vec<T> sum = load(sums + j);
    bad |= ~(sum > limit) & ~none;
    store(y + j, none ? Vec<T>{} : share / sum);
  }
  bool safe = true;
  for (int lane = 0; lane < width<T>; ++lane) safe &= !bad[lane];
  return safe;
}

// weights[j] = factor[j] * values[j], channels padded with zeros.
template <class T>
OBJSLOT_INLINE void scale_values(const T* values, const T* factor, int64_t n, int64_t channels, T* weights) {
  const int64_t lanes = padded<T>(channels);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> scale = broadcast(factor[j]);
    for (int64_t c = 0; c < channels; c += width<T>)
      store(weights + j * lanes + c, scale * load_upto(values + j * channels + c, channels - c));
  }
}

// R results of `count` terms each: out[r] = factor[r] * sum over k of kernel[r * row_step + k * step] * weights[k].
template <class T, int R>
OBJSLOT_INLINE void apply_rows(const T* kernel, int64_t row_step, int64_t step, const T* weights, int64_t count,
                               int64_t channels, const T* factor, int64_t wanted, T* out) {
  const int64_t lanes = padded<T>(channels);
  for (int64_t c = 0; c < channels; c += width<T>) {
    Vec<T> total[R] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Vec<T> weight = load(weights + k * lanes + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r] = fused(broadcast(kernel[r * row_step + k * step]), weight, total[r]);
    }
    const int64_t left = channels - c;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r >= wanted) break;
      const Vec<T> value = broadcast(factor[r]) * total[r];
      if (left < width<T>)
        store_first(out + r * channels + c, value, left);
      else
        store(out + r * channels + c, value);
    }
  }
}

// One pair of frames of a clip: what the first gets from the second by the scores of their tokens, which become the
// kernel matrix in place, and the second from the first. False where the scalings leave the range.
template <class T>
static bool solve_pair(const AlignmentProblem& p, int64_t clip, int64_t first, int64_t second, T* kernel,
                       int64_t stride, const PairWork<T>& w, T* forth, T* back) {
  const int64_t n = p.n, columns = padded<T>(n), channels = p.channels;
  const T* masses = static_cast<const T*>(p.masses);
  const T* row_mass = masses ? masses + (clip * p.frames + first) * n : nullptr;
  const T* column_mass = masses ? masses + (clip * p.frames + second) * n : nullptr;
  const T uniform = T(1) / T(n), scale = T(1.44269504088896340736 / p.eps);
  const auto mass_of = [&](int64_t i) { return row_mass ? row_mass[i] : uniform; };

  for (int64_t i = 0; i < n; ++i) w.offset[i] = -largest(kernel + i * stride, n) * scale;
  // The first x of the plan back; the largest is 1.
  T lowest = w.offset[0];
  for (int64_t i = 1; i < n; ++i) lowest = w.offset[i] < lowest ? w.offset[i] : lowest;
  for (int64_t i = 0; i < columns; i += width<T>)
    store(w.back.x + i, exp2<T>(broadcast(lowest) - load_upto(w.offset + i, n - i)));

  bool safe = true;
  const auto clear = [&] {
    fill(w.forth.sums, columns, T(0));
    fill(w.back.sums, columns, T(0));
  };
  const auto columns_of = [&](const Scaling<T>& s) {
    safe &= divide(column_mass, uniform, s.sums, least(s.x, n), n, s.y);
  };
  const auto add = [&](int64_t i, int64_t count) {
    const T* rows = kernel + i * stride;
    if (count == pair_rows)
      add_twice<T, pair_rows>(rows, stride, w.forth.x + i, w.back.x + i, columns, w.forth.sums, w.back.sums);
    else
      for (int64_t r = 0; r < count; ++r)
        add_twice<T, 1>(rows + r * stride, stride, w.forth.x + i + r, w.back.x + i + r, columns, w.forth.sums,
                        w.back.sums);
  };
  const auto set_row = [&](T* x, int64_t i, T total, T limit) {
    const T mass = mass_of(i);
    safe &= total > limit || mass == T(0);
    x[i] = mass == T(0) ? T(0) : mass / total;
  };

  clear();
  for (int64_t i = 0; i < n; i += pair_rows) {
    const int64_t count = n - i < pair_rows ? n - i : pair_rows;
    for (int64_t r = i; r < i + count; ++r)
      set_row(w.forth.x, r,
              sum_lanes<T>(
                  exponentiate_row<T, false>(kernel + r * stride, scale, w.offset[r], n, nullptr, kernel + r * stride)),
              T(0.25));
    add(i, count);
  }
  columns_of(w.forth);
  columns_of(w.back);
  for (int64_t t = 1; t < p.n_iters && safe; ++t) {
    const T limit = least(w.forth.y, n), back_limit = least(w.back.y, n);
    clear();
    for (int64_t i = 0; i < n; i += pair_rows) {
      const int64_t count = n - i < pair_rows ? n - i : pair_rows;
      const T* rows = kernel + i * stride;
      T totals[pair_rows], back_totals[pair_rows];
      if (count == pair_rows)
        dot_twice<T, pair_rows>(rows, stride, w.forth.y, w.back.y, columns, totals, back_totals);
      else
        for (int64_t r = 0; r < count; ++r)
          dot_twice<T, 1>(rows + r * stride, stride, w.forth.y, w.back.y, columns, totals + r, back_totals + r);
      for (int64_t r = 0; r < count; ++r) {
        set_row(w.forth.x, i + r, totals[r], limit);
        set_row(w.back.x, i + r, back_totals[r], back_limit);
      }
      add(i, count);
    }
    columns_of(w.forth);
    columns_of(w.back);
  }
  // The rows of the plan back are its columns: they are set last.
  const T limit = least(w.back.y, n);
  for (int64_t i = 0; i < n; ++i) {
    T total;
    dot_rows<T, 1>(kernel + i * stride, stride, w.back.y, columns, &total);
    set_row(w.back.x, i, total, limit);
  }
  if (!safe) return false;

  const T* values = static_cast<const T*>(p.values) + clip * p.frames * n * channels;
  scale_values(values + second * n * channels, w.forth.y, n, channels, w.weights);
  int64_t i = 0;
  for (; i + value_rows <= n; i += value_rows)
    apply_rows<T, value_rows>(kernel + i * stride, stride, 1, w.weights, n, channels, w.forth.x + i, value_rows,
                              forth + i * channels);
  for (; i < n; ++i)
    apply_rows<T, 1>(kernel + i * stride, stride, 1, w.weights, n, channels, w.forth.x + i, 1, forth + i * channels);
  scale_values(values + first * n * channels, w.back.x, n, channels, w.weights);
  // A vector is at least as wide as `half` columns, so the padding of the kernel is never left.
  constexpr int half = width<T> < value_rows ? width<T> : value_rows;
  for (int64_t j = 0; j < n; j += half)
    apply_rows<T, half>(kernel + j, 1, stride, w.weights, n, channels, w.back.y + j, n - j < half ? n - j : half,
                        back + j * channels);
  return true;
}

// The transport between two frames of a clip, as a problem of its own.
static TransportProblem pair_of(const AlignmentProblem& p, int64_t clip, int64_t first, int64_t second) {
  const Element arithmetic = p.element == Element::float64 ? Element::float64 : Element::float32;
  const auto frame = [&](const void* base, int64_t index, int64_t width_of_rows, Element element) {
    const char* bytes = static_cast<const char*>(base);
    return bytes ? bytes + (clip * p.frames + index) * p.n * width_of_rows * size_of(element) : nullptr;
  };
  TransportProblem pair{};
  pair.element = p.element;
  pair.value_element = arithmetic;
  pair.x = frame(p.tokens, first, p.features, p.element);
  pair.y = frame(p.tokens, second, p.features, p.element);
  pair.values = frame(p.values, second, p.channels, arithmetic);
  pair.a = frame(p.masses, first, 1, arithmetic);
  pair.b = frame(p.masses, second, 1, arithmetic);
  pair.batch = 1;
  pair.n = pair.m = p.n;
  pair.features = p.features;
  pair.channels = p.channels;
  pair.cosine = p.cosine;
  pair.shortest = p.shortest;
  pair.eps = p.eps;
  pair.n_iters = p.n_iters;
  pair.tol = -1;
  return pair;
}

// What a thread works in.
template <class T>
struct AlignmentWork {
  Stage<T> stage;
  PairWork<T> pair;
};

template <class T>
static AlignmentWork<T> lay_out(Arena& arena, const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles) {
  const int64_t columns = padded<T>(p.n);
  const auto scaling = [&] {
    return Scaling<T>{arena.take<T>(columns), arena.take<T>(columns), arena.take<T>(columns)};
  };
  AlignmentWork<T> w;
  w.pair = {arena.take<T>(columns), arena.take<T>(columns * padded<T>(p.channels)), scaling(), scaling()};
  w.stage = lay_out<T>(arena, pair_of(p, 0, 0, 0), sinkhorn, false, tiles, 1);
  return w;
}

// The frames whose tokens are the columns of pairs with the `partners` frames after them, around the end: every pair
// once, and pairs of neighbours in turn for frames that have one more and one less.
struct Columns {
  int64_t frame, partners;
  static OBJSLOT_INLINE_MEMBER Columns at(int64_t place, int64_t frames) {
    if (frames % 2) return {place, frames / 2};
    const int64_t frame = place / 2 + place % 2 * (frames / 2);
    return {frame, frames / 2 - place % 2};
  }
};

// Everything that some frames of a clip have a part in, into moved (target, source, n, channels).
template <class T>
static void align_columns(const AlignmentProblem& p, int64_t clip, int64_t begin, int64_t end,
                          const SinkhornTables& sinkhorn, bool tiles, AlignmentWork<T> w, T* moved) {
  const int64_t size = p.n * p.channels;
  const auto alone = [](const auto& stage) { stage(Team{}); };
  for (int64_t place = begin; place < end; ++place) {
    const Columns columns = Columns::at(place, p.frames);
    bool laid = false;
    for (int64_t step = 1; step <= columns.partners; ++step) {
      const int64_t first = (columns.frame + step) % p.frames, second = columns.frame;
      T* forth = moved + (first * p.frames + second) * size;
      T* back = moved + (second * p.frames + first) * size;
      const TransportProblem pair = pair_of(p, clip, first, second);
      point_at(pair, 0, w.stage);
      // Where they were made on vectors, those took the place of the right factor.
      laid = make_scores(pair, w.stage, tiles, laid, alone);
      bool safe;
      {
        const FlushSubnormals flush;
        safe = solve_pair(p, clip, first, second, w.stage.scores, w.stage.stride, w.pair, forth, back);
      }
      if (safe) continue;
      move(pair, {forth, nullptr}, sinkhorn, 0, w.stage, tiles, 1, alone);
      move(pair_of(p, clip, second, first), {back, nullptr}, sinkhorn, 0, w.stage, tiles, 1, alone);
      laid = false;
    }
  }
}

// What a frame gets from the others, in the order of the frames.
template <class T>
static void add_up_frame(const AlignmentProblem& p, int64_t frame, const T* moved, T* out) {
  const int64_t size = p.n * p.channels;
  for (int64_t k = 0; k < size; ++k) out[k] = 0;
  for (int64_t source = 0; source < p.frames; ++source) {
    if (source == frame) continue;
    const T* part = moved + (frame * p.frames + source) * size;
    for (int64_t k = 0; k < size; ++k) out[k] += part[k];
  }
}

template <class T>
static int64_t share_of_workspace(const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles) {
  Arena arena{nullptr};
  lay_out<T>(arena, p, sinkhorn, tiles);
  return arena.used;
}

template <class T>
static int64_t moved_bytes(const AlignmentProblem& p) {
  return (p.frames * p.frames * p.n * p.channels * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

// Whole clips for each thread, or all threads on one clip where there are fewer clips than threads.
template <class T>
static void align(const AlignmentProblem& p, T* out, const SinkhornTables& sinkhorn, bool tiles, char* base,
                  int threads) {
  const int64_t share = share_of_workspace<T>(p, sinkhorn, tiles), moved_size = moved_bytes<T>(p);
  const int64_t frame = p.n * p.channels;
  const auto work = [&](int worker) {
    Arena arena{base + worker * share};
    return lay_out<T>(arena, p, sinkhorn, tiles);
  };
  const auto moved_of = [&](int64_t index) {
    return reinterpret_cast<T*>(base + threads * share + index * moved_size);
  };
  if (p.clips < threads) {
    for (int64_t clip = 0; clip < p.clips; ++clip) {
      parallel_for(p.frames, threads, [&](int64_t begin, int64_t end, int worker) {
        align_columns(p, clip, begin, end, sinkhorn, tiles, work(worker), moved_of(0));
      });
      parallel_for(p.frames, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t index = begin; index < end; ++index)
          add_up_frame(p, index, moved_of(0), out + (clip * p.frames + index) * frame);
      });
    }
    return;
  }
  parallel_for(p.clips, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t clip = begin; clip < end; ++clip) {
      align_columns(p, clip, 0, p.frames, sinkhorn, tiles, work(worker), moved_of(worker));
      for (int64_t index = 0; index < p.frames; ++index)
        add_up_frame(p, index, moved_of(worker), out + (clip * p.frames + index) * frame);
    }
  });
}

static int64_t workspace(const AlignmentProblem& p, const SinkhornTables& sinkhorn, bool tiles, int threads) {
  if (p.element == Element::float64)
    return threads * (share_of_workspace<double>(p, sinkhorn, tiles) + moved_bytes<double>(p));
  return threads * (share_of_workspace<float>(p, sinkhorn, tiles) + moved_bytes<float>(p));
}

static void run(const AlignmentProblem& p, void* out, const SinkhornTables& sinkhorn, bool tiles, void* workspace,
                int threads) {
  char* base = static_cast<char*>(workspace);
  p.element == Element::float64 ? align(p, static_cast<double*>(out), sinkhorn, tiles, base, threads)
                                : align(p, static_cast<float*>(out), sinkhorn, tiles, base, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(AlignmentKernels, workspace, run)
