// The backward kernel, for both kinds of inputs.
#pragma once

#include "fixed_point.cuh"
#include "samples.cuh"

namespace dimaskdino {
namespace gpu {

template <class Inputs, class Grads>
struct BackwardArgs {
  Grid grid;
  const void* grad_output;
  const void* value;
  Inputs inputs;
  Grads grads;
  ValueGrad value_grad;
};

// The number of neighboring floats in one atomic addition.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kFloatsPerAddition = 4;
#else
constexpr int kFloatsPerAddition = 1;
#endif

// Adds to grad_value in any order of the queries.
template <typename A>
class AtomicSums {
 public:
  using Sum = A;
  static constexpr int kWidth = std::is_same<A, float>::value ? kFloatsPerAddition : 1;

  __device__ explicit AtomicSums(const ValueGrad& grad) : sums_(static_cast<A*>(grad.sums)) {}

  __device__ Sum* sums() const { return sums_; }

  // Adds to as many neighboring channels: 1 or kWidth.
  template <int kTogether>
  __device__ void add(Sum* place, const A* grads, A weight) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kTogether == 4) {
      atomicAdd(reinterpret_cast<float4*>(place),
                make_float4(weight * grads[0], weight * grads[1], weight * grads[2], weight * grads[3]));
      return;
    }
#endif
    static_assert(kTogether == 1 || kTogether == kWidth, "one addition");
    if constexpr (kTogether == 1) atomicAdd(place, weight * grads[0]);
  }

 private:
  A* sums_;
};

// Adds integers, so that the order does not matter.
template <typename A>
class ExactSums {
 public:
  using Sum = unsigned long long;
  static constexpr int kWidth = 1;

  __device__ explicit ExactSums(const ValueGrad& grad)
      : sums_(reinterpret_cast<Sum*>(grad.exact_sums)), scale_(static_cast<const FixedPoint*>(grad.scale)->scale) {}

  __device__ Sum* sums() const { return sums_; }

  template <int kTogether>
  __device__ void add(Sum* place, const A* grads, A weight) const {
    static_assert(kTogether == 1, "one addition");
    const double scaled = static_cast<double>(weight) * static_cast<double>(grads[0]) * scale_;
    // In two's complement, unsigned addition is right for negative numbers too.
    atomicAdd(place, static_cast<Sum>(__double2ll_rn(scaled)));
  }

 private:
  Sum* sums_;
  double scale_;
};

// One lane's channels of grad_output, out of the kStep channels that the lanes hold at a time.
//
// A lane loads kVector neighboring values of a token, but adds to other channels of the token's gradient: the lanes
// take turns, kWidth channels each. One addition by all lanes then fills whole sectors of the L2 cache, which needs as
// much time for part of a sector as for all of it.
template <class C, int kWidth>
struct GradOutput {
  using T = typename C::Value;
  using A = Acc<T>;
  static_assert(C::kVector % kWidth == 0, "whole additions");

  A loaded[C::kVector];  // of the channels whose values the lane loads
  A added[C::kVector];   // of the channels that it adds to

  // The place of added[i] among the kStep channels.
  __device__ static int place(int lane, int i) { return (i / kWidth * C::kLanes + lane) * kWidth + i % kWidth; }

  // channels: how many are left, starting at grad_output.
  __device__ void load(const T* grad_output, int lane, int channels, bool exists) {
    load_channels<T, C::kVector>(grad_output + lane * C::kVector, exists && lane * C::kVector < channels, loaded);
#pragma unroll
    for (int i = 0; i < C::kVector; ++i) {
      if constexpr (kWidth == C::kVector) {
        added[i] = loaded[i];
      } else {
        added[i] = exists && place(lane, i) < channels ? to_acc(grad_output[place(lane, i)]) : A(0);
      }
    }
  }
};

// The gradients of one sample, from the dot products of grad_output and its four corners (0 for a corner outside).
template <typename A>
struct SampleGrads {
  A x;  // per pixel
  A y;
  A weight;

