// The memory that a model takes, counted before it is taken.
#pragma once
#include <cstdint>

#include "model_file.h"

namespace qdeploy {

// What a loaded model may take for each byte of its file. A layer takes most where its codes are narrowest and its panels
// emptiest: 2 bits of one channel become a quad of 4 bytes in each of 64 lanes, 1,024 bytes for each byte of the file.
// Beyond twice that the same bytes must have been named again and again, in shapes that cannot share panels.
constexpr uint64_t kBytesPerByte = 2048;

class Footprint {
 public:
  explicit Footprint(const ModelFile& file);

  // Throws ModelError, with what all of it would take, where `bytes` more are beyond the memory of this process or out of
  // proportion to the file.
  void check(uint64_t bytes) const;
  void add(uint64_t bytes) {
    check(bytes);
    bytes_ += bytes;
  }
  // Whether `bytes` more are few beside the memory and the file: what makes a model faster may take so much.
  bool is_small(uint64_t bytes) const;
  uint64_t bytes() const { return bytes_; }

 private:
  const ModelFile& file_;
  const uint64_t memory_;
  uint64_t bytes_ = 0;
};

}  // namespace qdeploy
