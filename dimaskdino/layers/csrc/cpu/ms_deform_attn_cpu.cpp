// The four ops on the CPU: buffers, threads, and the choice of the instruction set.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "../checks.h"
#include "kernels.h"

namespace dimaskdino {
namespace {

using at::Tensor;

bool supported(const std::string& name) {
#ifdef DIMASKDINO_X86
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported("avx2");
  }
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "portable";
}

// The widest instruction set of this processor, or the one that DIMASKDINO_CPU_CAPABILITY names.
std::string choose_capability() {
  const char* wanted = std::getenv("DIMASKDINO_CPU_CAPABILITY");
  if (wanted != nullptr && *wanted != '\0') {
    TORCH_CHECK_VALUE(supported(wanted), "DIMASKDINO_CPU_CAPABILITY is '", wanted,
                      "': it must be avx512, avx2 or portable, and one that this processor has.");
    return wanted;
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (supported(name)) return name;
  }
  return "portable";
}

const std::string& capability() {
  static const std::string name = choose_capability();
  return name;
}

std::string cpu_capability() {
  return capability();
}

const cpu::Kernels& kernels(at::ScalarType type) {
  const cpu::Dtype dtype = type == at::kFloat    ? cpu::kFloat32
                           : type == at::kDouble ? cpu::kFloat64
                           : type == at::kHalf   ? cpu::kFloat16
                                                 : cpu::kBFloat16;
#ifdef DIMASKDINO_X86
  if (capability() == "avx512") return cpu::avx512_kernels(dtype);
  if (capability() == "avx2") return cpu::avx2_kernels(dtype);
#endif
  return cpu::portable_kernels(dtype);
}

// The kernels' arguments, and the tensors that they point into.
struct Call {
  cpu::Arguments args{};
  c10::SmallVector<cpu::LevelShape, 8> levels;
  const cpu::Kernels& run;
  Tensor frames;

  Call(const Problem& problem, const Tensor& value) : run(kernels(value.scalar_type())) {
    // Tokens are counted in 32 bits, frames included.
    int64_t frame_tokens = 0;
    for (const Level& level : problem.levels) {
      levels.push_back({level.height, level.width, level.start, frame_tokens});
      frame_tokens += cpu::frame_size(level.height, level.width);
    }
    TORCH_CHECK_VALUE(frame_tokens < int64_t{1} << 31, "dimaskdino::ms_deform_attn: ", problem.tokens,
                      " tokens are more than the CPU kernels can count.");
    args.batch = problem.batch;
    args.tokens = problem.tokens;
    args.heads = problem.heads;
    args.channels = problem.channels;
    args.queries = problem.queries;
    args.points = problem.points;
    args.num_levels = static_cast<int64_t>(levels.size());
    args.levels = levels.data();
    args.frame_tokens = frame_tokens;
    // A framed copy pays off if its tokens are read often; each sample reads four.
    args.framed = 4 * problem.queries * problem.samples() > kFramedReads * frame_tokens;
    args.value = value.const_data_ptr();
  }

  static constexpr int64_t kFramedReads = 4;

  void set_locations(const Tensor& locations, const Tensor& weights) {
    args.locations = locations.const_data_ptr();
    args.weights = weights.const_data_ptr();
  }

  void set_offsets(const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
    args.low_precision = offsets.scalar_type() != reference.scalar_type();
    args.reference_size = reference.size(2);
    args.reference = reference.const_data_ptr();
    args.offsets = offsets.const_data_ptr();
    args.logits = logits.const_data_ptr();
  }

  // Each thread works on some [begin, end) with scratch memory of its own.
  template <class Work>
  static void in_parallel(int64_t tasks, size_t scratch_bytes, const Work& work) {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> memory(new char[scratch_bytes + 64]);
      const auto address = (reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64;
      work(begin, end, reinterpret_cast<void*>(address));
    });
  }

  Tensor forward(const Tensor& value) {
    Tensor output = at::empty({args.batch, args.queries, args.heads * args.channels}, value.options());
    args.output = output.mutable_data_ptr();
    const int64_t slices = args.batch * args.heads, threads = at::get_num_threads();
    // If there are heads for all threads, each frames one head at a time, which then stays in that thread's cache.
    const bool by_head = args.framed && (slices % threads == 0 || slices >= 4 * threads);
    if (args.framed && !by_head) {
      frames = at::empty({slices, args.frame_tokens, args.channels}, value.options());
      args.frames = frames.mutable_data_ptr();
      at::parallel_for(0, slices * cpu::frame_rows(args), 1, [&](int64_t begin, int64_t end) { run.pack(args, begin, end); });
    }
    const int64_t size = run.query_block(args), blocks = (args.queries + size - 1) / size;
    in_parallel(by_head ? slices : slices * blocks, run.forward_scratch(args),
                [&](int64_t begin, int64_t end, void* scratch) { run.forward(args, begin, end, scratch); });
    return output;
  }

