// What the forward and the backward kernel share: how a matrix lies in a block or a cluster of blocks, and how
// columns are summed over warps and blocks.
//
// A cluster holds one matrix, each block of it a share of the rows, in the type they came in: that is exact.
// Where blocks cannot form clusters (sm_80), rows beyond the shared memory are read from the second-level cache
// in every pass. A warp takes a row at a time, lane l the columns l, l + 32, ...; so every thread keeps the same
// columns in registers throughout. All sums have a fixed order.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "device.cuh"
#include "objslot/cuda.h"

namespace objslot::cuda {

constexpr int warps = 16, threads = 32 * warps, lanes = 32;
constexpr int columns_of_lane = most_side / lanes;
constexpr unsigned everyone = 0xffffffffu;
constexpr float ln_2 = 0.6931471805599453f;

__device__ inline float nothing() { return -__int_as_float(0x7f800000); }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class E>
__device__ E narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = lanes / 2; offset; offset /= 2) value += __shfl_xor_sync(everyone, value, offset);
  return value;
}

// The maximum over a warp, NaN left out: the sum that follows holds it.
__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = lanes / 2; offset; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(everyone, value, offset));
  return value;
}

__device__ inline float log2_of(float mass) { return mass == 0.f ? nothing() : log2f(mass); }

// Shared memory of a block besides the rows of the matrix.
struct Board {
  float parts[warps][most_side];  // what the warps collected of every column
  float tops[warps][most_side];   // the exponents that parts are relative to, where they are needed
  float sums[most_side];          // the block's own column sums, which the other blocks of the cluster read
  float sum_tops[most_side];
  float gaps[warps];
  float gap;
  float f[2][most_side];  // potentials of the block's rows, and those of the next iteration
  float row_sums[most_side];
};

template <int Blocks>
struct Team {
  Board& board;
  int rank, warp, lane;

  __device__ explicit Team(Board& memory) : board(memory) {
    rank = Blocks == 1 ? 0 : static_cast<int>(blockIdx.x % Blocks);
    warp = threadIdx.x / lanes;
    lane = threadIdx.x % lanes;
  }

  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (Blocks > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  __device__ const Board* other(int block) const {
#if __CUDA_ARCH__ >= 900
    if (Blocks > 1) return cooperative_groups::this_cluster().map_shared_rank(&board, block);
#endif
    return &board;
  }

  // Sums `values` of the thread's columns over all warps of the cluster, and `gap` of all lanes 0.
  __device__ void sum_columns(float (&values)[columns_of_lane], float& gap) const {
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) board.parts[warp][lane + lanes * k] = values[k];
    if (lane == 0) board.gaps[warp] = gap;
    __syncthreads();
    for (int j = threadIdx.x; j < most_side; j += threads) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += board.parts[w][j];
      board.sums[j] = sum;
    }
    if (threadIdx.x == 0) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += board.gaps[w];
      board.gap = sum;
    }
    sync();
    gap = 0.f;
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) values[k] = 0.f;
    for (int block = 0; block < Blocks; ++block) {
      const Board* from = other(block);
      gap += from->gap;
#pragma unroll
      for (int k = 0; k < columns_of_lane; ++k) values[k] += from->sums[lane + lanes * k];
    }
    // Nobody writes the sums anew before everybody has read them.
    sync();
  }
};

// The rows of one block.
template <class E>
struct Rows {
  const E* scores;  // the first row of the block
  E* held;          // (held_rows, m) in shared memory
  int first, count, held_rows, m;
  int64_t row_stride, column_stride;

  __device__ E at(int row, int j) const {
    return row < held_rows ? held[row * m + j] : scores[row * row_stride + j * column_stride];
  }
  // The thread's columns of a row; zero beyond the matrix.
  __device__ void read(int row, int lane, float (&values)[columns_of_lane]) const {
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const int j = lane + lanes * k;
      values[k] = j < m ? widen(at(row, j)) : 0.f;
    }
  }
};

template <class E, int Blocks>
__device__ Rows<E> take_rows(const Problem& p, int64_t index, const Team<Blocks>& team, E* held, int capacity) {
  Rows<E> rows;
  const int share = (p.n + Blocks - 1) / Blocks;
  rows.first = min(team.rank * share, p.n);
  rows.count = min(share, p.n - rows.first);
  rows.held_rows = min(rows.count, capacity);
  rows.held = held;
  rows.m = p.m;
  rows.row_stride = p.row_stride;
  rows.column_stride = p.column_stride;
  rows.scores = static_cast<const E*>(p.scores) + index * p.batch_stride + rows.first * p.row_stride;
  for (int row = team.warp; row < rows.held_rows; row += warps)
#pragma unroll
    for (int k = 0; k < columns_of_lane; ++k) {
      const int j = team.lane + lanes * k;
      if (j < p.m) held[row * p.m + j] = rows.scores[row * p.row_stride + j * p.column_stride];
    }
  __syncthreads();
  return rows;
}

// How a problem is launched: blocks for each matrix, rows that a block can hold, and its shared memory.
struct Layout {
  int blocks, capacity;
  size_t bytes;
};

// `pair` is the kernel for two blocks.
template <class Kernel>
cudaError_t layout_of(const Problem& p, size_t element_size, Kernel pair, Layout& layout) {
  int device = 0, most = 0, major = 0;
  cudaFuncAttributes code;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  // Code for an older architecture, translated by the driver, knows no clusters on a device that does.
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&code, pair);
  if (status != cudaSuccess) return status;
  if (most < static_cast<int>(sizeof(Board))) return cudaErrorInvalidValue;
  const size_t row = p.m * element_size, room = most - sizeof(Board);
  const auto fits = [&](int blocks) { return ((p.n + blocks - 1) / blocks) * row <= room; };
  layout.blocks = major >= 9 && code.ptxVersion >= 90 && !fits(1) ? 2 : 1;
  const int rows = (p.n + layout.blocks - 1) / layout.blocks;
  layout.capacity = fits(layout.blocks) ? rows : static_cast<int>(room / row);
  layout.bytes = sizeof(Board) + layout.capacity * row;
  return cudaSuccess;
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, const Layout& layout, int64_t batch, void* stream, Arguments... arguments) {
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(layout.bytes));
  if (status != cudaSuccess) return status;
  // A grid has at most 2^31 - 1 blocks along x; the kernels step over what is beyond.
  const int64_t most = ((int64_t{1} << 31) - 1) / layout.blocks;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((batch < most ? batch : most) * layout.blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = layout.bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {static_cast<unsigned>(layout.blocks), 1, 1};
  config.attrs = cluster;
  config.numAttrs = layout.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline const char* message(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace objslot::cuda
