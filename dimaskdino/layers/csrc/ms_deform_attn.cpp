// The ops of dimaskdino._C: their schemas, their autocast rules, and the Python module that loads them.
//
// dimaskdino/layers/ms_deform_attn_ops.py registers autograd, vmap, and the shapes that torch.compile sees.
#include <Python.h>

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "checks.h"

TORCH_LIBRARY(dimaskdino, m) {
  m.def("ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits) -> "
      "Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor reference, "
      "Tensor offsets, Tensor logits, bool reference_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> str");
}

namespace dimaskdino {
namespace {

using at::Tensor;

// Under autocast the values are sampled in low precision. Locations, weights and references stay in float32, because
// bfloat16 cannot resolve half a pixel on a level of 256.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast_locations(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor& locations,
                          const Tensor& weights) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("dimaskdino::ms_deform_attn", "")
                       .typed<Tensor(const Tensor&, c10::SymIntArrayRef, const Tensor&, const Tensor&)>();
  const Tensor low = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), value, device);
  const auto type = accumulate_type(low.scalar_type());
  return op.call(low, spatial_shapes, locations.to(type), weights.to(type));
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor autocast_fused(const Tensor& value, c10::SymIntArrayRef spatial_shapes, const Tensor& reference, const Tensor& offsets,
                      const Tensor& logits) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("dimaskdino::ms_deform_attn_fused", "")
                       .typed<Tensor(const Tensor&, c10::SymIntArrayRef, const Tensor&, const Tensor&, const Tensor&)>();
  const Tensor low = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), value, device);
  const auto type = accumulate_type(low.scalar_type());
  const auto shift_type = offsets.scalar_type() == low.scalar_type() && logits.scalar_type() == low.scalar_type()
                              ? low.scalar_type()
                              : type;
  return op.call(low, spatial_shapes, reference.to(type), offsets.to(shift_type), logits.to(shift_type));
}

}  // namespace

TORCH_LIBRARY_IMPL(dimaskdino, AutocastCPU, m) {
  m.impl("ms_deform_attn", &autocast_locations<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
  m.impl("ms_deform_attn_fused", &autocast_fused<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(dimaskdino, AutocastCUDA, m) {
  m.impl("ms_deform_attn", &autocast_locations<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
  m.impl("ms_deform_attn_fused", &autocast_fused<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}

}  // namespace dimaskdino

// Importing dimaskdino._C loads the library, whose initializers register the ops above; the module itself is empty.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
