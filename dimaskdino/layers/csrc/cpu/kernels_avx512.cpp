// The kernels for AVX-512.
#include "kernels.h"

#ifdef DIMASKDINO_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define DIMASKDINO_ISA avx512
#define DIMASKDINO_VECTOR_BYTES 64
#include "kernels.inl"

namespace dimaskdino {
namespace cpu {
const Kernels& avx512_kernels(Dtype dtype) {
  return avx512::kTable[dtype];
}
}  // namespace cpu
}  // namespace dimaskdino

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // DIMASKDINO_X86
