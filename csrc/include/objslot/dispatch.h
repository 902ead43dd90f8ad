// Which instruction set the kernels run on.
//
// Every csrc/cpu/*.kernel.cpp is compiled once per level, with OBJSLOT_ISA defined as the level's name (base,
// avx2, avx512), and hands out one table of functions. To add a kernel:
//
//   1. csrc/include/objslot/myop.h: a struct of function pointers, raw pointers, sizes and strides only.
//
//          namespace objslot {
//          struct MyopKernels { void (*forward)(const float* x, float* y, int64_t n, int threads); };
//          }
//
//   2. csrc/cpu/myop.kernel.cpp: everything inside the level's namespace, then the table.
//
//          #include "objslot/dispatch.h"
//          #include "objslot/myop.h"
//          namespace objslot::OBJSLOT_ISA {
//          static void forward(const float* x, float* y, int64_t n, int threads) { ... }
//          }
//          OBJSLOT_KERNELS(MyopKernels, forward)
//
//   3. The caller, e.g. bindings.cpp: objslot::kernels<MyopKernels>().forward(x, y, n, threads).
//
// A kernel file must leave no function that another file could link against: a std:: template or an inline
// function that is not inlined there would be merged with that of other files, AVX-512 code and all, and crash
// on an older processor. So write helpers `static` in the level's namespace and keep std:: containers and
// algorithms on the caller's side; a test of the object files enforces it.
#pragma once

namespace objslot {

enum class Isa { base, avx2, avx512 };

const char* name(Isa isa);

// The best level this processor and this build offer.
Isa best_isa();

// best_isa(), unless the environment variable OBJSLOT_ISA names a lower level; read at the first call.
// Throws std::invalid_argument for an unknown name and for a level above best_isa().
Isa active_isa();

// Whether kernels may use AMX tiles of bfloat16 and of bytes: the processor has them and vectors of bfloat16, the
// system lets this process use them, and active_isa() is avx512.
bool has_tiles();

template <class Table, Isa isa>
const Table& table();

template <class Table>
const Table& kernels() {
  switch (active_isa()) {
#ifdef OBJSLOT_AVX512
    case Isa::avx512: return table<Table, Isa::avx512>();
#endif
#ifdef OBJSLOT_AVX2
    case Isa::avx2: return table<Table, Isa::avx2>();
#endif
    default: return table<Table, Isa::base>();
  }
}

}  // namespace objslot

#define OBJSLOT_KERNELS(Table, ...)                \
  namespace objslot {                              \
  template <>                                      \
  const Table& table<Table, Isa::OBJSLOT_ISA>() {  \
    using namespace OBJSLOT_ISA;                   \
    static constexpr Table functions{__VA_ARGS__}; \
    return functions;                              \
  }                                                \
  }
