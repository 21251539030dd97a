#include "constants.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "codes.h"
#include "errors.h"

namespace qdeploy {
namespace {

// Of the magnitudes of `width` neighbours.
int64_t largest_sum(const Array<int32_t>& values, int64_t width) {
  int64_t largest = 0, sum = 0, i = 0;
  for (const int32_t value : values) {
    sum += std::abs(int64_t{value});
    if (++i % width == 0) largest = std::max(largest, sum), sum = 0;
  }
  return largest;
}

}  // namespace

SharedFloats Constants::floats(const std::string& name, const std::vector<int64_t>& shape, const std::string& where) {
  const FileTensor& tensor = file_.tensor(name, DType::f32, shape, where);
  SharedFloats& kept = floats_[&tensor];
  if (kept) return kept;
  footprint_.add(tensor.bytes);
  auto floats = std::make_shared<Floats>();
  floats->values = Array<float>(tensor.bytes / 4);
  file_.read(tensor.offset, tensor.bytes, floats->values.data());
  double count = 0;
  for (const float v : floats->values) {
    if (!std::isfinite(v)) fail("finite constants", number_text(v), where);
    const double magnitude = std::fabs(static_cast<double>(v));
    floats->largest = std::max(floats->largest, magnitude);
    floats->largest_by_count = std::max(floats->largest_by_count, ++count * magnitude);
  }
  return kept = std::move(floats);
}

SharedInts Constants::ints(const std::string& name, const std::vector<int64_t>& shape, const std::string& where) {
  const FileTensor& tensor = file_.tensor(name, DType::i32, shape, where);
  require(tensor.bytes > 0, "at least one integer", "none", where);
  SharedInts& kept = ints_[&tensor];
  if (kept) return kept;
  footprint_.add(tensor.bytes);
  auto ints = std::make_shared<Ints>();
  ints->values = Array<int32_t>(tensor.bytes / 4);
  file_.read(tensor.offset, tensor.bytes, ints->values.data());
  const auto range = std::minmax_element(ints->values.begin(), ints->values.end());
  ints->low = *range.first, ints->high = *range.second;
  ints->largest_sum = largest_sum(ints->values, tensor.shape.empty() ? 1 : tensor.shape.back());
  return kept = std::move(ints);
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

SharedCodes Constants::codes(const FileTensor& tensor, int bits, int64_t count) {
  SharedCodes& kept = codes_[{&tensor, bits}];
  if (kept && kept->size() >= static_cast<size_t>(count)) return kept;
  footprint_.add(static_cast<uint64_t>(count));
  std::vector<uint8_t> packed(tensor.bytes + 2 * kCodesPerBlock);
  file_.read(tensor.offset, tensor.bytes, packed.data());
  auto codes = std::make_shared<Array<int8_t>>((count + kCodesPerBlock - 1) / kCodesPerBlock * kCodesPerBlock);
  unpack_codes(packed.data(), bits, 0, count, codes->data());
  return kept = std::move(codes);
}

int Constants::used_bits(const FileTensor& codes) {
  int& bits = used_bits_[&codes];
  if (bits > 0) return bits;
  footprint_.check(codes.bytes);  // which is less than they take when packed: of a sparse file nothing is read
  uint8_t used = 0;               // bits that differ from the sign
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
