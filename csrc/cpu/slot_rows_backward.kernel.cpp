// Rows of slots backward: from the gradient of an iteration's slots to that of its averages, and from that of its
// queries to that of the slots it started from.
#include "slot_rows.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
struct BackScratch {
  T *middle, *grad;
  Moments<T>* moments;
  uint32_t* words;
};

template <class T>
static BackScratch<T> back_scratch(const SlotRows& p, int threads, Shelf& shelf) {
  const int64_t rows = block_rows(p, threads);
  BackScratch<T> s;
  s.middle = shelf.take<T>(rows * padded<T>(p.width));
  s.grad = shelf.take<T>(rows * padded<T>(p.width));
  s.moments = shelf.take<Moments<T>>(rows);
  int64_t inner = p.hidden > p.input_width ? p.hidden : p.input_width;
  const int64_t widest = p.layers.input_gates ? 3 * p.width : p.width;
  if (inner < widest) inner = widest;
  s.words = shelf.take<uint32_t>(operand_size(p, rows, inner));
  return s;
}

// The gradient of a norm's inputs from that of its outputs, rows (rows, padded width), in place; adds up the
// gradients of weight and bias over every chunk of rows.
template <class T>
static void back_through_norm(const T* rows, int64_t stride, const Moments<T>* moments, const T* weight, int64_t count,
                              int64_t columns, T* grad, int64_t grad_stride, T* weight_sums, T* bias_sums) {
  for (int64_t j = 0; j < count; ++j) {
    if (j % row_chunk == 0) {
      clear(weight_sums + j / row_chunk * columns, columns);
      clear(bias_sums + j / row_chunk * columns, columns);
    }
    const T* row = rows + j * stride;
    T* slope = grad + j * grad_stride;
    T* weight_sum = weight_sums + j / row_chunk * columns;
    T* bias_sum = bias_sums + j / row_chunk * columns;
    const Moments<T> m = moments[j];
    Vec<T> sum{}, inner{};
    for (int64_t d = 0; d < columns; d += width<T>) {
      const int64_t left = columns - d;
      // Lanes past the end: the gradient and the weight are zero there, whatever the row gives.
      const Vec<T> value = (load_upto(row + d, left) - m.mean) * m.inverse, upper = load_upto(slope + d, left);
      store_upto(weight_sum + d, fused(upper, value, load_upto(weight_sum + d, left)), left);
      store_upto(bias_sum + d, upper + load_upto(bias_sum + d, left), left);
      const Vec<T> inside = upper * load_upto(weight + d, left);
      sum += inside;
      inner = fused(inside, value, inner);
    }
    const T mean = sum_lanes<T>(sum) / T(columns), tilt = sum_lanes<T>(inner) / T(columns);
    for (int64_t d = 0; d < columns; d += width<T>) {
      const int64_t left = columns - d;
      const Vec<T> value = (load_upto(row + d, left) - m.mean) * m.inverse;
      const Vec<T> inside = load_upto(slope + d, left) * load_upto(weight + d, left);
      store_upto(slope + d, (inside - mean - value * tilt) * m.inverse, left);
    }
  }
}

// What the iteration's slots were before the MLP.
template <class T>
static void make_middle(const SlotRows& p, const T* slots, const T* updates, const T* gates, int64_t rows, T* middle,
                        int64_t stride) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < p.width; d += width<T>) {
      const int64_t left = p.width - d, at = j * p.width + d;
      const Vec<T> before = load_upto(slots + at, left);
      Vec<T> value = before;
      if (gates) {
        const T* gate = gates + j * 4 * p.width + d;
        const Vec<T> z = load_upto(gate + p.width, left), n = load_upto(gate + 2 * p.width, left);
        value = fused(z, before - n, n);
      } else {
        value += load_upto(updates + at, left);
      }
      store(middle + j * stride + d, value);
    }
}

// grad: gradient of the GRU's answer. Writes those of its gates before their functions, and of z's shortcut.
template <class T>
static void back_through_gates(const SlotRows& p, const T* slots, const T* gates, const T* grad, int64_t stride,
                               int64_t rows, T* grad_gates, T* grad_start) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < p.width; d += width<T>) {
      const int64_t left = p.width - d, at = j * p.width + d;
      const T* gate = gates + j * 4 * p.width + d;
      T* out = grad_gates + j * 4 * p.width + d;
      const Vec<T> r = load_upto(gate, left), z = load_upto(gate + p.width, left);
      const Vec<T> n = load_upto(gate + 2 * p.width, left), hidden = load_upto(gate + 3 * p.width, left);
      const Vec<T> upper = load(grad + j * stride + d), before = load_upto(slots + at, left);
      const Vec<T> slope = upper * (T(1) - z) * (T(1) - n * n);
      store_upto(out, slope * hidden * r * (T(1) - r), left);
      store_upto(out + p.width, upper * (before - n) * z * (T(1) - z), left);
      store_upto(out + 2 * p.width, slope, left);
      store_upto(out + 3 * p.width, slope * r, left);
      store_upto(grad_start + at, upper * z, left);
    }
}

