// The constants of a file, each read, checked and kept once, however many nodes name it.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "footprint.h"
#include "model_file.h"

namespace qdeploy {

struct Floats {
  std::vector<float> values;    // finite
  double largest_by_count = 0;  // the largest (i + 1)*|values[i]|: what bounds the sums of a pool
};

using SharedFloats = std::shared_ptr<const Floats>;
using SharedBytes = std::shared_ptr<const std::vector<uint8_t>>;

class Constants {
 public:
  Constants(const ModelFile& file, Footprint* footprint) : file_(file), footprint_(*footprint) {}

  // The tensor of this name and shape, as ModelFile::tensor finds it. Throws ModelError.
  SharedFloats floats(const std::string& name, const std::vector<int64_t>& shape, const std::string& where);
  SharedBytes bytes(const std::string& name, const std::vector<int64_t>& shape, const std::string& where);

  // The width that all codes of a tensor of 8 bits fit; a layer that uses 7 bits runs with the faster kernel.
  int used_bits(const FileTensor& codes);

 private:
  const ModelFile& file_;
  Footprint& footprint_;
  std::map<const FileTensor*, SharedFloats> floats_;
  std::map<const FileTensor*, SharedBytes> bytes_;
  std::map<const FileTensor*, int> used_bits_;
};

}  // namespace qdeploy
