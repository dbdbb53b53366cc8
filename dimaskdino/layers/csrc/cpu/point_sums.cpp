// Sums over points on the CPU that losses and costs of masks are made of: cross entropy, and the parts of dice.
//
// With PyTorch's ops, each takes a dozen passes over tensors of all points, some of which are kept for the gradient. Used
// by dimaskdino/layers/points.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "corners.h"

namespace dimaskdino {
namespace {

constexpr float kLeast = -87.0f;  // a logit that adds nothing to sums, to fill up blocks
constexpr int kSums = 4;

// Adds up softplus(x) - x t, s t, s, and t over a block of logits x with labels t; s is the sigmoid of x. At most kBlock
// values, in whole vectors: a product of 32 numbers, each at most 2, does not overflow. Without labels they are zero.
// `sigmoids`, where there are any, may be the logits.
DIMASKDINO_CLONES void add_up(const float* logits, const float* __restrict__ labels, int count,
                              float* sigmoids, double* __restrict__ sums) {
  Floats entropy{}, both{}, probability{}, label{}, product = Floats{} + 1.0f;
  for (int i = 0; i < count; i += kLanes) {
    const Floats x = load_floats(logits + i), t = labels ? load_floats(labels + i) : Floats{};
    const Squashed squashed = squash(x);
    entropy += labels ? squashed.positive - x * t : squashed.positive;
    product *= squashed.factor;
    both += squashed.sigmoid * t;
    probability += squashed.sigmoid;
    label += t;
    if (sigmoids) store_floats(squashed.sigmoid, sigmoids + i);
  }
  for (int i = 0; i < kLanes; ++i) {
    sums[0] += entropy[i] + std::log(product[i]);
    sums[1] += both[i];
    sums[2] += probability[i];
    sums[3] += label[i];
  }
}

// Replaces logits by the derivatives of the sums, weighted by `grad`.
DIMASKDINO_CLONES void differentiate(float* __restrict__ logits, const float* __restrict__ labels, int count,
                                     const float* __restrict__ grad) {
  for (int i = 0; i < count; i += kLanes) {
    const Floats t = load_floats(labels + i), s = squash(load_floats(logits + i)).sigmoid;
    store_floats((s - t) * grad[0] + (t * grad[1] + grad[2]) * (s * (1.0f - s)), logits + i);
  }
}

int whole_vectors(int count) {
  return (count + kLanes - 1) / kLanes * kLanes;
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
    float rest[kLanes];
    for (int64_t row = begin; row < end; ++row) {
      double total[kSums] = {0.0};
      for (int64_t start = 0; start < count; start += kBlock) {
        float* x = all + row * count + start;
        const int here = static_cast<int>(std::min<int64_t>(kBlock, count - start)), left = here % kLanes;
        add_up(x, nullptr, here - left, x, total);
        if (left == 0) continue;
        std::fill(rest, rest + kLanes, kLeast);
        std::copy(x + here - left, x + here, rest);
        add_up(rest, nullptr, kLanes, rest, total);
        std::copy(rest, rest + left, x + here - left);
      }
      out[2 * row] = static_cast<float>(total[0]);
      out[2 * row + 1] = static_cast<float>(total[2]);
    }
  });
  return sums;
}

// Maps, and the masks that are their labels, at the same points.
class Pairs {
 public:
  Pairs(const Tensor& logits, const Tensor& points, const Tensor& masks, const Tensor& index, const char* op)
      : logits_(logits.contiguous()), points_(points.contiguous()), masks_(masks.contiguous()), index_(index.contiguous()) {
    check_maps(logits, at::kFloat, op);
    check_maps(masks, at::kBool, op);
    check_index(index, masks.size(0), op);
    TORCH_CHECK_VALUE(index.size(0) == logits.size(0), op, ": ", logits.size(0), " maps have ", index.size(0), " masks.");
    check_points(points, logits.size(0), op);
  }

  int64_t rows() const {
    return logits_.size(0);
  }
  int64_t points() const {
    return points_.size(1);
  }

