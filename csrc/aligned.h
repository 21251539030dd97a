// Memory for the kernels: 64-byte aligned, with kOverread readable bytes on both sides.
#pragma once
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

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
    if (is_mapped()) {
      memory_ = map_huge_pages(total());
    } else {
      if (posix_memalign(&memory_, 64, total()) != 0) throw NoMemory(bytes);
      memset(memory_, 0, total());
    }
  }
  ~AlignedBuffer() {
    if (is_mapped()) {
      munmap(memory_, total());
    } else {
      free(memory_);
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
  static constexpr size_t kHugePage = size_t{2} << 20;
  size_t total() const { return bytes_ + 2 * kOverread; }
  bool is_mapped() const { return total() >= kHugePage; }

  static void* map_huge_pages(size_t bytes) {
    const size_t whole = bytes + kHugePage;  // holds an aligned part
    if (whole < bytes) throw NoMemory(bytes);
    void* mapping = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw NoMemory(bytes);
    uint8_t* const start = static_cast<uint8_t*>(mapping);
    const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (head > 0) munmap(start, head);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t kept = head + (bytes + page - 1) / page * page;
    munmap(start + kept, whole - kept);
    madvise(start + head, bytes, MADV_HUGEPAGE);
    return start + head;
  }

  void swap(AlignedBuffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace qdeploy
