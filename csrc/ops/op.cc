#include "op.h"

#include <cmath>

#include "../errors.h"

namespace qdeploy {

void NodeSource::require(bool ok, const std::string& expected, const std::string& got) const {
  qdeploy::require(ok, expected, got, where);
}

SharedFloats NodeSource::floats(const char* key, const std::vector<int64_t>& shape) const {
  return constants.floats(string_member(json, key, where), shape, key_of(key, where));
}

SharedBytes NodeSource::bytes(const char* key, const std::vector<int64_t>& shape) const {
  return constants.bytes(string_member(json, key, where), shape, key_of(key, where));
}

const std::vector<OpInfo>& all_ops() {
  static const std::vector<OpInfo> all = [] {
    std::vector<OpInfo> joined;
    for (const auto& family : {conv_ops(), pool_ops(), elementwise_ops(), move_ops()}) {
      joined.insert(joined.end(), family.begin(), family.end());
    }
    return joined;
  }();
  return all;
}

const OpInfo* find_op(const std::string& name) {
  for (const OpInfo& op : all_ops()) {
    if (name == op.name) return &op;
  }
  return nullptr;
}

void require_bounded(double largest, bool is_f32, const std::string& where, int64_t channel) {
  const int power = is_f32 ? 100 : 30;
  if (largest < std::ldexp(1.0, power)) return;
  const std::string place = channel < 0 ? where : "channel " + std::to_string(channel) + " of " + where;
  fail("results below 2^" + std::to_string(power), "up to " + number_text(largest), place);
}

}  // namespace qdeploy
