// From a sample's location to the four tokens around it, and the readers of locations.
//
// The lanes of a query-head share its samples: lane i computes tokens and weights of sample base + i and writes them to
// a table in shared memory, from which all lanes read. Each warp has a part of the table to itself.
#pragma once

#include "common.cuh"

namespace dimaskdino {
namespace gpu {

// One sample as in the inputs: x and y are a location or an offset, weight is an attention weight or a logit.
template <typename A>
struct Sample {
  A x;
  A y;
  A weight;
};

// The place of a sample between its corners: 0 at the left (upper) ones, 1 at the right (lower) ones.
template <typename A>
struct Place {
  A right;
  A below;

  __device__ bool outside() const { return right < 0; }  // whether all corners are
};

// The corners: upper left, upper right, lower left, lower right.
template <typename A>
struct Corners {
  int tokens[4];  // -1 outside
  A weights[4];   // bilinear times attention weight; 0 outside
  Place<A> place;
};

// x and y are in pixels, with 0 at the center of the first. Comparisons with NaN are false, so NaN is outside.
template <typename A>
__device__ inline Corners<A> make_corners(A x, A y, A weight, const Level& level) {
  Corners<A> corners{{-1, -1, -1, -1}, {0, 0, 0, 0}, {-1, 0}};
  if (x >= -1 && x < level.width && y >= -1 && y < level.height) {
    const A column = floor(x);
    const A row = floor(y);
    const int x0 = static_cast<int>(column);
    const int y0 = static_cast<int>(row);
    const int token = level.start + y0 * level.width + x0;
    const bool left = x0 >= 0;
    const bool right = x0 + 1 < level.width;
    const bool above = y0 >= 0;
    const bool below = y0 + 1 < level.height;
    const A to_right = x - column;
    const A to_below = y - row;
    const A upper = weight * (1 - to_below);
    const A lower = weight * to_below;
    const bool inside[4] = {above && left, above && right, below && left, below && right};
    const int tokens[4] = {token, token + 1, token + level.width, token + level.width + 1};
    const A weights[4] = {upper * (1 - to_right), upper * to_right, lower * (1 - to_right), lower * to_right};
    corners.place = {to_right, to_below};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      corners.tokens[i] = inside[i] ? tokens[i] : -1;
      corners.weights[i] = inside[i] ? weights[i] : 0;
    }
  }
  return corners;
}

template <typename A>
struct alignas(16) Quad {
  A values[4];
};

// A query-head's kLanes entries are padded by one, so that the query-heads of a warp read from different banks.
template <class C>
class CornerTable {
  using A = Acc<typename C::Value>;
  static constexpr int kStride = C::kLanes + 1;

 public:
  static constexpr int64_t kBytesPerThread = kStride * (sizeof(int4) + sizeof(Quad<A>)) / C::kLanes;
  static_assert(kBytesPerThread * C::kLanes == kStride * (sizeof(int4) + sizeof(Quad<A>)), "whole bytes");

  __device__ CornerTable() {
    const int groups = blockDim.x / C::kLanes;
    const int first = threadIdx.x / C::kLanes * kStride;
    tokens_ = reinterpret_cast<int4*>(shared_memory()) + first;
    weights_ = reinterpret_cast<Quad<A>*>(reinterpret_cast<int4*>(shared_memory()) + groups * kStride) + first;
  }

  // Every lane writes its own entry; after that, all can be read.
  __device__ void write(int lane, const Corners<A>& corners) {
    __syncwarp();  // the others may still be reading what was there
    tokens_[lane] = make_int4(corners.tokens[0], corners.tokens[1], corners.tokens[2], corners.tokens[3]);
    weights_[lane] = {{corners.weights[0], corners.weights[1], corners.weights[2], corners.weights[3]}};
    __syncwarp();
  }

  __device__ void read(int sample, int (&tokens)[4], A (&weights)[4]) const {
    const int4 four = tokens_[sample];
    const Quad<A> quad = weights_[sample];
    tokens[0] = four.x, tokens[1] = four.y, tokens[2] = four.z, tokens[3] = four.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = quad.values[i];
  }

