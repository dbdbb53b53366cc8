// Point sampling on the CPU: bilinear samples of bool masks, the choice of uncertain points, and the sums over logits
// at points that the matching cost needs. None of these has a gradient.
//
// With PyTorch's ops, the first takes forty passes over tensors of all points, and the second draws from a slow random
// number generator and sorts all candidates. Used by dimaskdino/layers/points.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "clones.h"

namespace dimaskdino {
namespace {

using at::Tensor;

constexpr int kBlock = 256;  // points at a time, so that a block fits in the L1 cache

// The four pixels around each point of a block, and their shares: (upper, lower) x (left, right). A pixel outside the
// map has a share of zero and the place of a pixel inside.
struct Corners {
  int32_t place[4][kBlock];
  float share[4][kBlock];
};

inline int32_t between(int32_t x, int32_t low, int32_t high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

// Points are (x, y) pairs; 0 and 1 are the outer edges of the map. Has no branches, so that it can be vectorized.
DIMASKDINO_CLONES void find_corners(const float* __restrict__ points, int count, int32_t height, int32_t width,
                                    Corners* __restrict__ out) {
  const float columns = static_cast<float>(width), rows = static_cast<float>(height);
  for (int i = 0; i < count; ++i) {
    float x = points[2 * i] * columns - 0.5f, y = points[2 * i + 1] * rows - 0.5f;
    // Far outside, or NaN: count as one pixel outside.
    x = x > -2.0f ? x : -2.0f;
    y = y > -2.0f ? y : -2.0f;
    x = x < columns ? x : columns;
    y = y < rows ? y : rows;
    // For numbers that are not negative, truncation is the floor.
    const int32_t left = static_cast<int32_t>(x + 2.0f) - 2, upper = static_cast<int32_t>(y + 2.0f) - 2;
    const float x1 = x - static_cast<float>(left), y1 = y - static_cast<float>(upper), x0 = 1.0f - x1, y0 = 1.0f - y1;
    // In place of a pixel that does not exist stands one that does, with a share of zero.
    const int32_t column0 = between(left, 0, width - 1), column1 = between(left + 1, 0, width - 1);
    const int32_t row0 = between(upper, 0, height - 1), row1 = between(upper + 1, 0, height - 1);
    const float left_share = column0 == left ? x0 : 0.0f, right_share = column1 == left + 1 ? x1 : 0.0f;
    const float upper_share = row0 == upper ? y0 : 0.0f, lower_share = row1 == upper + 1 ? y1 : 0.0f;
    out->place[0][i] = row0 * width + column0;
    out->place[1][i] = row0 * width + column1;
    out->place[2][i] = row1 * width + column0;
    out->place[3][i] = row1 * width + column1;
    out->share[0][i] = upper_share * left_share;
    out->share[1][i] = upper_share * right_share;
    out->share[2][i] = lower_share * left_share;
    out->share[3][i] = lower_share * right_share;
  }
}

template <class T>
inline void weigh(const T* __restrict__ map, const Corners& __restrict__ at, int count, float* __restrict__ out) {
  for (int i = 0; i < count; ++i) {
    float value = 0.0f;
    for (int j = 0; j < 4; ++j) value += at.share[j][i] * static_cast<float>(map[at.place[j][i]]);
    out[i] = value;
  }
}

DIMASKDINO_CLONES void sample(const float* map, const Corners& at, int count, float* out) {
  weigh(map, at, count, out);
}

void sample(const bool* map, const Corners& at, int count, float* out) {
  weigh(map, at, count, out);
}

void check_points(const Tensor& points, int64_t rows, const char* op) {
  TORCH_CHECK_VALUE(points.dim() == 3 && points.size(0) == rows && points.size(2) == 2, op, ": points must be (", rows,
                    ", P, 2), got ", points.sizes(), ".");
  TORCH_CHECK_TYPE(points.scalar_type() == at::kFloat, op, ": points must be float32, got ", points.scalar_type(), ".");
}

void check_maps(const Tensor& maps, at::ScalarType type, const char* op) {
  TORCH_CHECK_VALUE(maps.dim() == 3 && (maps.size(0) == 0 || (maps.size(1) > 0 && maps.size(2) > 0)), op,
                    ": maps must be (N, H, W), got ", maps.sizes(), ".");
  TORCH_CHECK_TYPE(maps.scalar_type() == type, op, ": maps must be ", type, ", got ", maps.scalar_type(), ".");
  // Pixels are counted in 32 bits.
  TORCH_CHECK_VALUE(maps.size(1) * maps.size(2) < int64_t{1} << 31, op, ": maps of ", maps.size(1),
                    " x ", maps.size(2), " pixels are too large.");
}

Tensor sample_masks(const Tensor& masks, const Tensor& index, const Tensor& points) {
  constexpr const char* op = "dimaskdino::sample_masks";
  check_maps(masks, at::kBool, op);
  TORCH_CHECK_VALUE(index.dim() == 1, op, ": index must be (N,), got ", index.sizes(), ".");
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": index must be int64, got ", index.scalar_type(), ".");
  check_points(points, index.size(0), op);
  const Tensor from = masks.contiguous(), rows = index.contiguous(), at = points.contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < masks.size(0), op, ": index ", row[i], " is not one of ", masks.size(0),
                      " masks.");
  }
  Tensor out = at::empty({at.size(0), at.size(1)}, points.options());
  const float* point = at.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t count = at.size(1), height = masks.size(1), width = masks.size(2);
  at::parallel_for(0, at.size(0), 1, [&](int64_t begin, int64_t end) {
    Corners four;
    for (int64_t i = begin; i < end; ++i) {
      const bool* mask = from.const_data_ptr<bool>() + row[i] * height * width;
      for (int64_t start = i * count, stop = start + count; start < stop; start += kBlock) {
        const int block = static_cast<int>(std::min<int64_t>(kBlock, stop - start));
        find_corners(point + 2 * start, block, static_cast<int32_t>(height), static_cast<int32_t>(width), &four);
        sample(mask, four, block, to + start);
      }
    }
  });
  return out;
}