template <class T>
static void means_block(const SlotRows& p, const SlotRowsGradient& b, const BackScratch<T>& s, int64_t first,
                        int64_t rows, T* grad_means, T* query, T* constant, void* const* norm_sums) {
  const int64_t stride = padded<T>(p.width), chunk = first / row_chunk * p.width;
  const auto given = [&](const void* base, int64_t columns) {
    return base ? static_cast<const T*>(base) + first * columns : nullptr;
  };
  const auto wanted = [&](void* base, int64_t columns) {
    return base ? static_cast<T*>(base) + first * columns : nullptr;
  };
  const T* slots = given(b.kept.slots, p.width);
  const T* mass = given(b.kept.mass, 1);
  const T* gates = given(b.kept.gates, 4 * p.width);
  const T* grad_slots = given(b.grad_slots, p.width);
  T* updates = wanted(b.updates, p.width);
  T* normed = wanted(b.normed_mlp, p.width);
  T* hidden = wanted(b.hidden, p.hidden);
  T* grad_hidden = wanted(b.grad_hidden, p.hidden);
  T* grad_updates = wanted(b.grad_updates, p.width);
  T* grad_gates = wanted(b.grad_gates, 4 * p.width);
  T* grad_start = wanted(b.grad_start, p.width);
  if (T* const upper = wanted(b.upper, p.width)) {
    __builtin_memcpy(upper, grad_slots, static_cast<size_t>(rows * p.width) * sizeof(T));
    grad_slots = upper;
  }

  make_updates<T>(p, given(b.kept.means, p.input_width), mass, rows, updates, p.width, s.words);
  make_middle<T>(p, slots, updates, gates, rows, s.middle, stride);
  for (int64_t j = 0; j < rows; ++j) {
    s.moments[j] = moments<T>(s.middle + j * stride, p.width, T(p.mlp_eps));
    normalise<T>(s.middle + j * stride, p.width, s.moments[j], static_cast<const T*>(p.layers.norm_mlp),
                 static_cast<const T*>(p.layers.norm_mlp_bias), normed + j * p.width);
  }
  const auto factor = [&](const T* data, int64_t columns, int64_t inner) {
    return operand<T>(p, data, columns, rows, inner, s.words);
  };
  multiply<T>(p, p.mlp_in, factor(normed, p.width, p.width), static_cast<const T*>(p.layers.mlp_in_bias), hidden,
              p.hidden, false);
  multiply<T>(p, p.mlp_out_back, factor(grad_slots, p.width, p.width), nullptr, grad_hidden, p.hidden, false);
  for (int64_t at = 0; at < rows * p.hidden; at += width<T>) {
    const int64_t left = rows * p.hidden - at;
    const Vec<T> value = load_upto(hidden + at, left), slope = load_upto(grad_hidden + at, left);
    store_upto(grad_hidden + at, value <= T(0) ? Vec<T>{} : slope, left);
    store_upto(hidden + at, larger(Vec<T>{}, value), left);
  }
  multiply<T>(p, p.mlp_in_back, factor(grad_hidden, p.hidden, p.hidden), nullptr, s.grad, stride, false);
  back_through_norm<T>(s.middle, stride, s.moments, static_cast<const T*>(p.layers.norm_mlp), rows, p.width, s.grad,
                       stride, static_cast<T*>(norm_sums[0]) + chunk, static_cast<T*>(norm_sums[1]) + chunk);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < p.width; d += width<T>) {
      T* at = s.grad + j * stride + d;
      store(at, load(at) + load_upto(grad_slots + j * p.width + d, p.width - d));
    }
  if (gates) {
    const int64_t all = 4 * p.width;
    back_through_gates<T>(p, slots, gates, s.grad, stride, rows, grad_gates, grad_start);
    multiply<T>(p, p.input_gates_back, factor(grad_gates, all, 3 * p.width), nullptr, grad_updates, p.width, false);
    multiply<T>(p, p.hidden_gates_back[0], factor(grad_gates, all, 2 * p.width), nullptr, grad_start, p.width, true);
    multiply<T>(p, p.hidden_gates_back[1], factor(grad_gates + 3 * p.width, all, p.width), nullptr, grad_start, p.width,
                true);
  } else {
    for (int64_t j = 0; j < rows; ++j) {
      __builtin_memcpy(grad_updates + j * p.width, s.grad + j * stride, static_cast<size_t>(p.width) * sizeof(T));
      __builtin_memcpy(grad_start + j * p.width, s.grad + j * stride, static_cast<size_t>(p.width) * sizeof(T));
    }
  }
  for (int64_t j = 0; j < rows; ++j)
    if (mass[j] == T(0)) clear(grad_updates + j * p.width, p.width);
  multiply<T>(p, p.value_back, factor(grad_updates, p.width, p.width), nullptr, grad_means, p.input_width, false);
  make_queries<T>(p, slots, rows, wanted(b.normed_slots, p.width), p.width, query, constant, s.words);
}