  // Fills in the gradients that args points to, and returns the gradient of value.
  Tensor backward(const Tensor& value) {
    const auto sum_options = value.options().dtype(accumulate_type(value.scalar_type()));
    Tensor grad_value;
    if (args.framed) {
      grad_value = at::empty(value.sizes(), value.options());
      args.grad_value = grad_value.mutable_data_ptr();
    } else {
      grad_value = at::zeros(value.sizes(), sum_options);
      args.grad_sums = grad_value.mutable_data_ptr();
    }
    const int64_t slices = args.batch * args.heads;
    args.level_splits = slices < at::get_num_threads() ? args.num_levels : 1;
    in_parallel(slices * args.level_splits, run.backward_scratch(args),
                [&](int64_t begin, int64_t end, void* scratch) { run.backward(args, begin, end, scratch); });
    return grad_value.to(value.scalar_type());
  }
};

Tensor forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& locations, const Tensor& weights) {
  const Problem problem = check_locations_form(value, spatial_shapes, locations, weights);
  if (problem.empty()) return at::zeros({problem.batch, problem.queries, problem.heads * problem.channels}, value.options());
  const Tensor values = value.contiguous(), places = locations.contiguous(), shares = weights.contiguous();
  Call call(problem, values);
  call.set_locations(places, shares);
  return call.forward(values);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value, at::IntArrayRef spatial_shapes,
                                            const Tensor& locations, const Tensor& weights) {
  const Problem problem = check_locations_form(value, spatial_shapes, locations, weights);
  check_grad_output(grad_output, value, problem, "dimaskdino::ms_deform_attn_backward");
  if (problem.empty()) {
    return {at::zeros(value.sizes(), value.options()), at::zeros(locations.sizes(), locations.options()),
            at::zeros(weights.sizes(), weights.options())};
  }
  const Tensor values = value.contiguous(), places = locations.contiguous(), shares = weights.contiguous();
  const Tensor grads = grad_output.contiguous();
  Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  Call call(problem, values);
  call.set_locations(places, shares);
  call.args.grad_output = grads.const_data_ptr();
  call.args.grad_locations = grad_locations.mutable_data_ptr();
  call.args.grad_weights = grad_weights.mutable_data_ptr();
  Tensor grad_value = call.backward(values);
  return {grad_value, grad_locations, grad_weights};
}

Tensor fused_forward(const Tensor& value, at::IntArrayRef spatial_shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
  const Problem problem = check_fused_form(value, spatial_shapes, reference, offsets, logits);
  if (problem.empty()) return at::zeros({problem.batch, problem.queries, problem.heads * problem.channels}, value.options());
  const Tensor values = value.contiguous(), references = reference.contiguous(), shifts = offsets.contiguous();
  const Tensor scores = logits.contiguous();
  Call call(problem, values);
  call.set_offsets(references, shifts, scores);
  return call.forward(values);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(const Tensor& grad_output, const Tensor& value,
                                                          at::IntArrayRef spatial_shapes, const Tensor& reference,
                                                          const Tensor& offsets, const Tensor& logits,
                                                          bool reference_grad) {
  const Problem problem = check_fused_form(value, spatial_shapes, reference, offsets, logits);
  check_grad_output(grad_output, value, problem, "dimaskdino::ms_deform_attn_fused_backward");
  if (problem.empty()) {
    Tensor none = reference_grad ? at::zeros(reference.sizes(), reference.options()) : at::empty({0}, reference.options());
    return {at::zeros(value.sizes(), value.options()), none, at::zeros(offsets.sizes(), offsets.options()),
            at::zeros(logits.sizes(), logits.options())};
  }
  const Tensor values = value.contiguous(), references = reference.contiguous(), shifts = offsets.contiguous();
  const Tensor scores = logits.contiguous(), grads = grad_output.contiguous();
  Tensor weights = at::empty(logits.sizes(), reference.options()), grad_weights = at::empty(logits.sizes(), reference.options());
  Tensor grad_offsets = at::empty(offsets.sizes(), offsets.options());
  Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  Tensor parts;
  Call call(problem, values);
  call.set_offsets(references, shifts, scores);
  const int64_t rows = problem.batch * problem.queries * problem.heads;
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    call.run.softmax(call.args, weights.mutable_data_ptr(), begin, end);
  });
  call.args.weights = weights.const_data_ptr();
  call.args.grad_output = grads.const_data_ptr();
  call.args.grad_weights = grad_weights.mutable_data_ptr();
  call.args.grad_offsets = grad_offsets.mutable_data_ptr();
  call.args.grad_logits = grad_logits.mutable_data_ptr();
  if (reference_grad) {
    parts = at::empty({problem.batch, problem.queries, problem.heads * call.args.num_levels, reference.size(2)},
                      reference.options());
    call.args.grad_reference = parts.mutable_data_ptr();
  }
  Tensor grad_value = call.backward(values);
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) { call.run.softmax_backward(call.args, begin, end); });
  return {grad_value, reference_grad ? parts.sum(2) : at::empty({0}, reference.options()), grad_offsets, grad_logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(dimaskdino, CPU, m) {
  m.impl("ms_deform_attn", &forward);
  m.impl("ms_deform_attn_backward", &backward);
  m.impl("ms_deform_attn_fused", &fused_forward);
  m.impl("ms_deform_attn_fused_backward", &fused_backward);
}

TORCH_LIBRARY_IMPL(dimaskdino, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", &cpu_capability);
}

}  // namespace dimaskdino
