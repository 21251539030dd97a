// The constants of a file, each read, checked and kept once, however many nodes name it.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "aligned.h"
#include "footprint.h"
#include "model_file.h"

namespace qdeploy {

// Numbers with the slack that kernels may read.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t count) : memory_(count * sizeof(T)) {}

  T* data() { return reinterpret_cast<T*>(memory_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(memory_.data()); }
  size_t size() const { return memory_.bytes() / sizeof(T); }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size(); }
  const T& operator[](size_t i) const { return data()[i]; }

 private:
  AlignedBuffer memory_;
};

struct Floats {
  Array<float> values;          // finite
  double largest = 0;           // |values[i]|
  double largest_by_count = 0;  // (i + 1)*|values[i]|: what bounds the sums of a pool
};

struct Ints {
  Array<int32_t> values;  // at least one
  int32_t low, high;      // the smallest and the largest
  int64_t largest_sum;    // of magnitudes, along the last dimension
};

using SharedFloats = std::shared_ptr<const Floats>;
using SharedInts = std::shared_ptr<const Ints>;
using SharedCodes = std::shared_ptr<const Array<int8_t>>;
using SharedBytes = std::shared_ptr<const std::vector<uint8_t>>;

class Constants {
 public:
  Constants(const ModelFile& file, Footprint* footprint) : file_(file), footprint_(*footprint) {}

  // The tensor of this name and shape, as ModelFile::tensor finds it. Throws ModelError.
  SharedFloats floats(const std::string& name, const std::vector<int64_t>& shape, const std::string& where);
  SharedInts ints(const std::string& name, const std::vector<int64_t>& shape, const std::string& where);
  SharedBytes bytes(const std::string& name, const std::vector<int64_t>& shape, const std::string& where);

  // `count` codes of a weight, unpacked.
  SharedCodes codes(const FileTensor& tensor, int bits, int64_t count);

  // The width that all codes of a tensor of 8 bits fit; a layer that uses 7 bits runs with the faster kernel.
  int used_bits(const FileTensor& codes);

 private:
  const ModelFile& file_;
  Footprint& footprint_;
  std::map<const FileTensor*, SharedFloats> floats_;
  std::map<const FileTensor*, SharedInts> ints_;
  std::map<const FileTensor*, SharedBytes> bytes_;
  std::map<std::pair<const FileTensor*, int>, SharedCodes> codes_;
  std::map<const FileTensor*, int> used_bits_;
};

}  // namespace qdeploy