template <class T>
static void run_to_means(const SlotRows& p, const SlotRowsGradient& b, void* grad_means, void* query, void* constant,
                         void* const* norm_sums, void* workspace, int threads) {
  Shelf counter{nullptr};
  back_scratch<T>(p, threads, counter);
  for_blocks(p, threads, [&](int64_t first, int64_t rows, int worker) {
    const FlushSubnormals flush;
    Shelf shelf{static_cast<char*>(workspace) + worker * counter.used};
    const BackScratch<T> s = back_scratch<T>(p, threads, shelf);
    means_block<T>(p, b, s, first, rows, static_cast<T*>(grad_means) + first * p.input_width,
                   static_cast<T*>(query) + first * p.input_width, static_cast<T*>(constant) + first, norm_sums);
  });
}

template <class T>
static void run_to_start(const SlotRows& p, const SlotRowsGradient& b, void* const* norm_sums, void* workspace,
                         int threads) {
  Shelf counter{nullptr};
  back_scratch<T>(p, threads, counter);
  const T* last = static_cast<const T*>(p.layers.query) + p.input_width * p.width;
  const int64_t stride = padded<T>(p.width);
  for_blocks(p, threads, [&](int64_t first, int64_t rows, int worker) {
    const FlushSubnormals flush;
    Shelf shelf{static_cast<char*>(workspace) + worker * counter.used};
    const BackScratch<T> s = back_scratch<T>(p, threads, shelf);
    const T* slots = static_cast<const T*>(b.kept.slots) + first * p.width;
    T* constant = static_cast<T*>(b.grad_constant) + first;
    T* grad_start = static_cast<T*>(b.grad_start) + first * p.width;
    const Operand<T> grad_query = operand<T>(p, static_cast<const T*>(b.grad_query) + first * p.input_width,
                                             p.input_width, rows, p.input_width, s.words);
    multiply<T>(p, p.query_back, grad_query, nullptr, s.grad, stride, false);
    for (int64_t j = 0; j < rows; ++j) {
      s.moments[j] = moments<T>(slots + j * p.width, p.width, T(p.slots_eps));
      constant[j] *= T(p.scale);
      T* grad = s.grad + j * stride;
      for (int64_t d = 0; d < p.width; ++d) grad[d] += constant[j] * last[d];
    }
    back_through_norm<T>(slots, p.width, s.moments, static_cast<const T*>(p.layers.norm_slots), rows, p.width, s.grad,
                         stride, static_cast<T*>(norm_sums[0]) + first / row_chunk * p.width,
                         static_cast<T*>(norm_sums[1]) + first / row_chunk * p.width);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t d = 0; d < p.width; ++d) grad_start[j * p.width + d] += s.grad[j * stride + d];
  });
}

static int64_t back_workspace(const SlotRows& p, int threads) {
  Shelf shelf{nullptr};
  if (p.element == Element::float64)
    back_scratch<double>(p, threads, shelf);
  else
    back_scratch<float>(p, threads, shelf);
  return threads * shelf.used;
}

static int64_t chunks(int64_t rows) { return (rows + row_chunk - 1) / row_chunk; }

static void to_means(const SlotRows& p, const SlotRowsGradient& b, void* grad_means, void* query, void* constant,
                     void* const* norm_sums, void* workspace, int threads) {
  if (p.element == Element::float64)
    run_to_means<double>(p, b, grad_means, query, constant, norm_sums, workspace, threads);
  else
    run_to_means<float>(p, b, grad_means, query, constant, norm_sums, workspace, threads);
}

static void to_start(const SlotRows& p, const SlotRowsGradient& b, void* const* norm_sums, void* workspace,
                     int threads) {
  if (p.element == Element::float64)
    run_to_start<double>(p, b, norm_sums, workspace, threads);
  else
    run_to_start<float>(p, b, norm_sums, workspace, threads);
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotRowsBackwardKernels, back_workspace, chunks, to_means, to_start)
