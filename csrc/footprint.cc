#include "footprint.h"

#include "cpu.h"
#include "errors.h"

namespace qdeploy {

Footprint::Footprint(const ModelFile& file) : file_(file), memory_(memory_limit("")) {}

void Footprint::check(uint64_t bytes) const {
  const uint64_t sum = bytes_ + bytes;  // each summand is below 2^62, and the sum before it within the memory
  const std::string got = std::to_string(sum) + " bytes", where = "the graph in " + file_.path();
  require(sum <= memory_, "weights that fit the " + std::to_string(memory_) + " bytes of memory", got, where);
  require(sum / kBytesPerByte <= file_.bytes(),
          "weights of at most " + std::to_string(kBytesPerByte) + " bytes for each of the file's " +
              std::to_string(file_.bytes()),
          got, where);
}

bool Footprint::is_small(uint64_t bytes) const {
  const uint64_t all = bytes_ + bytes;
  return all <= memory_ / 4 && all / kBytesPerByte < file_.bytes();
}

}  // namespace qdeploy
