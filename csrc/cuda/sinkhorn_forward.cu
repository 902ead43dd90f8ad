// Sinkhorn's algorithm in the log domain on matrices that stay in shared memory over all iterations.
//
// One exponential for each entry serves the rows and the columns of an iteration: with q the plan whose rows were
// just set, the new potential of a column is the old one plus log2(b / sum of q). Where such a sum is so small
// that terms may have been rounded away, the column potentials are computed anew from the scores.
#include "sinkhorn.cuh"

namespace objslot::cuda {
namespace {

// 2^-126 may be lost from each of 256 terms, and must be a 2^-24th of the sum at most.
constexpr float least_sum = 2.0e-28f;

// Column potentials from the scores and the row potentials in `f`, by log-sum-exp with each column's own maximum.
template <class E, int Blocks>
__device__ void set_columns_exactly(const Team<Blocks>& team, const Rows<E>& rows, float scale, const float* f,
                                    const float (&log_b)[columns_of_lane], float (&g)[columns_of_lane]) {
  Board& board = team.board;
  float top[columns_of_lane], sum[columns_of_lane];
#pragma unroll
  for (int k = 0; k < columns_of_lane; ++k) top[k] = nothing(), sum[k] = 0.f;
  for (int row = team.warp; row < rows.count; row += warps) {
    float value[columns_of_lane];
    rows.read(row, team.lane, value);
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const float exponent = fmaf(value[k], scale, f[row]);
      const float larger = fmaxf(top[k], exponent), base = larger == nothing() ? 0.f : larger;
      sum[k] = sum[k] * power(top[k] - base) + power(exponent - base);
      top[k] = larger;
    }
  }
#pragma unroll
  for (int k = 0; k < columns_of_lane; ++k) {
    board.parts[team.warp][team.lane + lanes * k] = sum[k];
    board.tops[team.warp][team.lane + lanes * k] = top[k];
  }
  __syncthreads();
  for (int j = threadIdx.x; j < most_side; j += threads) {
    float larger = nothing(), total = 0.f;
    for (int w = 0; w < warps; ++w) larger = fmaxf(larger, board.tops[w][j]);
    const float base = larger == nothing() ? 0.f : larger;
    for (int w = 0; w < warps; ++w) total += board.parts[w][j] * power(board.tops[w][j] - base);
    board.sums[j] = total;
    board.sum_tops[j] = larger;
  }
  team.sync();
#pragma unroll
  for (int k = 0; k < columns_of_lane; ++k) {
    const int j = team.lane + lanes * k;
    float larger = nothing(), total = 0.f;
    for (int block = 0; block < Blocks; ++block) larger = fmaxf(larger, team.other(block)->sum_tops[j]);
    const float base = larger == nothing() ? 0.f : larger;
    for (int block = 0; block < Blocks; ++block) {
      const Board* from = team.other(block);
      total += from->sums[j] * power(from->sum_tops[j] - base);
    }
    g[k] = log_b[k] == nothing() || total == 0.f ? nothing() : log_b[k] - (log2f(total) + base);
  }
  team.sync();
}

template <class E, int Blocks>
__global__ void __launch_bounds__(threads, 1) forward(Problem p, Result result, int capacity) {
  unsigned char* memory = shared_memory();
  Board& board = *reinterpret_cast<Board*>(memory);
  const Team<Blocks> team(board);
  const float scale = static_cast<float>(1.4426950408889634 / p.eps);
  const bool early = p.tol >= 0;
  for (int64_t index = blockIdx.x / Blocks; index < p.batch; index += gridDim.x / Blocks) {
    const Rows<E> rows =
        take_rows<E, Blocks>(p, index, team, reinterpret_cast<E*>(memory + sizeof(Board)), capacity);
    float g[columns_of_lane], mass_b[columns_of_lane], log_b[columns_of_lane];
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const int j = team.lane + lanes * k;
      mass_b[k] = j >= p.m ? 0.f : p.b ? p.b[index * p.b_stride + j] : 1.f / static_cast<float>(p.m);
      log_b[k] = log2_of(mass_b[k]);
      g[k] = j < p.m ? 0.f : nothing();
    }
    int current = 1;
    int64_t count = 0;
    float gap = 0.f;
    while (true) {
      float* f = board.f[current];
      float* next = board.f[1 - current];
      float collected[columns_of_lane];
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) collected[k] = 0.f;
      gap = 0.f;
      for (int row = team.warp; row < rows.count; row += warps) {
        const float mass =
            p.a ? p.a[index * p.a_stride + rows.first + row] : 1.f / static_cast<float>(p.n);
        float value[columns_of_lane], top = nothing(), total = 0.f;
        rows.read(row, team.lane, value);
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) {
          value[k] = fmaf(value[k], scale, g[k]);
          top = fmaxf(top, value[k]);
        }
        top = warp_max(top);
        if (top == nothing()) top = 0.f;
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) total += value[k] = power(value[k] - top);
        total = warp_sum(total);
        const bool masked = mass == 0.f || total == 0.f;
        const float factor = masked ? 0.f : mass / total;
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k) collected[k] = fmaf(value[k], factor, collected[k]);
        if (team.lane == 0) {
          if (count) gap += fabsf((f[row] == nothing() ? 0.f : power(f[row] + top) * total) - mass);
          next[row] = masked ? nothing() : log2f(mass) - (log2f(total) + top);
        }
      }
      team.sum_columns(collected, gap);
      if (count && (count == p.n_iters || (early && !(gap > static_cast<float>(p.tol))))) break;
      bool lost = false;
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) lost |= mass_b[k] != 0.f && !(collected[k] >= least_sum);
      current = 1 - current;
      // Every block of a cluster has the same sums, so all of them take the same way.
      if (__syncthreads_or(lost)) {
        set_columns_exactly<E, Blocks>(team, rows, scale, next, log_b, g);
      } else {
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k)
          g[k] = mass_b[k] == 0.f ? nothing() : g[k] + log2f(mass_b[k] / collected[k]);
      }
      if (result.history.f) {
        const int64_t slot = count * p.batch + index;
        for (int row = threadIdx.x; row < rows.count; row += threads)
          result.history.f[slot * p.n + rows.first + row] = next[row];
        if (team.rank == 0 && team.warp == 0)
#pragma unroll
          for (int k = 0; k < columns_of_lane; ++k)
            if (team.lane + lanes * k < p.m) result.history.g[slot * p.m + team.lane + lanes * k] = g[k];
      }
      ++count;
      if (count == p.n_iters && !result.error) break;
    }
    const float* f = board.f[current];
    if (result.plan)
      for (int row = team.warp; row < rows.count; row += warps) {
        float value[columns_of_lane];
        rows.read(row, team.lane, value);
        E* plan = static_cast<E*>(result.plan) + (index * p.n + rows.first + row) * p.m;
#pragma unroll
        for (int k = 0; k < columns_of_lane; ++k)
          if (team.lane + lanes * k < p.m)
            plan[team.lane + lanes * k] = narrow<E>(power(fmaf(value[k], scale, f[row]) + g[k]));
      }
    if (result.f)
      for (int row = threadIdx.x; row < rows.count; row += threads)
        result.f[index * p.n + rows.first + row] = ln_2 * f[row];
    if (team.rank == 0 && team.warp == 0) {
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k)
        if (result.g && team.lane + lanes * k < p.m) result.g[index * p.m + team.lane + lanes * k] = ln_2 * g[k];
      if (team.lane == 0) {
        if (result.history.count) result.history.count[index] = count;
        if (result.error) result.error[index] = gap;
      }
    }
    // The next matrix takes this one's place.
    __syncthreads();
  }
}

template <class E>
cudaError_t run(const Problem& p, const Result& result, void* stream) {
  Layout layout;
  const cudaError_t status = layout_of(p, sizeof(E), forward<E, 2>, layout);
  if (status != cudaSuccess) return status;
  return layout.blocks == 1 ? launch(forward<E, 1>, layout, p.batch, stream, p, result, layout.capacity)
                            : launch(forward<E, 2>, layout, p.batch, stream, p, result, layout.capacity);
}

}  // namespace

const char* sinkhorn_forward(const Problem& p, const Result& result, void* stream) {
  if (!p.batch) return nullptr;
  switch (p.element) {
    case Element::float16:
      return message(run<__half>(p, result, stream));
    case Element::bfloat16:
      return message(run<__nv_bfloat16>(p, result, stream));
    case Element::float32:
      return message(run<float>(p, result, stream));
  }
  return "unknown element";
}

}  // namespace objslot::cuda
