// Resizes images bilinearly as PIL does, to the last bit, but only the part that is wanted, and into the planes of a
// tensor. Used by dimaskdino/data/pixels.py.
//
// PIL changes the width first and rounds to bytes, then the height. Weights have 22 bits after the point, and cover as many
// pixels as an image shrinks. Source: Pillow, src/libImaging/Resample.c.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

namespace dimaskdino {
namespace {

using at::Tensor;

constexpr int kBits = 22;
constexpr int32_t kHalf = 1 << (kBits - 1);
constexpr int kBlock = 64;  // bytes of a row that are mixed at once
constexpr int kColors = 3, kPixel = 4;  // a pixel of a row being read fills a vector of four

typedef int32_t Pixel __attribute__((vector_size(kPixel * sizeof(int32_t))));

// For each place along a side: the first pixel that it mixes, their number, and `most` weights.
struct Taps {
  int64_t most;
  std::vector<int32_t> first, count, weights;
};

// Of places [begin, begin + number) when a side of `pixels` becomes one of `size`.
Taps taps_of(int64_t pixels, int64_t size, int64_t begin, int64_t number) {
  const double scale = static_cast<double>(pixels) / static_cast<double>(size), reach = std::max(scale, 1.0);
  Taps taps{static_cast<int64_t>(std::ceil(reach)) * 2 + 1, {}, {}, {}};
  taps.weights.resize(number * taps.most);
  std::vector<double> shares(taps.most);
  for (int64_t i = 0; i < number; ++i) {
    const double center = (static_cast<double>(begin + i) + 0.5) * scale;
    const auto first = std::max<int64_t>(static_cast<int64_t>(center - reach + 0.5), 0);
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(center + reach + 0.5), pixels) - first;
    double sum = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double distance = std::abs((static_cast<double>(first + j) - center + 0.5) * (1.0 / reach));
      shares[j] = distance < 1.0 ? 1.0 - distance : 0.0;
      sum += shares[j];
    }
    taps.first.push_back(static_cast<int32_t>(first));
    taps.count.push_back(static_cast<int32_t>(count));
    int32_t* weights = taps.weights.data() + i * taps.most;
    for (int64_t j = 0; j < count; ++j) weights[j] = static_cast<int32_t>(0.5 + shares[j] / sum * (1 << kBits));
  }
  return taps;
}

void spread_row(const uint8_t* from, int64_t width, bool mirrored, int32_t* to) {
  const int64_t step = mirrored ? -kColors : kColors;
  if (mirrored) from += (width - 1) * kColors;
  for (int64_t x = 0; x < width; ++x, from += step, to += kPixel) {
    for (int color = 0; color < kColors; ++color) to[color] = from[color];
  }
}

// The columns of a row, into planes of bytes that lie `plane` apart.
DIMASKDINO_CLONES void mix_columns(const int32_t* row, const Taps& taps, uint8_t* to, int64_t plane) {
  const auto width = static_cast<int64_t>(taps.first.size());
  const int32_t* weights = taps.weights.data();
  for (int64_t x = 0; x < width; ++x, weights += taps.most) {
    const int32_t* from = row + int64_t{kPixel} * taps.first[x];
    Pixel sum = Pixel{} + kHalf;
    for (int32_t i = 0; i < taps.count[x]; ++i, from += kPixel) {
      Pixel pixel;
      memcpy(&pixel, from, sizeof(pixel));
      sum += pixel * weights[i];
    }
    sum >>= kBits;
    for (int color = 0; color < kColors; ++color) to[color * plane + x] = static_cast<uint8_t>(sum[color]);
  }
}

