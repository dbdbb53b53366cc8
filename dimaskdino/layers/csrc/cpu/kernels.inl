// The kernels, compiled once per instruction set. The including file sets the compiler's target, DIMASKDINO_ISA (the
// namespace), and DIMASKDINO_VECTOR_BYTES (the widest vector worth using).
//
// A task processes the queries of one head in blocks. It first locates all samples of a block (`locate` loops over
// arrays, one sample per lane), then gathers them one after the other, with the channels in the lanes.

#include <string.h>

#if DIMASKDINO_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "kernels.h"

namespace dimaskdino {
namespace cpu {
namespace DIMASKDINO_ISA {
namespace {

#include "simd.h"
#include "samples.inl"

// Calls work(Lanes<width>, Lanes<vectors at a time>) with the widest vectors that the channels fill.
template <int N>
struct Lanes {
  static constexpr int value = N;
};
template <class A, class Work>
void with_lanes(int64_t channels, const Work& work) {
  constexpr int widest = DIMASKDINO_VECTOR_BYTES / sizeof(A);
  if (channels % (2 * widest) == 0) {
    work(Lanes<widest>(), Lanes<2>());
  } else if (channels % widest == 0) {
    work(Lanes<widest>(), Lanes<1>());
  } else if (widest > 8 && channels % 8 == 0) {
    work(Lanes<(widest > 8 ? 8 : 4)>(), Lanes<1>());
  } else if (channels % 4 == 0) {
    work(Lanes<4>(), Lanes<1>());
  } else {
    work(Lanes<1>(), Lanes<1>());
  }
}

#include "forward.inl"
#include "backward.inl"

template <class T>
constexpr Kernels kernels_for() {
  return {Forward<T>::pack,          Forward<T>::run,     Forward<T>::query_block,     Backward<T>::run,
          Forward<T>::scratch_bytes, Backward<T>::scratch_bytes, Forward<T>::softmax, Backward<T>::softmax};
}

constexpr Kernels kTable[kNumDtypes] = {kernels_for<float>(), kernels_for<double>(), kernels_for<Half>(),
                                        kernels_for<BFloat16>()};

}  // namespace
}  // namespace DIMASKDINO_ISA
}  // namespace cpu
}  // namespace dimaskdino