  __device__ SampleGrads(const Place<A>& place, A attention_weight, const A (&dots)[4]) {
    const A left = 1 - place.right;
    const A above = 1 - place.below;
    const A upper = left * dots[0] + place.right * dots[1];
    const A lower = left * dots[2] + place.right * dots[3];
    x = place.outside() ? 0 : attention_weight * (above * (dots[1] - dots[0]) + place.below * (dots[3] - dots[2]));
    y = place.outside() ? 0 : attention_weight * (lower - upper);
    weight = place.outside() ? 0 : above * upper + place.below * lower;
  }
};

template <class C>
class LocationWriter {
  using A = Acc<typename C::Value>;

 public:
  using Reader = LocationReader<C>;
  using Inputs = Locations;
  using Grads = LocationGrads;

  __device__ LocationWriter(const Grid&, const Grads& grads) : grads_(grads) {}

  static int64_t bytes_per_thread(const Sizes&) { return 0; }

  __device__ void write(int, int sample, const Level& level, const Sample<A>&, const SampleGrads<A>& grads,
                        const Reader& reader) {
    A* locations = static_cast<A*>(grads_.locations) + 2 * (reader.first() + sample);
    locations[0] = grads.x * level.width;
    locations[1] = grads.y * level.height;
    static_cast<A*>(grads_.weights)[reader.first() + sample] = grads.weight;
  }

  __device__ void finish(const QueryHead&, const Reader&) {}

 private:
  const Grads& grads_;
};

// The gradient of a logit needs the gradients of all weights of its query-head. Each lane keeps those of its own
// samples in shared memory until the sum is known; every sample has a place there that only its lane uses.
template <class C>
class OffsetWriter {
  using T = typename C::Value;
  using A = Acc<T>;

 public:
  using Reader = OffsetReader<C>;
  using Inputs = Offsets;
  using Grads = OffsetGrads;

  __device__ OffsetWriter(const Grid& grid, const Grads& grads) : grid_(grid), grads_(grads) {
    const auto table_bytes = static_cast<unsigned>(blockDim.x * CornerTable<C>::kBytesPerThread);
    weights_ = reinterpret_cast<A*>(reinterpret_cast<char*>(shared_memory()) + table_bytes) + threadIdx.x;
  }

  static int64_t bytes_per_thread(const Sizes& sizes) {
    return ceil_div(sizes.num_levels * sizes.points, C::kLanes) * sizeof(A);
  }

  __device__ void write(int round, int sample, const Level& level, const Sample<A>& input,
                        const SampleGrads<A>& grads, const Reader& reader) {
    weights_[round * blockDim.x] = grads.weight;
    sum_ += reader.weight(input) * grads.weight;
    store(grads_.offsets, 2 * (reader.first() + sample), grads.x * reader.pixels_per_offset_x(level), reader);
    store(grads_.offsets, 2 * (reader.first() + sample) + 1, grads.y * reader.pixels_per_offset_y(level), reader);
    if (grads_.reference != nullptr) {
      const A x = grads.x * level.width;
      const A y = grads.y * level.height;
      reference_[0] += x;
      reference_[1] += y;
      reference_[2] += x * input.x;
      reference_[3] += y * input.y;
    }
  }

  __device__ void finish(const QueryHead& query_head, const Reader& reader) {
    const A sum = sum_of_lanes<C>(sum_);
    for (int sample = query_head.lane, round = 0; sample < reader.count(); sample += C::kLanes, ++round) {
      const A weight = reader.weight(reader.load(sample));
      store(grads_.logits, reader.first() + sample, weight * (weights_[round * blockDim.x] - sum), reader);
    }
    if (grads_.reference != nullptr) write_reference(query_head, reader, Reader::half_of_point(grid_));
  }

