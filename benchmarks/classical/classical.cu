// The classical design of deformable attention, to compare with. For benchmarks alone.
//
// As in the first implementations: one thread for each channel of each query and head, each of which reads every
// location and weight and makes the four corners for itself; single channels are loaded and added. Backward: a block
// for each query and head, a thread for each channel; of every sample the threads put their shares of the gradients of
// location and weight into shared memory and one of them adds these up. Indices are 32-bit, as they were. Written anew
// from that description.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace classical {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

constexpr int kMaxLevels = 16;
constexpr int kThreads = 256;
constexpr int kMaxChannels = 1024;

struct Sizes {
  int batch, tokens, heads, channels, queries, levels, points;
  int shapes[2 * kMaxLevels];  // height, width
};

// The corners of one sample that lie on its level.
struct Corners {
  int first[4];  // where the channels of this corner begin, in elements; -1 outside
  float right, below;
  bool any;
};

__device__ inline Corners find_corners(float x, float y, int height, int width, int start, int stride) {
  Corners corners{{-1, -1, -1, -1}, 0.0f, 0.0f, false};
  if (!(x > -1 && y > -1 && x < width && y < height)) return corners;
  const int left = static_cast<int>(floorf(x)), top = static_cast<int>(floorf(y));
  corners.right = x - left;
  corners.below = y - top;
  corners.any = true;
  for (int i = 0; i < 4; ++i) {
    const int column = left + i % 2, row = top + i / 2;
    if (column >= 0 && column < width && row >= 0 && row < height) {
      corners.first[i] = start + (row * width + column) * stride;
    }
  }
  return corners;
}

template <typename T>
struct ForwardArgs {
  Sizes sizes;
  const T* value;
  const float* locations;
  const float* weights;
  T* output;
};

template <typename T>
__global__ void forward_kernel(const __grid_constant__ ForwardArgs<T> args) {
  const Sizes& sizes = args.sizes;
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index >= sizes.batch * sizes.queries * sizes.heads * sizes.channels) return;
  const int row = index / sizes.channels;
  const int channel = index % sizes.channels;
  const int head = row % sizes.heads;
  const int batch = row / sizes.heads / sizes.queries;
  const int stride = sizes.heads * sizes.channels;
  int start = batch * sizes.tokens * stride + head * sizes.channels + channel;
  int sample = row * sizes.levels * sizes.points;
  float sum = 0;
  for (int level = 0; level < sizes.levels; ++level) {
    const int height = sizes.shapes[2 * level], width = sizes.shapes[2 * level + 1];
    for (int point = 0; point < sizes.points; ++point, ++sample) {
      const float x = args.locations[2 * sample] * width - 0.5f, y = args.locations[2 * sample + 1] * height - 0.5f;
      const Corners corners = find_corners(x, y, height, width, start, stride);
      const float right = corners.right, below = corners.below;
      float values[4];
      for (int i = 0; i < 4; ++i) values[i] = corners.first[i] < 0 ? 0 : to_float(args.value[corners.first[i]]);
      const float upper = (1 - right) * values[0] + right * values[1];
      const float lower = (1 - right) * values[2] + right * values[3];
      sum += args.weights[sample] * ((1 - below) * upper + below * lower);
    }
    start += height * width * stride;
  }
  from_float(sum, &args.output[index]);
}

struct BackwardArgs {
  Sizes sizes;
  const float* grad_output;
  const float* value;
  const float* locations;
  const float* weights;
  float* grad_value;
  float* grad_locations;
  float* grad_weights;
};

