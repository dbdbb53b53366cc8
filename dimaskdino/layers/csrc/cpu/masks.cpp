// Turns mask logits into bitmaps of a given size on the CPU: interpolates, thresholds, and sums the probabilities in
// each mask in one pass, with no tensor of interpolated logits. Used by dimaskdino/modeling/postprocessing/masks.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.h"

namespace dimaskdino {
namespace {

using at::Tensor;

// Every pixel along an axis is a weighted sum of `taps` cells of the logits; no weight is negative.
struct Axis {
  int64_t pixels;
  int64_t taps;
  const int32_t* cells;  // (taps, pixels)
  const float* weights;  // (taps, pixels)
};

Axis read_axis(const Tensor& cells, const Tensor& weights, int64_t limit, const char* name) {
  constexpr const char* op = "dimaskdino::resized_masks";
  TORCH_CHECK_TYPE(cells.scalar_type() == at::kInt && weights.scalar_type() == at::kFloat, op, ": the cells of the ", name,
                   " must be int32 and the weights float32.");
  TORCH_CHECK_VALUE(cells.dim() == 2 && cells.sizes() == weights.sizes() && cells.is_contiguous() && weights.is_contiguous(),
                    op, ": cells and weights of the ", name, " must be contiguous (taps, pixels).");
  const Axis axis{cells.size(1), cells.size(0), cells.const_data_ptr<int32_t>(), weights.const_data_ptr<float>()};
  const bool inside = std::all_of(axis.cells, axis.cells + axis.pixels * axis.taps,
                                  [limit](int32_t cell) { return cell >= 0 && cell < limit; });
  TORCH_CHECK_INDEX(inside, op, ": the ", name, " name cells that the logits do not have.");
  return axis;
}

// values += weight * cells
DIMASKDINO_CLONES void add_row(const float* __restrict__ cells, float weight, int64_t count, float* __restrict__ values) {
  for (int64_t i = 0; i < count; ++i) values[i] += weight * cells[i];
}

DIMASKDINO_CLONES void add_columns(const float* __restrict__ row, const int32_t* __restrict__ cells,
                                   const float* __restrict__ weights, int64_t count, float* __restrict__ values) {
  for (int64_t i = 0; i < count; ++i) values[i] += weights[i] * row[cells[i]];
}

// Writes the bitmap of a row of logits, whose room ends at a whole vector, and adds up the sigmoids of the positive ones.
DIMASKDINO_CLONES void close_row(float* __restrict__ logits, int64_t count, bool* __restrict__ mask, double* __restrict__ total,
                                 int64_t* __restrict__ area) {
  Floats lanes{};
  int64_t positive = 0;
  std::fill(logits + count, logits + (count + kLanes - 1) / kLanes * kLanes, 0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load_floats(logits + i), zero{};
    lanes += choose(x > zero, squash(x).sigmoid, zero);
  }
  for (int64_t i = 0; i < count; ++i) {
    mask[i] = logits[i] > 0.0f;
    positive += logits[i] > 0.0f;
  }
  for (int i = 0; i < kLanes; ++i) *total += lanes[i];
  *area += positive;
}

// For each cell, the first pixel that it contributes to, and one past the last.
void reach(const Axis& axis, int64_t cells, std::vector<int64_t>* first, std::vector<int64_t>* last) {
  first->assign(cells, axis.pixels);
  last->assign(cells, 0);
  for (int64_t tap = 0; tap < axis.taps; ++tap) {
    for (int64_t i = 0; i < axis.pixels; ++i) {
      const int32_t cell = axis.cells[tap * axis.pixels + i];
      (*first)[cell] = std::min((*first)[cell], i);
      (*last)[cell] = std::max((*last)[cell], i + 1);
    }
  }
}

// Sets masks (N, H, W) where the interpolated logits (N, h, w) are positive; returns (N, 2): probabilities, pixels.
Tensor resized_masks(const Tensor& logits, const Tensor& row_cells, const Tensor& row_weights, const Tensor& column_cells,
                     const Tensor& column_weights, const Tensor& masks) {
  constexpr const char* op = "dimaskdino::resized_masks";
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.scalar_type() == at::kFloat, op, ": logits must be (N, h, w) float32.");
  const int64_t height = logits.size(1), width = logits.size(2);
  const Axis rows = read_axis(row_cells, row_weights, height, "rows");
  const Axis columns = read_axis(column_cells, column_weights, width, "columns");
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.scalar_type() == at::kBool && masks.is_contiguous() &&
                        masks.size(0) == logits.size(0) && masks.size(1) == rows.pixels && masks.size(2) == columns.pixels,
                    op, ": masks must be contiguous (", logits.size(0), ", ", rows.pixels, ", ", columns.pixels,
                    ") bool, got ", masks.sizes(), ".");
  const Tensor from = logits.contiguous();
  Tensor sums = at::empty({logits.size(0), 2}, logits.options());
  std::vector<int64_t> first, last;
  reach(columns, width, &first, &last);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> across(width), values(columns.pixels + kLanes);
    for (int64_t n = begin; n < end; ++n) {
      const float* map = from.const_data_ptr<float>() + n * height * width;
      bool* mask = masks.mutable_data_ptr<bool>() + n * rows.pixels * columns.pixels;
      std::memset(mask, 0, rows.pixels * columns.pixels);
      double total = 0.0;
      int64_t area = 0;
      for (int64_t y = 0; y < rows.pixels; ++y, mask += columns.pixels) {
        std::fill(across.begin(), across.end(), 0.0f);
        for (int64_t tap = 0; tap < rows.taps; ++tap) {
          const int64_t at = tap * rows.pixels + y;
          add_row(map + rows.cells[at] * width, rows.weights[at], width, across.data());
        }
        // No weight is negative, so a pixel without a positive cell is not in the mask.
        int64_t left = columns.pixels, right = 0;
        for (int64_t x = 0; x < width; ++x) {
          if (across[x] > 0.0f) left = std::min(left, first[x]), right = std::max(right, last[x]);
        }
        if (left >= right) continue;
        std::fill(values.begin() + left, values.begin() + right, 0.0f);
        for (int64_t tap = 0; tap < columns.taps; ++tap) {
          const int64_t at = tap * columns.pixels + left;
          add_columns(across.data(), columns.cells + at, columns.weights + at, right - left, values.data() + left);
        }
        close_row(values.data() + left, right - left, mask + left, &total, &area);
      }
      sums.mutable_data_ptr<float>()[2 * n] = static_cast<float>(total);
      sums.mutable_data_ptr<float>()[2 * n + 1] = static_cast<float>(area);
    }
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) {
  m.def(
      "resized_masks(Tensor logits, Tensor row_cells, Tensor row_weights, Tensor column_cells, Tensor column_weights, "
      "Tensor(a!) masks) -> Tensor");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) {
  m.impl("resized_masks", &resized_masks);
}

}  // namespace dimaskdino