// SplitMix64 (Steele, Lea, Flood, 2014) as a function of a counter, so that any point can be drawn again by itself.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The i-th point of a stream: two multiples of 2^-24 in [0, 1).
inline void random_point(uint64_t stream, int64_t i, float* point) {
  const uint64_t bits = mix(stream + static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u);
  point[0] = static_cast<float>(static_cast<int32_t>(bits >> 40)) * 0x1p-24f;
  point[1] = static_cast<float>(static_cast<int32_t>(bits >> 8 & 0xffffffu)) * 0x1p-24f;
}

// Finds the k-th smallest magnitude by counting the upper 12 bits: non-negative floats sort in the order of their bits.
class Smallest {
 public:
  void clear(int64_t count) {
    std::memset(bins_, 0, sizeof(bins_));
    values_.resize(count);
    size_ = 0;
  }

  void add(const float* values, int count) {
    for (int i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      values_[size_++] = bits &= 0x7fffffffu;  // of the magnitude
      ++bins_[bits >> 19];
    }
  }

  // The k-th smallest (k from 1). `equal` gets how many of the k smallest have that value.
  uint32_t find(int64_t k, int64_t* equal) {
    uint32_t bin = 0;
    while (bins_[bin] < k) k -= bins_[bin++];
    inside_.clear();
    for (const uint32_t bits : values_) {
      if (bits >> 19 == bin) inside_.push_back(bits);
    }
    std::nth_element(inside_.begin(), inside_.begin() + (k - 1), inside_.end());
    const uint32_t result = inside_[k - 1];
    *equal = std::count(inside_.begin(), inside_.begin() + k, result);
    return result;
  }

  uint32_t operator[](int64_t i) const {
    return values_[i];
  }

 private:
  int64_t bins_[0x1000];
  int64_t size_ = 0;
  std::vector<uint32_t> values_, inside_;
};

