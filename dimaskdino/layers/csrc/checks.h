// Checks of the op's arguments, the same for every form and device.
//
// The Python functions check first, and their messages name their own arguments. The checks here keep a direct call
// of torch.ops.dimaskdino.* from reading outside a tensor.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>

namespace dimaskdino {

struct Level {
  int64_t height;
  int64_t width;
  int64_t start;  // the first token of the level
};

struct Problem {
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t channels = 0;  // of one head
  int64_t queries = 0;
  int64_t points = 0;
  c10::SmallVector<Level, 8> levels;

  int64_t samples() const {  // of one query and head
    return static_cast<int64_t>(levels.size()) * points;
  }
  bool empty() const {
    return batch == 0 || tokens == 0 || heads == 0 || channels == 0 || queries == 0 || samples() == 0;
  }
};

// The dtype of locations, weights and references, and of every sum.
inline at::ScalarType accumulate_type(at::ScalarType value_type) {
  return value_type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected, const char* op) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", name, " must be ", expected, ", got ", tensor.scalar_type(),
                   ".");
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& value, const char* op) {
  TORCH_CHECK_VALUE(tensor.device() == value.device(), op, ": ", name, " is on ", tensor.device(), ", but value is on ",
                    value.device(), ".");
}

// Reads the sizes from value (B, S, H, D), flat (height, width, ...), and locations or offsets (B, Q, H, L, P, 2).
inline Problem read_problem(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                            const char* locations_name, const char* op) {
  TORCH_CHECK_VALUE(value.dim() == 4, op, ": value must be (B, S, H, D), got ", value.sizes(), ".");
  TORCH_CHECK_VALUE(locations.dim() == 6 && locations.size(5) == 2, op, ": ", locations_name,
                    " must be (B, Q, H, L, P, 2), got ", locations.sizes(), ".");
  const auto type = value.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": value must be float32, float64, float16 or bfloat16, got ", type, ".");
  TORCH_CHECK_VALUE(spatial_shapes.size() % 2 == 0, op, ": spatial_shapes must be pairs of height and width, got ",
                    spatial_shapes, ".");
  Problem problem;
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.heads = value.size(2);
  problem.channels = value.size(3);
  problem.queries = locations.size(1);
  problem.points = locations.size(4);
  int64_t area = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    // Beyond 2^30 the products below could overflow; so could the kernels, which count rows and columns in 32 bits.
    constexpr int64_t limit = int64_t{1} << 30;
    TORCH_CHECK_VALUE(height >= 0 && width >= 0 && height < limit && width < limit, op,
                      ": heights and widths must lie in 0 to 2^30, got ", spatial_shapes, ".");
    problem.levels.push_back({height, width, area});
    area += height * width;
    TORCH_CHECK_VALUE(area <= problem.tokens, op, ": spatial_shapes ", spatial_shapes, " hold more than the ",
                      problem.tokens, " tokens of value.");
  }
  TORCH_CHECK_VALUE(area == problem.tokens, op, ": spatial_shapes ", spatial_shapes, " hold ", area,
                    " tokens, but value has ", problem.tokens, ".");
  const std::array<int64_t, 6> expected{problem.batch, problem.queries, problem.heads,
                                        static_cast<int64_t>(problem.levels.size()), problem.points, 2};
  TORCH_CHECK_VALUE(locations.sizes() == at::IntArrayRef(expected), op, ": ", locations_name, " must be ",
                    at::IntArrayRef(expected), ", got ", locations.sizes(), ".");
  check_device(locations, locations_name, value, op);
  return problem;
}

inline void check_same_samples(const at::Tensor& tensor, const char* name, const at::Tensor& locations, const char* op) {
  TORCH_CHECK_VALUE(tensor.sizes() == locations.sizes().slice(0, 5), op, ": ", name, " must be ",
                    locations.sizes().slice(0, 5), ", got ", tensor.sizes(), ".");
}

// Sampling locations (B, Q, H, L, P, 2) and attention weights (B, Q, H, L, P), both in the accumulating dtype.
inline Problem check_locations_form(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                                    const at::Tensor& weights) {
  constexpr const char* op = "dimaskdino::ms_deform_attn";
  Problem problem = read_problem(value, spatial_shapes, locations, "sampling_locations", op);
  check_same_samples(weights, "attention_weights", locations, op);
  check_device(weights, "attention_weights", value, op);
  const auto type = accumulate_type(value.scalar_type());
  check_dtype(locations, "sampling_locations", type, op);
  check_dtype(weights, "attention_weights", type, op);
  return problem;
}

// Reference (B, Q, 2 or 4) in the accumulating dtype; offsets (B, Q, H, L, P, 2) and logits (B, Q, H, L, P) in the
// same dtype, either the accumulating one or that of value.
inline Problem check_fused_form(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& reference,
                                const at::Tensor& offsets, const at::Tensor& logits) {
  constexpr const char* op = "dimaskdino::ms_deform_attn_fused";
  Problem problem = read_problem(value, spatial_shapes, offsets, "offsets", op);
  check_same_samples(logits, "logits", offsets, op);
  check_device(logits, "logits", value, op);
  check_device(reference, "reference", value, op);
  TORCH_CHECK_VALUE(reference.dim() == 3 && reference.size(0) == problem.batch && reference.size(1) == problem.queries &&
                        (reference.size(2) == 2 || reference.size(2) == 4),
                    op, ": reference must be (B, Q, 2 or 4) with B ", problem.batch, " and Q ", problem.queries, ", got ",
                    reference.sizes(), ".");
  const auto type = accumulate_type(value.scalar_type());
  check_dtype(reference, "reference", type, op);
  TORCH_CHECK_TYPE(offsets.scalar_type() == type || offsets.scalar_type() == value.scalar_type(), op,
                   ": offsets must be ", type, " or the dtype of value, ", value.scalar_type(), "; got ",
                   offsets.scalar_type(), ".");
  check_dtype(logits, "logits", offsets.scalar_type(), op);
  return problem;
}

// The incoming gradient: (B, Q, H * D) in the dtype of value.
inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Problem& problem,
                              const char* op) {
  const std::array<int64_t, 3> expected{problem.batch, problem.queries, problem.heads * problem.channels};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(expected), op, ": grad_output must be ",
                    at::IntArrayRef(expected), ", got ", grad_output.sizes(), ".");
  check_device(grad_output, "grad_output", value, op);
  check_dtype(grad_output, "grad_output", value.scalar_type(), op);
}

}  // namespace dimaskdino