 private:
  int4* tokens_;
  Quad<A>* weights_;
};

// The sum over the lanes of a query-head, in every lane.
template <class C, typename A>
__device__ inline A sum_of_lanes(A x) {
#pragma unroll
  for (int mask = C::kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kWarp, x, mask);
  return x;
}

template <class C, typename A>
__device__ inline A max_of_lanes(A x) {
#pragma unroll
  for (int mask = C::kLanes / 2; mask > 0; mask /= 2) {
    const A other = __shfl_xor_sync(kWarp, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

template <typename A>
__device__ inline Sample<A> no_sample() {
  return {static_cast<A>(-INFINITY), 0, 0};
}

// Reads the samples of one query-head from locations and weights. load() and corners() are separate, so that the next
// samples can be loaded while these are processed.
template <class C>
class LocationReader {
 public:
  using A = Acc<typename C::Value>;
  using Inputs = Locations;

  __device__ LocationReader(const Grid& grid, const Inputs& inputs, const QueryHead& query_head)
      : inputs_(inputs),
        first_(query_head.row(grid) * grid.num_samples<C>()),
        count_(query_head.exists ? grid.num_samples<C>() : 0) {}

  __device__ Sample<A> load(int sample) const {
    if (sample >= count_) return no_sample<A>();
    const A* locations = static_cast<const A*>(inputs_.locations) + 2 * (first_ + sample);
    return {locations[0], locations[1], static_cast<const A*>(inputs_.weights)[first_ + sample]};
  }

  __device__ A weight(const Sample<A>& sample) const { return sample.weight; }

  __device__ Corners<A> corners(const Sample<A>& sample, const Level& level) const {
    const A half = 0.5;
    return make_corners<A>(sample.x * level.width - half, sample.y * level.height - half, sample.weight, level);
  }

  __device__ int64_t first() const { return first_; }
  __device__ int count() const { return count_; }

 private:
  const Inputs& inputs_;
  int64_t first_;
  int count_;
};

// The same from reference, offsets and logits. The softmax is over all samples of the query-head, so the constructor
// computes its largest logit and its sum; the logits are read again, from the cache, later.
template <class C>
class OffsetReader {
 public:
  using T = typename C::Value;
  using A = Acc<T>;
  using Inputs = Offsets;

  __device__ OffsetReader(const Grid& grid, const Inputs& inputs, const QueryHead& query_head)
      : inputs_(inputs),
        first_(query_head.row(grid) * grid.num_samples<C>()),
        count_(query_head.exists ? grid.num_samples<C>() : 0) {
    if (query_head.exists) {
      const A* reference =
          static_cast<const A*>(inputs.reference) + query_head.query_row(grid) * inputs.reference_size;
      center_x_ = reference[0];
      center_y_ = reference[1];
      if (is_box()) {
        offset_width_ = half_of_point(grid) * reference[2];
        offset_height_ = half_of_point(grid) * reference[3];
      }
    }
    A largest = -INFINITY;
    for (int i = query_head.lane; i < count_; i += C::kLanes) {
      const A logit = input(inputs_.logits, first_ + i);
      largest = logit > largest ? logit : largest;
    }
    largest_ = max_of_lanes<C>(largest);
    A sum = 0;
    for (int i = query_head.lane; i < count_; i += C::kLanes) sum += exp(input(inputs_.logits, first_ + i) - largest_);
    inverse_sum_ = 1 / sum_of_lanes<C>(sum);
  }

  __device__ Sample<A> load(int sample) const {
    if (sample >= count_) return no_sample<A>();
    return {input(inputs_.offsets, 2 * (first_ + sample)), input(inputs_.offsets, 2 * (first_ + sample) + 1),
            input(inputs_.logits, first_ + sample)};
  }

  __device__ A weight(const Sample<A>& sample) const { return exp(sample.weight - largest_) * inverse_sum_; }

  // For points, offsets are in pixels of the level; for boxes, in halves of the box divided by P.
  __device__ Corners<A> corners(const Sample<A>& sample, const Level& level) const {
    const A half = 0.5;
    const A x = center_x_ * level.width + sample.x * pixels_per_offset_x(level) - half;
    const A y = center_y_ * level.height + sample.y * pixels_per_offset_y(level) - half;
    return make_corners<A>(x, y, weight(sample), level);
  }

  __device__ A pixels_per_offset_x(const Level& level) const {
    return is_box() ? offset_width_ * level.width : 1;
  }
  __device__ A pixels_per_offset_y(const Level& level) const {
    return is_box() ? offset_height_ * level.height : 1;
  }

  __device__ bool low_precision() const { return inputs_.low_precision; }
  __device__ bool is_box() const { return inputs_.reference_size == 4; }
  __device__ static A half_of_point(const Grid& grid) { return A(0.5) / grid.points; }
  __device__ int64_t first() const { return first_; }
  __device__ int count() const { return count_; }

 private:
  __device__ A input(const void* pointer, int64_t index) const {
    return inputs_.low_precision ? A(to_acc(static_cast<const T*>(pointer)[index]))
                                 : static_cast<const A*>(pointer)[index];
  }

  const Inputs& inputs_;
  int64_t first_;
  int count_;
  A center_x_ = 0;
  A center_y_ = 0;
  A offset_width_ = 0;  // for boxes: the part of the level that an offset of 1 is
  A offset_height_ = 0;
  A largest_;
  A inverse_sum_;
};

}  // namespace gpu
}  // namespace dimaskdino
