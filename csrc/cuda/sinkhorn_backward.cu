// The exact gradient of the truncated iteration, on matrices that stay in shared memory.
//
// Iterations are undone from the last to the first. With `now` the plan after an iteration and `before` the one
// between its halves, over rows i and columns j:
//
//     share = grad_g / b            start = grad_f in the last iteration, otherwise 0
//     factor = (start - sum over j of now * share) / sum over j of before
//     grad_g of the iteration before = -(sum over i of before * factor)
//     grad_scores = (plan * grad_plan - sum over the iterations of (now * share + before * factor)) / eps
//
// The sum of grad_g is the same before every iteration but the last, for the columns of a plan have exactly their
// masses: that of grad_f less that of grad_g at the start. No iteration damps an error of it, so it is set anew
// each time, or it would grow with them.
//
// One exponential, with the larger of the two column potentials, serves now and before.
#include "sinkhorn.cuh"

namespace objslot::cuda {
namespace {

// The column potentials of one iteration as weights of one exponential.
struct Columns {
  float shift[columns_of_lane], now[columns_of_lane], before[columns_of_lane];

  // `now` is the weight of the plan after the iteration; the caller multiplies it with the shares.
  __device__ Columns(const History& history, const Problem& p, int64_t step, int64_t index, int lane) {
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const int j = lane + lanes * k;
      const bool inside = j < p.m;
      const float g = inside ? history.g[(step * p.batch + index) * p.m + j] : nothing();
      const float earlier =
          !inside ? nothing() : step ? history.g[((step - 1) * p.batch + index) * p.m + j] : 0.f;
      shift[k] = fmaxf(g, earlier);
      const float base = shift[k] == nothing() ? 0.f : shift[k];
      now[k] = power(g - base);
      before[k] = power(earlier - base);
      // NaN is no larger than anything, and must spread all the same.
      if (isnan(g + earlier)) shift[k] = now[k] = before[k] = g + earlier;
    }
  }
};

template <class E, int Blocks>
__global__ void __launch_bounds__(threads, 1) backward(Problem p, Gradient gradient, int capacity) {
  unsigned char* memory = shared_memory();
  Board& board = *reinterpret_cast<Board*>(memory);
  const Team<Blocks> team(board);
  const float scale = static_cast<float>(1.4426950408889634 / p.eps);
  const float inverse_eps = static_cast<float>(1 / p.eps);
  const History& history = gradient.history;
  for (int64_t index = blockIdx.x / Blocks; index < p.batch; index += gridDim.x / Blocks) {
    const Rows<E> rows =
        take_rows<E, Blocks>(p, index, team, reinterpret_cast<E*>(memory + sizeof(Board)), capacity);
    const int64_t count = history.count[index];
    const E* upper = static_cast<const E*>(gradient.grad_plan);
    if (upper) upper += index * gradient.grad_batch_stride + rows.first * gradient.grad_row_stride;
    const auto upper_at = [&](int row, int j) {
      return widen(upper[row * gradient.grad_row_stride + j * gradient.grad_column_stride]);
    };
    const float* last_f = history.f + ((count - 1) * p.batch + index) * p.n + rows.first;
    const float* last_g = history.g + ((count - 1) * p.batch + index) * p.m;
    float grad_g[columns_of_lane], grad_b[columns_of_lane], mass_b[columns_of_lane], surplus = 0.f;
    float* start_f = board.f[0];
    float* grad_a = board.row_sums;
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) grad_g[k] = grad_b[k] = 0.f;
    for (int row = team.warp; row < rows.count; row += warps) {
      float total = 0.f;
      if (upper) {
        float value[columns_of_lane];
        rows.read(row, team.lane, value);
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) {
          const int j = team.lane + lanes * k;
          if (j >= p.m) continue;
          const float product = power(fmaf(value[k], scale, last_f[row]) + last_g[j]) * upper_at(row, j);
          total += product;
          grad_g[k] += product;
        }
        total = warp_sum(total);
      }
      if (team.lane == 0) {
        const float start = gradient.grad_f ? gradient.grad_f[index * p.n + rows.first + row] : 0.f;
        if (last_f[row] != nothing()) surplus += start;
        start_f[row] = total + start;
        grad_a[row] = 0.f;
      }
    }
    team.sum_columns(grad_g, surplus);
    float added = 0.f, mass = 0.f;
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const int j = team.lane + lanes * k;
      if (gradient.grad_g && j < p.m) {
        const float start = gradient.grad_g[index * p.m + j];
        if (last_g[j] != nothing()) added += start;
        grad_g[k] += start;
      }
      mass_b[k] = j >= p.m ? 0.f : p.b ? p.b[index * p.b_stride + j] : 1.f / static_cast<float>(p.m);
    }
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k)
      if (mass_b[k] != 0.f) mass += mass_b[k];
    surplus -= warp_sum(added);
    mass = warp_sum(mass);
    for (int64_t step = count - 1; step >= 0; --step) {
      const int64_t slot = step * p.batch + index;
      Columns columns(history, p, step, index, team.lane);
      float collected[columns_of_lane];
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) {
        const int j = team.lane + lanes * k;
        const bool masked = j >= p.m || mass_b[k] == 0.f || history.g[slot * p.m + j] == nothing();
        const float share = masked ? 0.f : grad_g[k] / mass_b[k];
        grad_b[k] += share;
        columns.now[k] *= share;
        collected[k] = 0.f;
        if (team.rank == 0 && team.warp == 0 && j < p.m) gradient.shares[slot * p.m + j] = share;
      }
      for (int row = team.warp; row < rows.count; row += warps) {
        const float f = history.f[slot * p.n + rows.first + row];
        const float mass = p.a ? p.a[index * p.a_stride + rows.first + row] : 1.f / static_cast<float>(p.n);
        float value[columns_of_lane], product = 0.f, total = 0.f;
        rows.read(row, team.lane, value);
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) {
          value[k] = power(fmaf(value[k], scale, f) + columns.shift[k]);
          product = fmaf(value[k], columns.now[k], product);
          value[k] *= columns.before[k];
          total += value[k];
        }
        product = warp_sum(product);
        total = warp_sum(total);
        const bool masked = f == nothing() || mass == 0.f;
        const float slope = (step == count - 1 ? start_f[row] : 0.f) - product;
        // Not by a: weights that sum to one exactly keep rounding from growing with the iterations.
        const float factor = masked ? 0.f : slope / total;
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) collected[k] = fmaf(value[k], factor, collected[k]);
        if (team.lane == 0) {
          grad_a[row] += masked ? 0.f : slope / mass;
          gradient.factors[slot * p.n + rows.first + row] = factor;
        }
      }
      float unused = 0.f, error = 0.f;
      team.sum_columns(collected, unused);
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) error += collected[k];
      error = (warp_sum(error) - surplus) / mass;
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) grad_g[k] = fmaf(error, mass_b[k], -collected[k]);
    }
    // The sums above are barriers of the cluster: factors and shares are there for all of it.
    E* out = static_cast<E*>(gradient.grad_scores) + (index * p.n + rows.first) * p.m;
    for (int row = team.warp; row < rows.count; row += warps) {
      float value[columns_of_lane], slope[columns_of_lane];
      rows.read(row, team.lane, value);
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) {
        const int j = team.lane + lanes * k;
        slope[k] =
            upper && j < p.m ? power(fmaf(value[k], scale, last_f[row]) + last_g[j]) * upper_at(row, j) : 0.f;
      }
      for (int64_t step = 0; step < count; ++step) {
        const int64_t slot = step * p.batch + index;
        const Columns columns(history, p, step, index, team.lane);
        const float f = history.f[slot * p.n + rows.first + row];
        const float factor = gradient.factors[slot * p.n + rows.first + row];
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) {
          const int j = team.lane + lanes * k;
          const float share = j < p.m ? gradient.shares[slot * p.m + j] : 0.f;
          const float weight = fmaf(columns.before[k], factor, columns.now[k] * share);
          slope[k] -= power(fmaf(value[k], scale, f) + columns.shift[k]) * weight;
        }
      }
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k)
        if (team.lane + lanes * k < p.m)
          out[static_cast<int64_t>(row) * p.m + team.lane + lanes * k] = narrow<E>(inverse_eps * slope[k]);
    }
    if (gradient.grad_a)
      for (int row = threadIdx.x; row < rows.count; row += threads)
        gradient.grad_a[index * p.n + rows.first + row] = grad_a[row];
    if (gradient.grad_b && team.rank == 0 && team.warp == 0)
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k)
        if (team.lane + lanes * k < p.m) gradient.grad_b[index * p.m + team.lane + lanes * k] = grad_b[k];
    __syncthreads();
  }
}

template <class E>
cudaError_t run(const Problem& p, const Gradient& gradient, void* stream) {
  Layout layout;
  const cudaError_t status = layout_of(p, sizeof(E), backward<E, 2>, layout);
  if (status != cudaSuccess) return status;
  return layout.blocks == 1 ? launch(backward<E, 1>, layout, p.batch, stream, p, gradient, layout.capacity)
                            : launch(backward<E, 2>, layout, p.batch, stream, p, gradient, layout.capacity);
}

}  // namespace

const char* sinkhorn_backward(const Problem& p, const Gradient& gradient, void* stream) {
  if (!p.batch) return nullptr;
  switch (p.element) {
    case Element::float16:
      return message(run<__half>(p, gradient, stream));
    case Element::bfloat16:
      return message(run<__nv_bfloat16>(p, gradient, stream));
    case Element::float32:
      return message(run<float>(p, gradient, stream));
  }
  return "unknown element";
}

}  // namespace objslot::cuda
