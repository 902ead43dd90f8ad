// What stands in for csrc/cuda/device.cuh.
#define OBJSLOT_CUDA_DEVICE_CUH

#include "cuda_runtime.h"

namespace objslot::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }
inline float power(float exponent) { return emulation::approximate_power(exponent); }

}  // namespace objslot::cuda
