// Memory for the kernels: 64-byte aligned, with kOverread readable bytes on both sides.
#pragma once
#include <string.h>

#include <new>
#include <utility>

#include "os.h"
#include "ukernels.h"

namespace qdeploy {

struct NoMemory : std::bad_alloc {
  explicit NoMemory(size_t bytes) : bytes(bytes) {}
  size_t bytes;  // that were asked for
};

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Zeroed. A large buffer is fresh pages, which nobody need zero again, and asks for huge ones: fewer page faults
  // while it is filled, fewer TLB misses while weights stream (0.6 % of ResNet-50).
  explicit AlignedBuffer(size_t bytes) : bytes_(bytes) {
    if (total() < bytes) throw NoMemory(bytes);
    memory_ = is_mapped() ? os::map_pages(total()) : ::operator new(total(), kAlignment, std::nothrow);
    if (!memory_) throw NoMemory(total());
    if (!is_mapped()) memset(memory_, 0, total());
  }
  ~AlignedBuffer() {
    if (is_mapped()) {
      os::unmap_pages(memory_, total());
    } else {
      ::operator delete(memory_, kAlignment);
    }
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  uint8_t* data() const { return memory_ ? static_cast<uint8_t*>(memory_) + kOverread : nullptr; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  size_t total() const { return bytes_ + 2 * kOverread; }
  bool is_mapped() const { return total() >= os::kHugePage; }

  void swap(AlignedBuffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace qdeploy