// A weighted sum of rows of bytes, which may be read up to the end of a block.
DIMASKDINO_CLONES void mix_rows(const uint8_t* __restrict__ rows, int64_t step, const int32_t* __restrict__ weights,
                                int32_t count, uint8_t* __restrict__ to, int64_t width) {
  int32_t sums[kBlock];
  for (int64_t x = 0; x < width; x += kBlock) {
    for (int lane = 0; lane < kBlock; ++lane) sums[lane] = kHalf;
    for (int32_t i = 0; i < count; ++i) {
      const uint8_t* __restrict__ from = rows + i * step + x;
      const int32_t weight = weights[i];
      for (int lane = 0; lane < kBlock; ++lane) sums[lane] += from[lane] * weight;
    }
    if (x + kBlock <= width) {
      for (int lane = 0; lane < kBlock; ++lane) to[x + lane] = static_cast<uint8_t>(sums[lane] >> kBits);
    } else {
      for (int lane = 0; x + lane < width; ++lane) to[x + lane] = static_cast<uint8_t>(sums[lane] >> kBits);
    }
  }
}

// Writes the part of an image (H, W, 3), mirrored and resized to (height, width), that begins at row and column `corner`
// into `canvas` (3, h, w).
void resize_window(const Tensor& image, at::IntArrayRef size, at::IntArrayRef corner, bool mirrored, bool upside_down,
                   Tensor canvas) {
  constexpr const char* op = "dimaskdino::resize_window";
  TORCH_CHECK_TYPE(image.scalar_type() == at::kByte && canvas.scalar_type() == at::kByte, op, ": image and canvas must be uint8.");
  TORCH_CHECK_VALUE(image.dim() == 3 && image.size(2) == kColors && image.numel() > 0 && image.is_contiguous(), op,
                    ": image must be (H, W, 3) and contiguous, got ", image.sizes(), ".");
  TORCH_CHECK_VALUE(canvas.dim() == 3 && canvas.size(0) == kColors && canvas.numel() > 0 && canvas.stride(2) == 1, op,
                    ": canvas must be (3, h, w) with rows in one piece, got ", canvas.sizes(), ".");
  TORCH_CHECK_VALUE(size.size() == 2 && corner.size() == 2, op, ": size and corner must have two numbers.");
  for (int side = 0; side < 2; ++side) {
    const int64_t first = corner[side], last = first + canvas.size(side + 1);
    TORCH_CHECK_VALUE(first >= 0 && last <= size[side] && size[side] < int64_t{1} << 24 && image.size(side) < int64_t{1} << 24, op,
                      ": places ", first, " to ", last, " do not lie in an image that is resized from ", image.size(side),
                      " to ", size[side], " px.");
  }
  const int64_t image_height = image.size(0), image_width = image.size(1), height = canvas.size(1), width = canvas.size(2);
  const Taps columns = taps_of(image_width, size[1], corner[1], width), rows = taps_of(image_height, size[0], corner[0], height);
  const int64_t top = rows.first.front(), bottom = rows.first.back() + rows.count.back();
  std::vector<int32_t> row(image_width * kPixel);
  const int64_t step = kColors * width;
  std::vector<uint8_t> mixed((bottom - top) * step + kBlock);
  const uint8_t* pixels = image.const_data_ptr<uint8_t>();
  for (int64_t y = top; y < bottom; ++y) {
    spread_row(pixels + (upside_down ? image_height - 1 - y : y) * image_width * kColors, image_width, mirrored, row.data());
    mix_columns(row.data(), columns, mixed.data() + (y - top) * step, width);
  }
  uint8_t* to = canvas.mutable_data_ptr<uint8_t>();
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* from = mixed.data() + (rows.first[y] - top) * step;
    for (int color = 0; color < kColors; ++color) {
      mix_rows(from + color * width, step, rows.weights.data() + y * rows.most, rows.count[y],
               to + color * canvas.stride(0) + y * canvas.stride(1), width);
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) {
  m.def("resize_window(Tensor image, int[] size, int[] corner, bool mirrored, bool upside_down, Tensor(a!) canvas) -> ()");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) { m.impl("resize_window", &resize_window); }

}  // namespace dimaskdino
