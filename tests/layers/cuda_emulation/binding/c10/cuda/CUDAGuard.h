// Found before torch's header of that name: a guard that has one device to guard.
#pragma once

#include <c10/core/Device.h>

namespace c10 {
namespace cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};

}  // namespace cuda
}  // namespace c10