 private:
  __device__ void write_reference(const QueryHead& query_head, const Reader& reader, A half_of_point) const {
    A sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = sum_of_lanes<C>(reference_[i]);
    if (!query_head.exists || query_head.lane != 0) return;
    if (reader.is_box()) {
      A* out = static_cast<A*>(grads_.reference) + 4 * query_head.row(grid_);
      out[0] = sums[0];
      out[1] = sums[1];
      out[2] = sums[2] * half_of_point;
      out[3] = sums[3] * half_of_point;
    } else {
      A* out = static_cast<A*>(grads_.reference) + 2 * query_head.row(grid_);
      out[0] = sums[0];
      out[1] = sums[1];
    }
  }

  __device__ void store(void* pointer, int64_t index, A x, const Reader& reader) const {
    if (reader.low_precision()) {
      static_cast<T*>(pointer)[index] = from_acc<T>(x);
    } else {
      static_cast<A*>(pointer)[index] = x;
    }
  }

  const Grid& grid_;
  const Grads& grads_;
  A* weights_;
  A sum_ = 0;
  A reference_[4] = {0, 0, 0, 0};
};

// Each lane keeps kHalf of kHalf * 2 samples: it trades its share of the rest for the other lane's share of those.
template <int kHalf, typename A>
__device__ inline void swap_halves(int lane, A (*dots)[4]) {
  const bool upper = (lane & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const A kept = upper ? dots[i + kHalf][j] : dots[i][j];
      const A given = upper ? dots[i][j] : dots[i + kHalf][j];
      dots[i][j] = kept + __shfl_xor_sync(kWarp, given, kHalf);
    }
  }
  if constexpr (kHalf > 1) swap_halves<kHalf / 2>(lane, dots);
}

// Sums the dots of kSamples samples over the lanes of a query-head: lane i ends up with the four sums of sample
// i % kSamples in dots[0]. Takes 16 shuffles for 4 samples and 8 lanes; summing every number in all lanes takes 48.
template <class C, int kSamples, typename A>
__device__ inline void sum_by_sample(int lane, A (&dots)[kSamples][4]) {
  if constexpr (kSamples > 1) swap_halves<kSamples / 2>(lane, dots);
#pragma unroll
  for (int mask = kSamples; mask < C::kLanes; mask *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) dots[0][j] += __shfl_xor_sync(kWarp, dots[0][j], mask);
  }
}

// The number of samples whose dots are in registers at a time. More would save shuffles, but leave fewer for loads.
template <class C>
constexpr int kCount = C::kLanes < 4 ? C::kLanes : 4;

// Blocks per multiprocessor: leaves 128 registers, or more where the kernel would spill.
template <class C>
constexpr int kBackwardBlocks = C::kChannels == 0 ? 2 : C::kVector == 8 && C::kChannels > 32 ? 3 : 4;

