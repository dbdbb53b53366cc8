// The forward kernel, for both kinds of inputs.
#pragma once

#include "samples.cuh"

namespace dimaskdino {
namespace gpu {

template <class Inputs>
struct ForwardArgs {
  Grid grid;
  const void* value;
  Inputs inputs;
  void* output;
};

// Blocks per multiprocessor. Four leave 64 registers: enough to keep some samples' loads in flight, at half of all
// threads. The general kernels need a few more registers.
template <class C>
constexpr int kForwardBlocks = C::kChannels ? 4 : 2;

template <class C, class Reader>
__global__ void __launch_bounds__(kMaxForwardThreads, kForwardBlocks<C>)
    forward_kernel(const __grid_constant__ ForwardArgs<typename Reader::Inputs> args) {
  using T = typename C::Value;
  using A = Acc<T>;
  const Grid& grid = args.grid;
  CornerTable<C> table;
  for_each_query_head<C>(grid, [&](const QueryHead& query_head) {
    const Reader reader(grid, args.inputs, query_head);
    const int channels = grid.num_channels<C>();
    const int samples = grid.num_samples<C>();
    const int lane = query_head.lane;
    const unsigned token_bytes = static_cast<unsigned>(grid.heads) * channels * sizeof(T);
    const T* values = static_cast<const T*>(args.value) + query_head.value_row(grid) * channels;
    for (int first = 0; first < channels; first += C::kStep) {
      const int channel = first + lane * C::kVector;
      const bool has_channel = C::kChannels != 0 || channel < channels;
      A sums[C::kVector] = {};
      Sample<A> next = reader.load(lane);
#pragma unroll 1
      for (int base = 0; base < samples; base += C::kLanes) {
        const bool mine = base + lane < samples;
        table.write(lane, reader.corners(next, grid.level_of(mine ? base + lane : 0)));
        if (base + C::kLanes < samples) next = reader.load(base + C::kLanes + lane);
        const int count = samples - base < C::kLanes ? samples - base : C::kLanes;
#pragma unroll 4
        for (int sample = 0; sample < count; ++sample) {
          int tokens[4];
          A weights[4];
          table.read(sample, tokens, weights);
          A corner[4][C::kVector];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            load_channels<T, C::kVector>(at_token(values + channel, tokens[i], token_bytes),
                                         tokens[i] >= 0 && has_channel, corner[i]);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < C::kVector; ++j) sums[j] += weights[i] * corner[i][j];
          }
        }
      }
      if (query_head.exists && has_channel) {
        store_channels<T, C::kVector>(static_cast<T*>(args.output) + query_head.row(grid) * channels + channel, sums);
      }
    }
  });
}

template <template <class> class Reader, class Inputs>
cudaError_t launch_forward(Dtype dtype, const Sizes& sizes, const void* value, const Inputs& inputs, void* output,
                           cudaStream_t stream, Schedule schedule) {
  return with_dtype(dtype, [&](auto type) {
    return with_config<typename decltype(type)::type>(sizes, [&](auto config) {
      using C = decltype(config);
      return launch<C>(forward_kernel<C, Reader<C>>, ForwardArgs<Inputs>{{}, value, inputs, output}, sizes, schedule,
                       kMaxForwardThreads, CornerTable<C>::kBytesPerThread, stream);
    });
  });
}

}  // namespace gpu
}  // namespace dimaskdino
