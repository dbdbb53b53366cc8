// The binding of the CUDA kernels as ops of CPU tensors, torch.ops.dimaskdino_emulated.*, with the emulated kernels.
//
// torch's headers come first: what the macros below change are the words of the binding alone. All of ATen's would take
// half of the compiler's time.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/Device.h>
#include <cuda_runtime.h>
#include <torch/library.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <tuple>

// Schemas are those of the functions.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY(dimaskdino_emulated, m)
#define impl def
#include "ms_deform_attn_cuda.cpp"
