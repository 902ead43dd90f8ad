// Softmax over slots, masked and normalised over positions, forward and backward; positions are the lanes.
#include "half_types.h"
#include "objslot/slot_attention.h"
#include "objslot/threads.h"
#include "vector_functions.h"

namespace objslot::OBJSLOT_ISA {

template <class T>
static int64_t scratch_rows(const SlotSoftmaxProblem& p) {
  return 2 * p.slots + 4;
}

// The matrix (slots, positions) of one group in rows of whole vectors, zeros beyond the positions.
template <class T>
OBJSLOT_INLINE void read_padded(const void* base, Element element, int64_t offset, int64_t count, int64_t columns,
                                T* row) {
  const T* source = read_row<T>(base, element, offset, count, row);
  if (source != row && count > 0) __builtin_memcpy(row, source, static_cast<size_t>(count) * sizeof(T));
  for (int64_t j = count; j < columns; ++j) row[j] = T(0);
}

// rows: logits to probabilities over the slots.
template <class T>
static void softmax_slots(T* rows, int64_t slots, int64_t columns) {
  constexpr T log2_of_e = T(1.44269504088896340736);
  for (int64_t j = 0; j < columns; j += width<T>) {
    Vec<T> top = load(rows + j);
    for (int64_t i = 1; i < slots; ++i) top = larger(load(rows + i * columns + j), top);
    Vec<T> total{};
    for (int64_t i = 0; i < slots; ++i) {
      const Vec<T> power = exp2<T>((load(rows + i * columns + j) - top) * log2_of_e);
      store(rows + i * columns + j, power);
      total += power;
    }
    const Vec<T> inverse = T(1) / total;
    for (int64_t i = 0; i < slots; ++i) store(rows + i * columns + j, load(rows + i * columns + j) * inverse);
  }
}

// One where a position counts, and zero beyond the last; or the mask.
template <class T>
static void read_mask(const SlotSoftmaxProblem& p, int64_t item, int64_t columns, T* mask) {
  if (p.mask) return read_padded<T>(p.mask, p.element, item * p.positions, p.positions, columns, mask);
  for (int64_t j = 0; j < columns; ++j) mask[j] = j < p.positions ? T(1) : T(0);
}

template <class T>
OBJSLOT_INLINE void write_out(const T* row, void* base, Element element, int64_t offset, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (element != Element::float32) return write_half_row(row, base, element, offset, count);
  }
  if (count > 0) __builtin_memcpy(static_cast<T*>(base) + offset, row, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
static void forward_item(const SlotSoftmaxProblem& p, void* weights, void* mass, T* scratch, int64_t item) {
  const int64_t columns = padded<T>(p.positions);
  T *rows = scratch, *mask = scratch + p.slots * columns;
  for (int64_t i = 0; i < p.slots; ++i)
    read_padded<T>(p.logits, p.element, (item * p.slots + i) * p.positions, p.positions, columns, rows + i * columns);
  read_mask<T>(p, item, columns, mask);
  softmax_slots<T>(rows, p.slots, columns);
  for (int64_t i = 0; i < p.slots; ++i) {
    T* row = rows + i * columns;
    Vec<T> total{};
    for (int64_t j = 0; j < columns; j += width<T>) {
      const Vec<T> factor = load(mask + j);
      const Vec<T> weight = factor == T(0) ? Vec<T>{} : (load(row + j) + T(p.eps)) * factor;
      store(row + j, weight);
      total += weight;
    }
    const T sum = sum_lanes<T>(total), inverse = sum == T(0) ? T(0) : T(1) / sum;
    for (int64_t j = 0; j < columns; j += width<T>) store(row + j, load(row + j) * inverse);
    static_cast<T*>(mass)[item * p.slots + i] = sum;
    write_out<T>(row, weights, p.element, (item * p.slots + i) * p.positions, p.positions);
  }
}

template <class T>
static void backward_item(const SlotSoftmaxProblem& p, const void* grad, const void* mass, void* grad_logits,
                          void* grad_mask, T* scratch, int64_t item) {
  const int64_t columns = padded<T>(p.positions);
  T *rows = scratch, *slopes = rows + p.slots * columns, *mask = slopes + p.slots * columns;
  T *inner = mask + columns, *mask_slope = inner + columns;
  for (int64_t i = 0; i < p.slots; ++i)
    read_padded<T>(p.logits, p.element, (item * p.slots + i) * p.positions, p.positions, columns, rows + i * columns);
  read_mask<T>(p, item, columns, mask);
  softmax_slots<T>(rows, p.slots, columns);
  for (int64_t j = 0; j < columns; ++j) inner[j] = mask_slope[j] = T(0);
  for (int64_t i = 0; i < p.slots; ++i) {
    const T* row = rows + i * columns;
    T* slope = slopes + i * columns;
    read_padded<T>(grad, p.element, (item * p.slots + i) * p.positions, p.positions, columns, slope);
    const T sum = static_cast<const T*>(mass)[item * p.slots + i], inverse = sum == T(0) ? T(0) : T(1) / sum;
    Vec<T> total{};
    for (int64_t j = 0; j < columns; j += width<T>) {
      const Vec<T> factor = load(mask + j);
      total += factor == T(0) ? Vec<T>{} : load(slope + j) * (load(row + j) + T(p.eps)) * factor;
    }
    const T centre = sum_lanes<T>(total) * inverse;
    for (int64_t j = 0; j < columns; j += width<T>) {
      const Vec<T> factor = load(mask + j), probability = load(row + j);
      const Vec<T> value = (load(slope + j) - centre) * inverse;
      const Vec<T> part = factor == T(0) ? Vec<T>{} : value * (probability + T(p.eps));
      const Vec<T> product = factor == T(0) ? Vec<T>{} : value * factor * probability;
      store(mask_slope + j, load(mask_slope + j) + part);
      store(inner + j, load(inner + j) + product);
      store(slope + j, product);
    }
  }
  for (int64_t i = 0; i < p.slots; ++i) {
    T* slope = slopes + i * columns;
    for (int64_t j = 0; j < columns; j += width<T>) {
      const Vec<T> value = load(slope + j) - load(rows + i * columns + j) * load(inner + j);
      store(slope + j, load(mask + j) == T(0) ? Vec<T>{} : value);
    }
    write_out<T>(slope, grad_logits, p.element, (item * p.slots + i) * p.positions, p.positions);
  }
  if (grad_mask) write_out<T>(mask_slope, grad_mask, p.element, item * p.positions, p.positions);
}

template <class T>
OBJSLOT_INLINE int64_t scratch_size(const SlotSoftmaxProblem& p) {
  return (scratch_rows<T>(p) * padded<T>(p.positions) * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

static int64_t workspace(const SlotSoftmaxProblem& p, int threads) {
  return threads * (p.element == Element::float64 ? scratch_size<double>(p) : scratch_size<float>(p));
}

template <class T, class Item>
OBJSLOT_INLINE void run(const SlotSoftmaxProblem& p, void* workspace, int threads, const Item& item) {
  const int64_t size = scratch_size<T>(p);
  parallel_for(p.count, threads, [&](int64_t first, int64_t last, int worker) {
    const FlushSubnormals flush;
    T* scratch = reinterpret_cast<T*>(static_cast<char*>(workspace) + worker * size);
    for (int64_t index = first; index < last; ++index) item(scratch, index);
  });
}

static void forward(const SlotSoftmaxProblem& p, void* weights, void* mass, void* workspace, int threads) {
  if (p.element == Element::float64)
    run<double>(p, workspace, threads, [&](double* s, int64_t i) { forward_item<double>(p, weights, mass, s, i); });
  else
    run<float>(p, workspace, threads, [&](float* s, int64_t i) { forward_item<float>(p, weights, mass, s, i); });
}

static void backward(const SlotSoftmaxProblem& p, const void* grad, const void* mass, void* grad_logits,
                     void* grad_mask, void* workspace, int threads) {
  if (p.element == Element::float64)
    run<double>(p, workspace, threads,
                [&](double* s, int64_t i) { backward_item<double>(p, grad, mass, grad_logits, grad_mask, s, i); });
  else
    run<float>(p, workspace, threads,
               [&](float* s, int64_t i) { backward_item<float>(p, grad, mass, grad_logits, grad_mask, s, i); });
}

}  // namespace objslot::OBJSLOT_ISA

OBJSLOT_KERNELS(SlotSoftmaxKernels, workspace, forward, backward)
