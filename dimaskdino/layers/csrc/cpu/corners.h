// Bilinear samples of maps at points, a block at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include "clones.h"

namespace dimaskdino {

using at::Tensor;

constexpr int kBlock = 256;  // points at a time, so that a block fits in the L1 cache

// The four pixels around each point of a block, and their shares: (upper, lower) x (left, right). A pixel outside the
// map has a share of zero and the place of a pixel inside.
struct Corners {
  int32_t place[4][kBlock];
  float share[4][kBlock];
};

// The two cells beside each place along an axis of `cells`, and their shares.
DIMASKDINO_PART void split_places(Floats x, int32_t cells, Ints* cell, Floats* share) {
  const Floats size = Floats{} + static_cast<float>(cells), least = Floats{} - 2.0f;
  x = x * size - 0.5f;
  // Far outside, or NaN: count as one pixel outside.
  x = choose(x > least, x, least);
  x = choose(x < size, x, size);
  // For numbers that are not negative, truncation is the floor.
  const Ints first = __builtin_convertvector(x + 2.0f, Ints) - 2, zero{};
  const Floats part = x - __builtin_convertvector(first, Floats);
  for (int i = 0; i < 2; ++i) {
    // In place of a pixel that does not exist stands one that does, with a share of zero.
    const Ints wanted = first + i, low = wanted & (wanted > zero), last = zero + (cells - 1), above = low > last;
    cell[i] = (above & last) | (~above & low);
    share[i] = (Floats)((Ints)(i == 0 ? 1.0f - part : part) & (cell[i] == wanted));
  }
}

// Points are (x, y) pairs; 0 and 1 are the outer edges of the map.
DIMASKDINO_CLONES static void find_corners(const float* __restrict__ points, int count, int32_t height, int32_t width,
                                           Corners* __restrict__ out) {
  for (int i = 0; i < count; i += kLanes) {
    Floats x{}, y{};
    const int lanes = count - i < kLanes ? count - i : kLanes;
    for (int j = 0; j < lanes; ++j) {
      x[j] = points[2 * (i + j)];
      y[j] = points[2 * (i + j) + 1];
    }
    Ints column[2], row[2];
    Floats across[2], down[2];
    split_places(x, width, column, across);
    split_places(y, height, row, down);
    for (int j = 0; j < 4; ++j) {
      const Ints place = row[j / 2] * width + column[j % 2];
      memcpy(out->place[j] + i, &place, sizeof(place));
      store_floats(down[j / 2] * across[j % 2], out->share[j] + i);
    }
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

DIMASKDINO_CLONES static void sample(const float* map, const Corners& at, int count, float* out) {
  weigh(map, at, count, out);
}

inline void sample(const bool* map, const Corners& at, int count, float* out) {
  weigh(map, at, count, out);
}

inline void check_points(const Tensor& points, int64_t rows, const char* op) {
  TORCH_CHECK_VALUE(points.dim() == 3 && points.size(0) == rows && points.size(2) == 2, op, ": points must be (", rows,
                    ", P, 2), got ", points.sizes(), ".");
  TORCH_CHECK_TYPE(points.scalar_type() == at::kFloat, op, ": points must be float32, got ", points.scalar_type(), ".");
}

inline void check_maps(const Tensor& maps, at::ScalarType type, const char* op) {
  TORCH_CHECK_VALUE(maps.dim() == 3 && (maps.size(0) == 0 || (maps.size(1) > 0 && maps.size(2) > 0)), op,
                    ": maps must be (N, H, W), got ", maps.sizes(), ".");
  TORCH_CHECK_TYPE(maps.scalar_type() == type, op, ": maps must be ", type, ", got ", maps.scalar_type(), ".");
  // Pixels are counted in 32 bits.
  TORCH_CHECK_VALUE(maps.size(1) * maps.size(2) < int64_t{1} << 31, op, ": maps of ", maps.size(1),
                    " x ", maps.size(2), " pixels are too large.");
}

inline void check_index(const Tensor& index, int64_t masks, const char* op) {
  TORCH_CHECK_VALUE(index.dim() == 1, op, ": index must be (N,), got ", index.sizes(), ".");
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": index must be int64, got ", index.scalar_type(), ".");
  const Tensor rows = index.contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.size(0); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < masks, op, ": index ", row[i], " is not one of ", masks, " masks.");
  }
}

}  // namespace dimaskdino
