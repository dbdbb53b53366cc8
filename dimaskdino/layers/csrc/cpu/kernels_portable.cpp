// The kernels for the build's own instruction set, with vectors as wide as those of SSE2 and NEON.

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
