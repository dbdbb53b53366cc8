// Deformable attention on the CPU: the kernels' arguments, and one table of kernels per instruction set.
//
// Neither this file nor the kernels use torch, and no kernel file includes a C++ standard header: its inline functions
// would be compiled for that file's instruction set, and the linker could keep that copy for code that runs everywhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dimaskdino {
namespace cpu {

enum Dtype { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
constexpr int kNumDtypes = 4;

struct LevelShape {
  int64_t height;
  int64_t width;
  int64_t start;        // the first token of the level in value
  int64_t frame_start;  // the same in the framed copy
};

// A framed copy holds the levels of one head. Each has two rows of zeros above and below, and two zeros after every row
// and before the first. Four tokens exist wherever a sample lies, so the loops need no branch; and a head's tokens are
// adjacent instead of H * D apart, where they would compete for a few sets of the caches.
constexpr int64_t kFrame = 2;

inline int64_t frame_row(int64_t width) {
  return width + kFrame;
}

inline int64_t frame_size(int64_t height, int64_t width) {
  return (height + 2 * kFrame) * frame_row(width) + kFrame;
}

// T is the dtype of value, A the accumulating dtype, C the dtype of offsets and logits: T with low_precision, else A.
struct Arguments {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t channels;
  int64_t queries;
  int64_t points;
  int64_t num_levels;
  const LevelShape* levels;
  int64_t frame_tokens;  // of all framed levels
  bool framed;

  const void* value;      // T (B, S, H, D)
  void* frames;           // T (B, H, frame_tokens, D), for the forward pass; if null, each task frames its head itself
  const void* locations;  // A (B, Q, H, L, P, 2), or null in the fused form
  const void* weights;    // A (B, Q, H, L, P); in the fused backward pass, the softmax of the logits

  bool low_precision;
  int64_t reference_size;  // 2 or 4
  const void* reference;   // A (B, Q, 2 or 4)
  const void* offsets;     // C (B, Q, H, L, P, 2)
  const void* logits;      // C (B, Q, H, L, P)

  void* output;             // T (B, Q, H * D)
  const void* grad_output;  // T (B, Q, H * D)
  int64_t level_splits;     // tasks of the backward pass per batch element and head: 1 or L
  void* grad_sums;          // A (B, S, H, D) zeros, if not framed
  void* grad_value;         // T (B, S, H, D), if framed
  void* grad_locations;     // A (B, Q, H, L, P, 2)
  void* grad_weights;       // A (B, Q, H, L, P), in both forms
  void* grad_offsets;       // C (B, Q, H, L, P, 2)
  void* grad_logits;        // C (B, Q, H, L, P)
  void* grad_reference;     // A (B, Q, H, L, 2 or 4), to be summed over H and L, or null
};

// Every kernel does the tasks [begin, end). The scratch memory of a call is its own, aligned to 64 bytes, and as large
// as forward_scratch or backward_scratch says.
struct Kernels {
  // One task: a row of a framed level of one batch element and head.
  void (*pack)(const Arguments&, int64_t begin, int64_t end);
  // One task: one batch element and head or, with args.frames, up to query_block of its queries.
  void (*forward)(const Arguments&, int64_t begin, int64_t end, void* scratch);
  int64_t (*query_block)(const Arguments&);
  // One task: all contributions to one batch element and head, or to one of its levels. No other task writes there, so
  // the order of the additions does not depend on the number of threads.
  void (*backward)(const Arguments&, int64_t begin, int64_t end, void* scratch);
  size_t (*forward_scratch)(const Arguments&);
  size_t (*backward_scratch)(const Arguments&);
  // One task: one query and head. In the fused form: logits to weights, and grad_weights to grad_logits.
  void (*softmax)(const Arguments&, void* weights, int64_t begin, int64_t end);
  void (*softmax_backward)(const Arguments&, int64_t begin, int64_t end);
};

// The number of tasks of Kernels::pack for each batch element and head.
inline int64_t frame_rows(const Arguments& args) {
  int64_t rows = 0;
  for (int64_t level = 0; level < args.num_levels; ++level) rows += args.levels[level].height + 2 * kFrame;
  return rows;
}

const Kernels& portable_kernels(Dtype dtype);
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DIMASKDINO_X86 1
const Kernels& avx2_kernels(Dtype dtype);
const Kernels& avx512_kernels(Dtype dtype);
#endif

}  // namespace cpu
}  // namespace dimaskdino
