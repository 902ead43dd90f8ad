// Both plans of a pair of frames from one kernel matrix, applied to the values and never stored.
//
// With K = exp(scores / eps), one plan sets the rows first, the other one, on the transposed scores, the columns.
// Both iterations are sums over the rows and the columns of the same K, so that one sweep serves both, and K is
// exponentiated once, with the maximum of every row taken out: the second plan then starts from x = e^maximum
// in place of x = 1.
#include "objslot/transport_pairs.h"

#include "sinkhorn_rows.h"
#include "tile_products.h"
#include "token_lengths.h"

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
  T* kernel;   // (n, columns)
  T* offset;   // (n)
  T* weights;  // (columns, lanes of the channels)
  T* scores;   // (n, columns), where they are made here, both rounded up to 32
  Scaling<T> forth, back;
};

// The side of a matrix of whole tiles.
OBJSLOT_INLINE int64_t whole(int64_t n) { return (n + 31) / 32 * 32; }

template <class T>
static PairWork<T> lay_out(Arena& arena, const PairsProblem& p) {
  const int64_t columns = padded<T>(p.n);
  const auto scaling = [&] {
    return Scaling<T>{arena.take<T>(columns), arena.take<T>(columns), arena.take<T>(columns)};
  };
  return {arena.take<T>(p.n * columns),
          arena.take<T>(columns),
          arena.take<T>(columns * padded<T>(p.channels)),
          p.scores ? nullptr : arena.take<T>(whole(p.n) * whole(p.n)),
          scaling(),
          scaling()};
}

// The least sum that still holds every term that counts: see sinkhorn.kernel.cpp.
template <class T>
constexpr T range_limit = sizeof(T) == 4 ? T(1.26217745e-29) : T(1e-288);

template <class T>
OBJSLOT_INLINE T least(const T* weights, int64_t count) {
  return largest(weights, count) * T(count) * range_limit<T>;
}