template <class C, template <class> class Writer, template <typename> class Sums>
__global__ void __launch_bounds__(kMaxBackwardThreads, kBackwardBlocks<C>)
    backward_kernel(const __grid_constant__ BackwardArgs<typename Writer<C>::Inputs, typename Writer<C>::Grads> args) {
  using T = typename C::Value;
  using A = Acc<T>;
  using Sum = typename Sums<A>::Sum;
  constexpr int kWidth = C::kVector < Sums<A>::kWidth ? 1 : Sums<A>::kWidth;
  const Grid& grid = args.grid;
  CornerTable<C> table;
  const Sums<A> sums(args.value_grad);
  for_each_query_head<C>(grid, [&](const QueryHead& query_head) {
    const typename Writer<C>::Reader reader(grid, args.inputs, query_head);
    Writer<C> writer(grid, args.grads);
    const int channels = grid.num_channels<C>();
    const int samples = grid.num_samples<C>();
    const int lane = query_head.lane;
    const unsigned stride = static_cast<unsigned>(grid.heads) * channels;
    const int64_t first_value = query_head.value_row(grid) * channels;
    const T* values = static_cast<const T*>(args.value) + first_value;
    const T* grad_outputs = static_cast<const T*>(args.grad_output) + query_head.row(grid) * channels;
    GradOutput<C, kWidth> grads;
    if constexpr (C::kChannels != 0) grads.load(grad_outputs, lane, channels, query_head.exists);
#pragma unroll 1
    for (int round = 0, base = 0; base < samples; ++round, base += C::kLanes) {
      // Unlike the forward kernel, does not load one round ahead: the registers would spill.
      const Sample<A> input = reader.load(base + lane);
      const bool mine = base + lane < samples;
      const Level& level = grid.level_of(mine ? base + lane : 0);
      const Corners<A> corners = reader.corners(input, level);
      const Place<A> place = corners.place;
      table.write(lane, corners);
      A my_dots[4] = {};
#pragma unroll 1
      for (int first = 0; first < C::kLanes && base + first < samples; first += kCount<C>) {
        A dots[kCount<C>][4] = {};
        for (int step = 0; step < channels; step += C::kStep) {
          const int channel = step + lane * C::kVector;
          const bool has_channel = C::kChannels != 0 || channel < channels;
          if constexpr (C::kChannels == 0) grads.load(grad_outputs + step, lane, channels - step, query_head.exists);
#pragma unroll
          for (int sample = 0; sample < kCount<C>; ++sample) {
            int tokens[4];
            A weights[4];
            table.read(first + sample, tokens, weights);
            A corner[4][C::kVector];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              load_channels<T, C::kVector>(at_token(values + channel, tokens[i], stride * unsigned{sizeof(T)}),
                                           tokens[i] >= 0 && has_channel, corner[i]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int j = 0; j < C::kVector; ++j) dots[sample][i] += grads.loaded[j] * corner[i][j];
              if (tokens[i] >= 0) {
                Sum* token = at_token(sums.sums() + first_value + step, tokens[i], stride * unsigned{sizeof(Sum)});
#pragma unroll
                for (int j = 0; j < C::kVector; j += kWidth) {
                  const int place = grads.place(lane, j);
                  if (C::kChannels != 0 || step + place < channels) {
                    sums.template add<kWidth>(token + place, grads.added + j, weights[i]);
                  }
                }
              }
            }
          }
        }
        sum_by_sample<C>(lane, dots);
        if (lane / kCount<C> == first / kCount<C>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) my_dots[i] = dots[0][i];
        }
      }
      if (query_head.exists && mine) {
        writer.write(round, base + lane, level, input, SampleGrads<A>(place, reader.weight(input), my_dots), reader);
      }
    }
    writer.finish(query_head, reader);
  });
}

// The weights whose largest bounds the sums; null after a softmax, where none exceeds 1.
inline const void* weights_of(const Locations& inputs) { return inputs.weights; }
inline const void* weights_of(const Offsets&) { return nullptr; }

template <template <class> class Writer, class Inputs, class Grads>
cudaError_t launch_backward(Dtype dtype, const Sizes& sizes, const void* grad_output, const void* value,
                            const Inputs& inputs, const Grads& grads, const ValueGrad& value_grad, cudaStream_t stream,
                            Schedule schedule) {
  const BackwardArgs<Inputs, Grads> args{{}, grad_output, value, inputs, grads, value_grad};
  const auto launch_with = [&](auto config, auto kernel) {
    using C = decltype(config);
    return launch<C>(kernel, args, sizes, schedule, kMaxBackwardThreads,
                     CornerTable<C>::kBytesPerThread + Writer<C>::bytes_per_thread(sizes), stream);
  };
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (value_grad.exact_sums != nullptr) {
      const cudaError_t error = find_scale(dtype, sizes, grad_output, weights_of(inputs), value_grad, stream);
      if (error != cudaSuccess) return error;
      return with_any_config<T>(sizes, [&](auto config) {
        return launch_with(config, backward_kernel<decltype(config), Writer, ExactSums>);
      });
    }
    return with_config<T>(sizes, [&](auto config) {
      return launch_with(config, backward_kernel<decltype(config), Writer, AtomicSums>);
    });
  });
}

}  // namespace gpu
}  // namespace dimaskdino
