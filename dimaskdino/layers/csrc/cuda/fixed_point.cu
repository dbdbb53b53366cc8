#include "fixed_point.cuh"

namespace dimaskdino {
namespace gpu {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;  // the kernels in this file use grid-stride loops

template <typename T>
struct LargestArgs {
  const T* numbers;
  int64_t count;
  unsigned long long* largest;
};

template <typename T>
__global__ void find_largest_kernel(const __grid_constant__ LargestArgs<T> args) {
  unsigned long long largest = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += step) {
    const double magnitude = fabs(static_cast<double>(to_acc(args.numbers[i])));
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(magnitude));
    largest = bits > largest ? bits : largest;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const unsigned long long other = __shfl_xor_sync(kWarp, largest, mask);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % 32 == 0) atomicMax(args.largest, largest);
}

struct ScaleArgs {
  FixedPoint* fixed_point;
  double contributions;
  bool weights_known;  // if not, none exceeds 1
};

// |sum| <= contributions * max|grad_output| * max|weight| < 2^exponent. After scaling it stays below 2^61, which leaves
// room for the rounding of the contributions.
__global__ void choose_scale_kernel(const __grid_constant__ ScaleArgs args) {
  FixedPoint& fixed_point = *args.fixed_point;
  const double grad = __longlong_as_double(static_cast<long long>(fixed_point.largest_grad));
  const double weight =
      args.weights_known ? __longlong_as_double(static_cast<long long>(fixed_point.largest_weight)) : 1.0;
  const double bound = args.contributions * grad * weight;
  int exponent = 0;
  if (bound > 0 && bound <= 1.7976931348623157e308) frexp(bound, &exponent);
  int shift = 61 - exponent;
  shift = shift > 1000 ? 1000 : shift;
  fixed_point.scale = ldexp(1.0, shift);
  // Inf - Inf and NaN - NaN are NaN; for any other x, x - x is 0.
  fixed_point.unit = ldexp(1.0, -shift) + (bound - bound);
}

template <typename T>
struct ToGradArgs {
  const int64_t* sums;
  const FixedPoint* fixed_point;
  T* grads;
  int64_t count;
};

template <typename T>
__global__ void to_grad_kernel(const __grid_constant__ ToGradArgs<T> args) {
  const double unit = args.fixed_point->unit;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += step) {
    args.grads[i] = from_acc<T>(static_cast<Acc<T>>(static_cast<double>(args.sums[i]) * unit));
  }
}

template <class Args>
cudaError_t launch_over(int64_t count, void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(count, kThreads);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
cudaError_t find_largest(const void* numbers, int64_t count, unsigned long long* largest, cudaStream_t stream) {
  return launch_over(count, find_largest_kernel<T>, LargestArgs<T>{static_cast<const T*>(numbers), count, largest},
                     stream);
}

}  // namespace

cudaError_t find_scale(Dtype dtype, const Sizes& sizes, const void* grad_output, const void* weights,
                       const ValueGrad& value_grad, cudaStream_t stream) {
  auto* fixed_point = static_cast<FixedPoint*>(value_grad.scale);
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cudaError_t error = cudaMemsetAsync(fixed_point, 0, sizeof(FixedPoint), stream);
    if (error != cudaSuccess) return error;
    error = find_largest<T>(grad_output, rows * sizes.channels, &fixed_point->largest_grad, stream);
    if (error != cudaSuccess) return error;
    if (weights != nullptr) {
      const int64_t count = rows * sizes.num_levels * sizes.points;
      error = find_largest<Acc<T>>(weights, count, &fixed_point->largest_weight, stream);
      if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(1);
    config.stream = stream;
    const auto contributions = static_cast<double>(sizes.queries * sizes.points);
    return cudaLaunchKernelEx(&config, choose_scale_kernel, ScaleArgs{fixed_point, contributions, weights != nullptr});
  });
}

cudaError_t exact_sums_to_grad(Dtype dtype, const Sizes& sizes, const ValueGrad& value_grad, void* grad_value,
                               cudaStream_t stream) {
  const int64_t count = sizes.batch * sizes.tokens * sizes.heads * sizes.channels;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* fixed_point = static_cast<const FixedPoint*>(value_grad.scale);
    return launch_over(
        count, to_grad_kernel<T>,
        ToGradArgs<T>{value_grad.exact_sums, fixed_point, static_cast<T*>(grad_value), count}, stream);
  });
}

}  // namespace gpu
}  // namespace dimaskdino
