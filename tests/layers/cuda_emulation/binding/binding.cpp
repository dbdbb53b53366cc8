// The binding of the CUDA kernels as ops of CPU tensors, torch.ops.dimaskdino_emulated.*, with the emulated kernels.
//
// torch's headers come first: what the macros below change are the words of the binding alone.
#include <ATen/ATen.h>
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
