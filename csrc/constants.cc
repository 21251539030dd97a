#include "constants.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace qdeploy {

SharedFloats Constants::floats(const std::string& name, const std::vector<int64_t>& shape, const std::string& where) {
  const FileTensor& tensor = file_.tensor(name, DType::f32, shape, where);
  SharedFloats& kept = floats_[&tensor];
  if (kept) return kept;
  footprint_.add(tensor.bytes);
  auto floats = std::make_shared<Floats>();
  floats->values.resize(tensor.bytes / 4);
  file_.read(tensor.offset, tensor.bytes, floats->values.data());
  double count = 0;
  for (const float v : floats->values) {
    if (!std::isfinite(v)) fail("finite constants", number_text(v), where);
    floats->largest_by_count = std::max(floats->largest_by_count, ++count * std::fabs(static_cast<double>(v)));
  }
  return kept = std::move(floats);
}

SharedBytes Constants::bytes(const std::string& name, const std::vector<int64_t>& shape, const std::string& where) {
  const FileTensor& tensor = file_.tensor(name, DType::u8, shape, where);
  SharedBytes& kept = bytes_[&tensor];
  if (kept) return kept;
  footprint_.add(tensor.bytes);
  auto bytes = std::make_shared<std::vector<uint8_t>>(tensor.bytes);
  file_.read(tensor.offset, tensor.bytes, bytes->data());
  return kept = std::move(bytes);
}

int Constants::used_bits(const FileTensor& codes) {
  int& bits = used_bits_[&codes];
  if (bits > 0) return bits;
  uint8_t used = 0;  // bits that differ from the sign
  std::vector<int8_t> piece(std::min(codes.bytes, size_t{64} << 10));
  for (size_t begin = 0; begin < codes.bytes; begin += piece.size()) {
    const size_t size = std::min(piece.size(), codes.bytes - begin);
    file_.read(codes.offset + begin, size, piece.data());
    for (size_t i = 0; i < size; ++i) used |= static_cast<uint8_t>(piece[i] < 0 ? ~piece[i] : piece[i]);
  }
  for (bits = 2; used >> (bits - 1) != 0;) ++bits;
  return bits;
}

}  // namespace qdeploy
