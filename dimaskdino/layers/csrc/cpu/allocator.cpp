// Allocates CPU tensors in blocks that can be reused for a tensor of the same size once they are freed.
//
// torch asks for aligned memory. glibc before 2.38 takes a larger block for it and frees the leftovers, which small objects
// then occupy, so a freed block is slightly too small for the same tensor: the memory that is kept for the next image
// grows by a third. Here blocks stay whole and are aligned inside. Used by dimaskdino/cpu.py.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace dimaskdino {
namespace {

constexpr size_t kAlignment = 64;  // as torch's own
constexpr size_t kRoom = kAlignment + sizeof(void*);

// Where a block begins is written in front of its data.
void** begin_of(void* data) { return static_cast<void**>(data) - 1; }

void release(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  std::free(*begin_of(data));
}

class WholeBlocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : allocated(bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void* allocated(size_t bytes) {
    constexpr size_t most = std::numeric_limits<std::ptrdiff_t>::max() - kRoom;
    void* block = bytes > most ? nullptr : std::malloc(bytes + kRoom);
    TORCH_CHECK(block != nullptr, "CPU allocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
    const auto first = reinterpret_cast<uintptr_t>(block) + kRoom;
    void* data = reinterpret_cast<void*>(first - first % kAlignment);
    *begin_of(data) = block;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return data;
  }
};

void use_whole_blocks() {
  static auto* allocator = new WholeBlocks;  // never deleted: tensors are made until the process ends
  c10::SetCPUAllocator(allocator, /*priority=*/1);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dimaskdino, m) { m.def("use_whole_blocks() -> ()"); }

TORCH_LIBRARY_IMPL(dimaskdino, CompositeExplicitAutograd, m) { m.impl("use_whole_blocks", &use_whole_blocks); }

}  // namespace dimaskdino
