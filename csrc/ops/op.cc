#include "op.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../errors.h"

namespace qdeploy {

void NodeSource::require(bool ok, const std::string& expected, const std::string& got) const {
  qdeploy::require(ok, expected, got, where);
}

SharedFloats NodeSource::floats(const char* key, const std::vector<int64_t>& shape) const {
  return constants.floats(string_member(json, key, where), shape, key_of(key, where));
}

SharedInts NodeSource::ints(const char* key, const std::vector<int64_t>& shape) const {
  return constants.ints(string_member(json, key, where), shape, key_of(key, where));
}

SharedBytes NodeSource::bytes(const char* key, const std::vector<int64_t>& shape) const {
  return constants.bytes(string_member(json, key, where), shape, key_of(key, where));
}

size_t NodeSource::rank(const char* key) const {
  const FileTensor* tensor = file.find(string_member(json, key, where));
  return tensor ? tensor->shape.size() : 0;
}

const std::string& NodeSource::choice(const char* key, const std::vector<std::string>& choices) const {
  const std::string& value = string_member(json, key, where);
  std::vector<std::string> names;
  for (const std::string& choice : choices) names.push_back(name_text(choice));
  const bool known = std::find(choices.begin(), choices.end(), value) != choices.end();
  qdeploy::require(known, alternatives(names), name_text(value), key_of(key, where));
  return value;
}

void NodeSource::require_output(const std::vector<int64_t>& shape) const {
  require(output.shape == shape, "an output of shape " + shape_text(shape), shape_text(output.shape));
}

Rows fixed_rows(const NodeSource& node, const std::vector<Rows>& inputs) {
  for (const Rows& rows : inputs) {
    node.require(!rows, "inputs whose rows do not depend on a text's length", "others");
  }
  return {};
}

Rows same_rows(const NodeSource& node, const std::vector<Rows>& inputs) {
  for (const Rows& rows : inputs) node.require(rows == inputs[0], "inputs of one length for every text", "others");
  return inputs[0];
}

void write_numbers(const StepRun& run, size_t n, const float* numbers, const void* some, Dtype some_type, void* to) {
  ScaleAddParams params = {};  // multiplier_a 0: fma(some, 0, r) is r
  params.n = n;
  params.a = some;
  params.a_type = some_type;
  params.b = numbers;
  params.b_type = Dtype::f32;
  params.c_type = run.out().type;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  params.c = to;
  run.kernels().scale_add(&params);
}

const std::vector<OpInfo>& all_ops() {
  static const std::vector<OpInfo> all = [] {
    std::vector<OpInfo> joined;
    for (const auto& family :
         {conv_ops(), pool_ops(), elementwise_ops(), move_ops(), token_ops(), attention_ops(), resize_ops()}) {
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
