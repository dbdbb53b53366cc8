// The kernels in the instruction set of the build, wide enough for SSE2 and NEON.

#define DIMASKDINO_ISA portable
#define DIMASKDINO_VECTOR_BYTES 16
#include "kernels.inl"

namespace dimaskdino {
namespace cpu {
const Kernels& portable_kernels(Dtype dtype) {
  return portable::kTable[dtype];
}
}  // namespace cpu
}  // namespace dimaskdino
