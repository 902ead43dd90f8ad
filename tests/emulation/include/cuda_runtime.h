// The part of CUDA's language and runtime that csrc/cuda uses, on the CPU: every CUDA thread is a fiber, see fibers.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __global__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

namespace emulation {

// All threads of a block, or of a cluster, come to the same line, or the launch fails.
int wait_for_block(int line, int predicate);
void wait_for_cluster();
// The value of lane (own lane xor `lanes`); all lanes of the warp come to the same line.
float exchange(int line, float value, int lanes);

unsigned char* shared_memory();
// The address in block `rank` of the cluster that `address` is in the running block.
void* address_in(const void* address, unsigned rank);

cudaError_t launch(const cudaLaunchConfig_t& config, size_t most_shared, int architecture,
                   const std::function<void()>& thread);
size_t& allowed_shared(const void* kernel);

// 2^exponent as the fast instruction makes it: nothing below 2^-126, and wrong by up to two units in the last place.
inline float approximate_power(float exponent) {
  const float value = std::exp2(exponent);
  if (value < 1.17549435e-38f) return 0.f;
  if (exponent == std::floor(exponent) || !std::isfinite(value)) return value;
  uint32_t bits;
  std::memcpy(&bits, &exponent, sizeof bits);
  const int units = static_cast<int>((bits * 2654435761u) >> 16) % 5 - 2;
  return value * (1.f + 1.1920929e-7f * units);
}

}  // namespace emulation

// Of the running fiber.
extern dim3 threadIdx, blockIdx, gridDim;

#define __syncthreads() static_cast<void>(::emulation::wait_for_block(__LINE__, 0))
#define __syncthreads_or(predicate) ::emulation::wait_for_block(__LINE__, predicate)
#define __shfl_xor_sync(mask, value, lanes) ::emulation::exchange(__LINE__, value, lanes)

using std::isnan;
using std::max;
using std::min;

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t status);

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = __CUDA_ARCH__ / 10;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes < 0 || bytes > most) return cudaErrorInvalidValue;
  emulation::allowed_shared(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const size_t allowed = emulation::allowed_shared(reinterpret_cast<const void*>(kernel));
  return emulation::launch(*config, allowed, __CUDA_ARCH__, [&] { kernel(arguments...); });
}
