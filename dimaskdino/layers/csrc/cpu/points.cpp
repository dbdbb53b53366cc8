// Point sampling on the CPU: bilinear samples of bool masks, and the choice of uncertain points. Neither has a gradient.
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

#include "corners.h"

namespace dimaskdino {
namespace {

Tensor sample_masks(const Tensor& masks, const Tensor& index, const Tensor& points) {
  constexpr const char* op = "dimaskdino::sample_masks";
  check_maps(masks, at::kBool, op);
  check_index(index, masks.size(0), op);
  check_points(points, index.size(0), op);
  const Tensor from = masks.contiguous(), rows = index.contiguous(), at = points.contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) {
  m.def("sample_masks(Tensor masks, Tensor index, Tensor points) -> Tensor");
  m.def("uncertain_points(Tensor logits, int seed, int candidates, int uncertain, int total) -> Tensor");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) {
  m.impl("sample_masks", &sample_masks);
  m.impl("uncertain_points", &uncertain_points);
}

}  // namespace dimaskdino