  // Logits and labels of `count` points of a row from `start` on, filled up to whole vectors; and where they lie.
  void read(int64_t row, int64_t start, int count, Corners* at, float* logits, float* labels) const {
    const float* point = points_.const_data_ptr<float>() + 2 * (row * points() + start);
    const int64_t mask = index_.const_data_ptr<int64_t>()[row], pixels = masks_.size(1) * masks_.size(2);
    find_corners(point, count, static_cast<int32_t>(masks_.size(1)), static_cast<int32_t>(masks_.size(2)), at);
    sample(masks_.const_data_ptr<bool>() + mask * pixels, *at, count, labels);
    find_corners(point, count, static_cast<int32_t>(logits_.size(1)), static_cast<int32_t>(logits_.size(2)), at);
    sample(logits_.const_data_ptr<float>() + row * logits_.size(1) * logits_.size(2), *at, count, logits);
    std::fill(labels + count, labels + whole_vectors(count), 0.0f);
    std::fill(logits + count, logits + whole_vectors(count), kLeast);
  }

 private:
  const Tensor logits_, points_, masks_, index_;
};

// (N, 4) sums over the points (N, P, 2) of logits x (N, h, w) with labels t, samples of the mask (n, H, W) that `index`
// names: of softplus(x) - x t, sigmoid(x) t, sigmoid(x), and t.
Tensor sums_at_points(const Tensor& logits, const Tensor& points, const Tensor& masks, const Tensor& index) {
  const Pairs pairs(logits, points, masks, index, "dimaskdino::sums_at_points");
  Tensor sums = at::empty({pairs.rows(), kSums}, logits.options());
  at::parallel_for(0, pairs.rows(), 1, [&](int64_t begin, int64_t end) {
    Corners at;
    float x[kBlock], t[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      double total[kSums] = {0.0};
      for (int64_t start = 0; start < pairs.points(); start += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, pairs.points() - start));
        pairs.read(row, start, count, &at, x, t);
        add_up(x, t, whole_vectors(count), nullptr, total);
      }
      std::copy(total, total + kSums, sums.mutable_data_ptr<float>() + row * kSums);
    }
  });
  return sums;
}

// The gradient of the logits, (N, h, w), given that of the sums, (N, 4).
Tensor sums_at_points_backward(const Tensor& grad, const Tensor& logits, const Tensor& points, const Tensor& masks,
                               const Tensor& index) {
  constexpr const char* op = "dimaskdino::sums_at_points_backward";
  const Pairs pairs(logits, points, masks, index, op);
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == pairs.rows() && grad.size(1) == kSums &&
                        grad.scalar_type() == at::kFloat,
                    op, ": the gradient must be (", pairs.rows(), ", ", kSums, ") float32, got ", grad.sizes(), ".");
  const Tensor of_sums = grad.contiguous();
  Tensor out = at::zeros(logits.sizes(), logits.options());
  const int64_t pixels = logits.size(1) * logits.size(2);
  at::parallel_for(0, pairs.rows(), 1, [&](int64_t begin, int64_t end) {
    Corners at;
    float x[kBlock], t[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      float* to = out.mutable_data_ptr<float>() + row * pixels;
      for (int64_t start = 0; start < pairs.points(); start += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, pairs.points() - start));
        pairs.read(row, start, count, &at, x, t);
        differentiate(x, t, whole_vectors(count), of_sums.const_data_ptr<float>() + row * kSums);
        for (int i = 0; i < count; ++i) {
          for (int j = 0; j < 4; ++j) to[at.place[j][i]] += at.share[j][i] * x[i];
        }
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) {
  m.def("sigmoid_and_sums(Tensor(a!) logits) -> Tensor");
  m.def("sums_at_points(Tensor logits, Tensor points, Tensor masks, Tensor index) -> Tensor");
  m.def("sums_at_points_backward(Tensor grad, Tensor logits, Tensor points, Tensor masks, Tensor index) -> Tensor");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) {
  m.impl("sigmoid_and_sums", &sigmoid_and_sums);
  m.impl("sums_at_points", &sums_at_points);
  m.impl("sums_at_points_backward", &sums_at_points_backward);
}

}  // namespace dimaskdino