// For each map, draws `candidates` uniform points, keeps the `uncertain` ones whose logits are nearest to zero, and
// adds uniform points up to `total`. Each map has its own stream, so the number of threads does not change the result.
Tensor uncertain_points(const Tensor& logits, int64_t seed, int64_t candidates, int64_t uncertain, int64_t total) {
  constexpr const char* op = "dimaskdino::uncertain_points";
  check_maps(logits, at::kFloat, op);
  TORCH_CHECK_VALUE(0 <= uncertain && uncertain <= candidates && uncertain <= total, op, ": ", uncertain, " of ", candidates,
                    " candidates cannot be among ", total, " points.");
  const Tensor from = logits.contiguous();
  const int64_t rows = logits.size(0), height = logits.size(1), width = logits.size(2);
  Tensor out = at::empty({rows, total, 2}, logits.options());
  const float* maps = from.const_data_ptr<float>();
  float* points = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Smallest smallest;
    std::vector<float> chosen(2 * (uncertain + 1));
    for (int64_t row = begin; row < end; ++row) {
      const uint64_t stream = mix(mix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(row) * 0xd1342543de82ef95u);
      float* to = points + row * total * 2;
      if (uncertain > 0) {
        smallest.clear(candidates);
        Corners at;
        float block[2 * kBlock], values[kBlock];
        for (int64_t start = 0; start < candidates; start += kBlock) {
          const int count = static_cast<int>(std::min<int64_t>(kBlock, candidates - start));
          for (int i = 0; i < count; ++i) random_point(stream, start + i, block + 2 * i);
          find_corners(block, count, static_cast<int32_t>(height), static_cast<int32_t>(width), &at);
          sample(maps + row * height * width, at, count, values);
          smallest.add(values, count);
        }
        int64_t equal = 0, kept = 0;
        const uint32_t last = smallest.find(uncertain, &equal);
        // Without branches: a quarter of the candidates is kept, in an order that a processor cannot predict.
        for (int64_t i = 0; i < candidates; ++i) {
          random_point(stream, i, chosen.data() + 2 * kept);
          const bool is_last = smallest[i] == last;
          kept += (smallest[i] < last) | (is_last & (equal > 0));
          equal -= is_last;
        }
        std::memcpy(to, chosen.data(), uncertain * 2 * sizeof(float));
      }
      for (int64_t i = uncertain; i < total; ++i) random_point(stream, candidates + i, to + 2 * i);
    }
  });
  return out;
}

constexpr int kLanes = 8;

// Replaces 8 * blocks logits by their sigmoids, and sums softplus and sigmoid in lanes.
// softplus(x) is max(x, 0) + log(1 + exp(-|x|)), and a sum of logarithms is the logarithm of a product.
DIMASKDINO_CLONES void squash(float* __restrict__ x, int blocks, float* __restrict__ positive, float* __restrict__ product,
                              float* __restrict__ probability) {
  for (int block = 0; block < blocks; ++block, x += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float above = x[i] > 0.0f ? x[i] : 0.0f, below = x[i] - above;
      const float small = exp_of_negative(below - above), whole = 1.0f + small, value = (x[i] > 0.0f ? 1.0f : small) / whole;
      positive[i] += above;
      product[i] *= whole;
      probability[i] += value;
      x[i] = value;
    }
  }
}

// Replaces logits (N, P) by their sigmoids, and returns (N, 2) sums over P: of softplus and of the sigmoids.
Tensor sigmoid_and_sums(const Tensor& logits) {
  constexpr const char* op = "dimaskdino::sigmoid_and_sums";
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == at::kFloat, op,
                    ": logits must be contiguous (N, P) float32.");
  const int64_t count = logits.size(1);
  Tensor sums = at::empty({logits.size(0), 2}, logits.options());
  float *all = logits.mutable_data_ptr<float>(), *out = sums.mutable_data_ptr<float>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* x = all + row * count;
      double softplus = 0.0, sigmoid = 0.0;
      for (int64_t start = 0; start < count; start += kBlock) {
        // A product of 32 numbers, each at most 2, does not overflow.
        float positive[kLanes] = {0.0f}, probability[kLanes] = {0.0f}, product[kLanes], rest[kLanes];
        std::fill(product, product + kLanes, 1.0f);
        const int64_t here = std::min<int64_t>(kBlock, count - start), left = here % kLanes;
        squash(x + start, static_cast<int>(here / kLanes), positive, product, probability);
        if (left > 0) {
          // The last ones get a block of their own, padded with logits that add nothing.
          std::fill(rest, rest + kLanes, -std::numeric_limits<float>::infinity());
          std::memcpy(rest, x + start + here - left, left * sizeof(float));
          squash(rest, 1, positive, product, probability);
          std::memcpy(x + start + here - left, rest, left * sizeof(float));
        }
        for (int i = 0; i < kLanes; ++i) {
          softplus += positive[i] + std::log(product[i]);
          sigmoid += probability[i];
        }
      }
      out[2 * row] = static_cast<float>(softplus);
      out[2 * row + 1] = static_cast<float>(sigmoid);
    }
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) {
  m.def("sigmoid_and_sums(Tensor(a!) logits) -> Tensor");
  m.def("sample_masks(Tensor masks, Tensor index, Tensor points) -> Tensor");
  m.def("uncertain_points(Tensor logits, int seed, int candidates, int uncertain, int total) -> Tensor");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) {
  m.impl("sigmoid_and_sums", &sigmoid_and_sums);
  m.impl("sample_masks", &sample_masks);
  m.impl("uncertain_points", &uncertain_points);
}

}  // namespace dimaskdino
