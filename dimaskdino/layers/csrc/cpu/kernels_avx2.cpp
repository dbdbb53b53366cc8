// The kernels for AVX2 with FMA.
#include "kernels.h"

#ifdef DIMASKDINO_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define DIMASKDINO_ISA avx2
#define DIMASKDINO_VECTOR_BYTES 32
#include "kernels.inl"

namespace dimaskdino {
namespace cpu {
const Kernels& avx2_kernels(Dtype dtype) {
  return avx2::kTable[dtype];
}
}  // namespace cpu
}  // namespace dimaskdino

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // DIMASKDINO_X86