__global__ void backward_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ float classical_shared_memory[];
  const Sizes& sizes = args.sizes;
  const int row = static_cast<int>(blockIdx.x);
  const int channel = static_cast<int>(threadIdx.x);
  float* shares = classical_shared_memory;  // x, y and weight of each channel
  const int batch = row / sizes.heads / sizes.queries;
  const int head = row % sizes.heads;
  const int stride = sizes.heads * sizes.channels;
  const float grad = args.grad_output[row * sizes.channels + channel];
  int start = batch * sizes.tokens * stride + head * sizes.channels + channel;
  int sample = row * sizes.levels * sizes.points;
  for (int level = 0; level < sizes.levels; ++level) {
    const int height = sizes.shapes[2 * level], width = sizes.shapes[2 * level + 1];
    for (int point = 0; point < sizes.points; ++point, ++sample) {
      const float x = args.locations[2 * sample] * width - 0.5f, y = args.locations[2 * sample + 1] * height - 0.5f;
      const float weight = args.weights[sample];
      const Corners corners = find_corners(x, y, height, width, start, stride);
      const float right = corners.right, below = corners.below;
      const float shares_of_corners[4] = {(1 - right) * (1 - below), right * (1 - below), (1 - right) * below,
                                          right * below};
      float values[4];
      for (int i = 0; i < 4; ++i) {
        values[i] = corners.first[i] < 0 ? 0 : args.value[corners.first[i]];
        if (corners.first[i] >= 0) atomicAdd(&args.grad_value[corners.first[i]], grad * weight * shares_of_corners[i]);
      }
      const float upper = (1 - right) * values[0] + right * values[1];
      const float lower = (1 - right) * values[2] + right * values[3];
      const float across = (1 - below) * (values[1] - values[0]) + below * (values[3] - values[2]);
      shares[3 * channel] = width * grad * weight * across;
      shares[3 * channel + 1] = height * grad * weight * (lower - upper);
      shares[3 * channel + 2] = grad * ((1 - below) * upper + below * lower);
      __syncthreads();
      if (channel == 0) {
        float sum_x = 0, sum_y = 0, sum_weight = 0;
        for (int i = 0; i < sizes.channels; ++i) {
          sum_x += shares[3 * i];
          sum_y += shares[3 * i + 1];
          sum_weight += shares[3 * i + 2];
        }
        args.grad_locations[2 * sample] = corners.any ? sum_x : 0;
        args.grad_locations[2 * sample + 1] = corners.any ? sum_y : 0;
        args.grad_weights[sample] = corners.any ? sum_weight : 0;
      }
      __syncthreads();
    }
    start += height * width * stride;
  }
}

bool fits(const int* sizes) {
  const double rows = static_cast<double>(sizes[0]) * sizes[2];
  const double largest = rows * sizes[3] * (sizes[1] > sizes[4] ? sizes[1] : sizes[4]);
  return sizes[5] <= kMaxLevels && sizes[3] <= kMaxChannels && largest < 0x7fffffff - kThreads &&
         2.0 * rows * sizes[4] * sizes[5] * sizes[6] < 0x7fffffff;
}

Sizes make_sizes(const int* sizes, const int* shapes) {
  Sizes out{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], {}};
  for (int i = 0; i < 2 * out.levels; ++i) out.shapes[i] = shapes[i];
  return out;
}

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int blocks, int threads, size_t shared_bytes, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
int forward(const Sizes& sizes, const void* value, const void* locations, const void* weights, void* output,
            void* stream) {
  const int outputs = sizes.batch * sizes.queries * sizes.heads * sizes.channels;
  const ForwardArgs<T> args{sizes, static_cast<const T*>(value), static_cast<const float*>(locations),
                            static_cast<const float*>(weights), static_cast<T*>(output)};
  return launch(forward_kernel<T>, args, (outputs + kThreads - 1) / kThreads, kThreads, 0, stream);
}

}  // namespace classical

// Return CUDA error codes. sizes: batch, tokens, heads, channels, queries, levels, points. dtype of value and output:
// 0 float32, 1 float16, 2 bfloat16; all else is float32.
extern "C" int classical_forward(int dtype, const int* sizes, const int* shapes, const void* value,
                                 const void* locations, const void* weights, void* output, void* stream) {
  if (!classical::fits(sizes)) return cudaErrorInvalidValue;
  const classical::Sizes problem = classical::make_sizes(sizes, shapes);
  if (dtype == 0) return classical::forward<float>(problem, value, locations, weights, output, stream);
  if (dtype == 1) return classical::forward<__half>(problem, value, locations, weights, output, stream);
  return classical::forward<__nv_bfloat16>(problem, value, locations, weights, output, stream);
}

// grad_value must be zeros.
extern "C" int classical_backward(const int* sizes, const int* shapes, const float* grad_output, const float* value,
                                  const float* locations, const float* weights, float* grad_value,
                                  float* grad_locations, float* grad_weights, void* stream) {
  if (!classical::fits(sizes)) return cudaErrorInvalidValue;
  const classical::Sizes problem = classical::make_sizes(sizes, shapes);
  const classical::BackwardArgs args{problem,    grad_output,    value,       locations, weights,
                                     grad_value, grad_locations, grad_weights};
  const int rows = problem.batch * problem.queries * problem.heads;
  const size_t shared_bytes = 3 * sizeof(float) * problem.channels;
  return classical::launch(classical::backward_kernel, args, rows, problem.channels, shared_bytes, stream);
}