// products[w][r] = sum over j of rows[r][j] * weights_w[j], for two weights w.
template <class T, int R>
OBJSLOT_INLINE void dot_twice(const T* rows, const T* first, const T* second, int64_t columns, T* one,
                              T* two) {
  Vec<T> even[R] = {}, odd[R] = {};
  for (int64_t j = 0; j < columns; j += width<T>) {
    const Vec<T> a = load(first + j), b = load(second + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = load(rows + r * columns + j);
      even[r] = fused(a, value, even[r]);
      odd[r] = fused(b, value, odd[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    one[r] = sum_lanes<T>(even[r]);
    two[r] = sum_lanes<T>(odd[r]);
  }
}

// sums_w[j] += sum over r of factors_w[r] * rows[r][j], for two factors w.
template <class T, int R>
OBJSLOT_INLINE void add_twice(const T* rows, const T* first, const T* second, int64_t columns, T* one,
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
      const Vec<T> value = load(rows + r * columns + j);
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
      for (int r = 0; r < R; ++r)
        total[r] = fused(broadcast(kernel[r * row_step + k * step]), weight, total[r]);
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

// One pair; false where the scalings leave the range.
template <class T>
static bool solve_pair(const PairsProblem& p, const PairsResult& result, int64_t pair, const T* scores,
                       int64_t stride, const PairWork<T>& w) {
  const int64_t n = p.n, columns = padded<T>(n), channels = p.channels;
  const T* masses = static_cast<const T*>(p.masses);
  const T* row_mass = masses ? masses + p.firsts[pair] * n : nullptr;
  const T* column_mass = masses ? masses + p.seconds[pair] * n : nullptr;
  const T uniform = T(1) / T(n), scale = T(1.44269504088896340736 / p.eps);
  const auto mass_of = [&](int64_t i) { return row_mass ? row_mass[i] : uniform; };

  for (int64_t i = 0; i < n; ++i) w.offset[i] = -largest(scores + i * stride, n) * scale;
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
    const T* kernel = w.kernel + i * columns;
    if (count == pair_rows)
      add_twice<T, pair_rows>(kernel, w.forth.x + i, w.back.x + i, columns, w.forth.sums, w.back.sums);
    else
      for (int64_t r = 0; r < count; ++r)
        add_twice<T, 1>(kernel + r * columns, w.forth.x + i + r, w.back.x + i + r, columns, w.forth.sums,
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
              exponentiate_row<T, false>(scores + r * stride, scale, w.offset[r], n, nullptr,
                                         w.kernel + r * columns),
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
      const T* kernel = w.kernel + i * columns;
      T totals[pair_rows], back_totals[pair_rows];
      if (count == pair_rows)
        dot_twice<T, pair_rows>(kernel, w.forth.y, w.back.y, columns, totals, back_totals);
      else
        for (int64_t r = 0; r < count; ++r)
          dot_twice<T, 1>(kernel + r * columns, w.forth.y, w.back.y, columns, totals + r, back_totals + r);
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
    dot_rows<T, 1>(w.kernel + i * columns, columns, w.back.y, columns, &total);
    set_row(w.back.x, i, total, limit);
  }
  if (!safe) return false;

  const T* values = static_cast<const T*>(p.values);
  T* forth = static_cast<T*>(result.forth) + pair * n * channels;
  T* back = static_cast<T*>(result.back) + pair * n * channels;
  scale_values(values + p.seconds[pair] * n * channels, w.forth.y, n, channels, w.weights);
  int64_t i = 0;
  for (; i + value_rows <= n; i += value_rows)
    apply_rows<T, value_rows>(w.kernel + i * columns, columns, 1, w.weights, n, channels, w.forth.x + i,
                                value_rows, forth + i * channels);
  for (; i < n; ++i)
    apply_rows<T, 1>(w.kernel + i * columns, columns, 1, w.weights, n, channels, w.forth.x + i, 1,
                     forth + i * channels);
  scale_values(values + p.firsts[pair] * n * channels, w.back.x, n, channels, w.weights);
  // A vector is at least as wide as `half` columns, so the padding of the kernel is never left.
  constexpr int half = width<T> < value_rows ? width<T> : value_rows;
  for (int64_t j = 0; j < n; j += half)
    apply_rows<T, half>(w.kernel + j, 1, columns, w.weights, n, channels, w.back.y + j,
                        n - j < half ? n - j : half, back + j * channels);
  return true;
}

template <class T>
static int64_t share_of_workspace(const PairsProblem& p) {
  Arena arena{nullptr};
  lay_out<T>(arena, p);
  return arena.used;
}

#ifdef OBJSLOT_TILES
// Tokens of one frame, brought to length one, as the left and as the right factor of a product.
static void lay_frame(const PairsProblem& p, int64_t frame, float* factor, uint16_t* rows, uint16_t* columns) {
  const float* tokens = p.tokens + frame * p.n * p.features;
  for (int64_t i = 0; i < p.n; ++i) factor[i] = inverse_length(tokens + i * p.features, p.features, p.shortest);
  const Numbers units{tokens, p.features, p.n, p.features, factor};
  for (int64_t block = 0; block < whole_tiles(p.n) / tile_rows; ++block) {
    lay_rows<Element::float32, 3>(units, 0, block, rows);
    lay_transposed_columns<Element::float32, 3>(units, block, columns);
  }
}
#endif

template <class T>
static void solve(const PairsProblem& p, const PairsResult& result, void* workspace, int threads) {
  const int64_t share = share_of_workspace<T>(p);
  char* base = static_cast<char*>(workspace);
#ifdef OBJSLOT_TILES
  const int64_t size = operand_size(p.n, p.features, 3);
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(base + threads * share);
  if (!p.scores)
    parallel_for(p.frames, threads, [&](int64_t begin, int64_t end, int worker) {
      // The offsets of a pair are not in use yet.
      float* factor = reinterpret_cast<float*>(base + worker * share);
      for (int64_t frame = begin; frame < end; ++frame)
        lay_frame(p, frame, factor, tiles + 2 * frame * size, tiles + (2 * frame + 1) * size);
    });
#endif
  parallel_for(p.pairs, threads, [&](int64_t begin, int64_t end, int worker) {
    const FlushSubnormals flush;
    Arena arena{base + worker * share};
    const PairWork<T> w = lay_out<T>(arena, p);
    for (int64_t pair = begin; pair < end; ++pair) {
      const T* scores = static_cast<const T*>(p.scores) + pair * p.n * p.n;
      int64_t stride = p.n;
#ifdef OBJSLOT_TILES
      if constexpr (sizeof(T) == 4)
        if (!p.scores) {
          scores = w.scores;
          stride = whole(p.n);
          multiply_tiles<3, 3>(tiles + 2 * p.firsts[pair] * size, tiles + (2 * p.seconds[pair] + 1) * size, stride,
                               stride, depth_blocks(p.features), w.scores, stride);
        }
#endif
      result.lost[pair] = !solve_pair<T>(p, result, pair, scores, stride, w);
    }
  });
}

static int64_t workspace(const PairsProblem& p, int threads) {
  int64_t bytes = threads * (p.wide ? share_of_workspace<double>(p) : share_of_workspace<float>(p));
#ifdef OBJSLOT_TILES
  if (!p.scores) bytes += p.frames * 2 * operand_size(p.n, p.features, 3) * static_cast<int64_t>(sizeof(uint16_t));
#endif
  return bytes;
}

static void run(const PairsProblem& p, const PairsResult& result, void* workspace, int threads) {
  p.wide ? solve<double>(p, result, workspace, threads) : solve<float>(p, result, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(PairsKernels, workspace, run)
