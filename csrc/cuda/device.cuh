// What has no spelling in plain C++: tests put their own in its place, to run the kernels on a CPU.
#ifndef OBJSLOT_CUDA_DEVICE_CUH
#define OBJSLOT_CUDA_DEVICE_CUH

namespace objslot::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline float power(float exponent) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
  return value;
}

}  // namespace objslot::cuda

#endif
