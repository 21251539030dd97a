#include "member_reader.h"

#include <algorithm>
#include <set>

#include "errors.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

constexpr float kMinScale = 0x1p-126f, kMaxScale = 0x1p126f;  // 1/scale is a normal f32 as well

bool has_clamp(const Node& node, const Tensor& output) {
  return node.op->output == Output::requantized && output.type == Dtype::u8;
}

constexpr Dtype kTypes[] = {Dtype::u8, Dtype::f32, Dtype::s16, Dtype::i32};  // of activations

// Those of them that files of this version know, in words.
template <class TypeList>
std::string known_types(const TypeList& types, int version) {
  std::vector<std::string> names;
  for (const Dtype type : types) {
    if (version_of(type) <= version) names.push_back(name_of(type));
  }
  return alternatives(names);
}

bool holds(const Types& types, Dtype type) { return std::find(types.begin(), types.end(), type) != types.end(); }

// The keys that a node has: those of its op, clamp where it rounds to u8, residual_multiplier where it has a residual,
// and there those of inner codes, all or none.
std::set<std::string> keys_of(const Json& json, const Node& node, const Tensor& output) {
  std::set<std::string> keys = node.op->keys;
  keys.insert({"op", "name", "inputs", "output"});
  if (output.is_tokens()) keys.insert(node.op->token_keys.begin(), node.op->token_keys.end());
  if (has_clamp(node, output)) keys.insert("clamp");
  if (!node.has_residual) return keys;
  keys.insert("residual_multiplier");
  if (json.contains("inner_clamp")) keys.insert({"inner_clamp", "inner_multiplier", "inner_bias"});
  return keys;
}

// Reads one member; holds what every check needs for its error text.
class MemberReader {
 public:
  MemberReader(const ModelFile& file, Constants* constants, const Json& json, const std::vector<int64_t>& input_shape,
               const Graph& graph)
      : file_(file), constants_(*constants), json_(json), input_shape_(input_shape), graph_(graph) {}

  // `index` of the member in the file.
  Member read(size_t index);

 private:
  void read_input();
  Tensor read_tensor(const Json& json) const;
  Node read_node(const Json& json);
  void read_operands(const Json& json, const std::string& where, Node* node);
  void read_clamp(const Json& json, const std::string& where, Node* node) const;
  void require_same_grid(const Node& node, const std::string& where) const;
  bool has_several_outputs() const { return file_.version() >= kSeveralOutputs && json_.contains("outputs"); }
  void read_outputs();
  void require_complete() const;

  const ModelFile& file_;
  Constants& constants_;
  const Json& json_;
  const std::vector<int64_t>& input_shape_;
  const Graph& graph_;
  Member member_;
  std::vector<bool> written_;    // of each tensor
  std::vector<Rows> rows_;       // likewise
  std::set<std::string> names_;  // of nodes
  std::string where_;            // the member
};

Member MemberReader::read(size_t index) {
  where_ = "member " + std::to_string(index) + " in " + file_.path();
  member_.name = name_member(json_, "name", where_);
  require(member_.name.find('/') == std::string::npos, "a name without `/`", name_text(member_.name),
          key_of("name", where_));
  where_ = place_of(member_, file_);
  std::set<std::string> keys = {"name", "preprocess_table", "tensors", "nodes"};
  if (has_several_outputs()) keys.insert("outputs");
  require_keys(json_, keys, where_);
  for (const Json& entry : array_member(json_, "tensors", kMaxNodes + 1, where_)) {
    member_.tensors.push_back(read_tensor(entry));
  }
  read_input();
  written_.assign(member_.tensors.size(), false);
  written_[0] = true;
  rows_.resize(member_.tensors.size());
  if (graph_.variable) rows_[0] = 0;
  for (const Json& entry : array_member(json_, "nodes", kMaxNodes, where_)) {
    member_.nodes.push_back(read_node(entry));
  }
  for (size_t i = 0; i < rows_.size(); ++i) member_.tensors[i].varies = rows_[i].has_value();
  require(!member_.nodes.empty(), "at least one node", "none", where_);
  require(member_.tensors.size() == member_.nodes.size() + 1, "one tensor more than nodes",
          std::to_string(member_.tensors.size()), where_);
  read_outputs();
  require_complete();
  return std::move(member_);
}

// Tensor 0, and the table that makes it of raw images.
void MemberReader::read_input() {
  require(!member_.tensors.empty(), "at least one tensor", "none", where_);
  const Tensor& in = member_.tensors[0];
  if (graph_.vocabulary > 0) {
    require(in.type == Dtype::i32 && in.shape == input_shape_ && in.shape.size() == 1,
            "an i32 input of one dimension, that of the graph", shape_text(in.shape), where_);
  } else {
    require(in.type == Dtype::u8 && in.shape == input_shape_, "a u8 input of shape " + shape_text(input_shape_),
            shape_text(in.shape), where_);
  }
  const Json& table = member(json_, "preprocess_table", where_);
  if (!graph_.preprocess) return require(table.is_null(), "no preprocess_table", "one", where_);
  const std::string place = key_of("preprocess_table", where_);
  require(!table.is_null(), tensor_text(DType::u8, {in.c, 256}), "null", place);
  const std::string& name = string_member(json_, "preprocess_table", where_);
  member_.preprocess_table = constants_.bytes(name, {in.c, 256}, place);
}

void MemberReader::read_outputs() {
  if (!has_several_outputs()) {
    member_.outputs = {member_.nodes.back().output};
    return;
  }
  const int64_t last = static_cast<int64_t>(member_.tensors.size()) - 1;
  const std::string place = key_of("outputs", where_);
  std::set<int64_t> found;
  for (const int64_t id : int_array(json_, "outputs", 2, kMaxNodes, 0, last, where_)) {
    const Tensor& tensor = member_.tensors[id];
    require(found.insert(id).second, "outputs that differ", "tensor " + std::to_string(id) + " twice", place);
    require(tensor.is_f32(), "f32 outputs", std::string(name_of(tensor.type)) + " tensor " + std::to_string(id), place);
    member_.outputs.push_back(static_cast<int>(id));
  }
}

void MemberReader::require_complete() const {
  const std::set<int> outputs(member_.outputs.begin(), member_.outputs.end());
  for (size_t i = 0; i < written_.size(); ++i) {
    require(written_[i], "every tensor written by a node", "none for tensor " + std::to_string(i), where_);
    require(!member_.tensors[i].is_f32() || outputs.count(static_cast<int>(i)), "f32 for outputs only",
            "tensor " + std::to_string(i), where_);
  }
}

Tensor MemberReader::read_tensor(const Json& json) const {
  Tensor tensor;
  std::string where = "tensor " + std::to_string(member_.tensors.size()) + " of " + where_;
  tensor.name = name_member(json, "name", where);
  where = place_of(tensor, member_, file_);
  require_keys(json, {"name", "dtype", "shape", "scale", "zero_point"}, where);
  const std::string& dtype = string_member(json, "dtype", where);
  const auto found = std::find_if(std::begin(kTypes), std::end(kTypes), [&](Dtype type) {
    return version_of(type) <= file_.version() && dtype == name_of(type);
  });
  require(found != std::end(kTypes), "dtype " + known_types(kTypes, file_.version()), name_text(dtype), where);
  tensor.type = *found;
  tensor.shape = int_array(json, "shape", 1, 3, 1, kMaxElements, where);
  require(!tensor.is_tokens() || file_.version() >= 3, "shape [C, H, W] or [F]", shape_text(tensor.shape), where);
  const bool is_image = tensor.shape.size() == 3;
  tensor.c = tensor.shape[0];
  tensor.h = is_image ? tensor.shape[1] : 1;
  tensor.w = is_image ? tensor.shape[2] : 1;
  if (tensor.is_tokens()) tensor.c = tensor.shape[1], tensor.h = tensor.shape[0];
  if (tensor.type == Dtype::i32 && tensor.shape.size() == 1) std::swap(tensor.c, tensor.h);
  // each factor is at most 2^28, so the first product cannot overflow
  const bool fits = tensor.c * tensor.h < kMaxElements && tensor.c * tensor.h * tensor.w < kMaxElements;
  require(fits, "fewer than 2^28 elements", shape_text(tensor.shape), where);
  tensor.scale = number_member(json, "scale", where);
  require(tensor.scale >= kMinScale && tensor.scale <= kMaxScale, "a scale in [2^-126, 2^126]",
          number_text(tensor.scale), where);
  tensor.zero_point = static_cast<uint8_t>(int_member(json, "zero_point", 0, 255, where));
  if (tensor.type == Dtype::s16) {
    require(tensor.zero_point == 0, "zero point 0 of an s16 tensor", std::to_string(tensor.zero_point), where);
  } else if (tensor.type != Dtype::u8) {
    require(tensor.scale == 1.0f && tensor.zero_point == 0, "scale 1 and zero point 0 of an " + dtype + " tensor",
            "others", where);
  }
  return tensor;
}

Node MemberReader::read_node(const Json& json) {
  Node node;
  std::string where = "node " + std::to_string(member_.nodes.size()) + " of " + where_;
  node.name = name_member(json, "name", where);
  where = place_of(node, member_, file_);
  const std::string& op = string_member(json, "op", where);
  for (const char* key : {"inputs", "output"}) member(json, key, where);
  node.op = find_op(op);
  if (!node.op) fail("an op that this engine has", name_text(op), where);
  require(node.op->version <= file_.version(),
          "format version " + std::to_string(node.op->version) + " for the op " + name_text(op),
          std::to_string(file_.version()), where);
  read_operands(json, where, &node);
  const Tensor& output = member_.tensors[node.output];
  require_keys(json, keys_of(json, node, output), where);
  NodeSource source = {*node.op, json, file_, constants_, where, {}, output, node.has_residual, graph_.vocabulary};
  for (const int input : node.inputs) source.inputs.push_back(&member_.tensors[input]);
  node.data = node.op->read(source);
  if (has_clamp(node, output)) read_clamp(json, where, &node);
  if (node.op->output == Output::same_grid) require_same_grid(node, where);
  require(names_.insert(node.name).second, "unique names", name_text(node.name) + " twice", "the nodes of " + where_);
  std::vector<Rows> rows;
  for (const int input : node.inputs) rows.push_back(rows_[input]);
  rows_[node.output] = node.op->rows(source, rows);
  written_[node.output] = true;
  return node;
}

void MemberReader::read_operands(const Json& json, const std::string& where, Node* node) {
  const int64_t last = static_cast<int64_t>(member_.tensors.size()) - 1;
  const Inputs& count = node->op->inputs;
  for (const int64_t id : int_array(json, "inputs", count.fewest, count.most, 0, last, where)) {
    require(written_[id], "inputs written by an earlier node", "tensor " + std::to_string(id), where);
    const Dtype type = member_.tensors[id].type;
    const bool is_residual = node->op->residual() && node->inputs.size() + 1 == count.most;
    const Types& reads = is_residual ? kCodes : node->op->reads;
    require(holds(reads, type), known_types(reads, file_.version()) + " inputs",
            std::string(name_of(type)) + " tensor " + std::to_string(id), where);
    node->inputs.push_back(static_cast<int>(id));
  }
  node->has_residual = node->op->residual() && node->inputs.size() == count.most;
  node->output = static_cast<int>(int_member(json, "output", 0, last, where));
  require(!written_[node->output], "an output that nothing wrote before", "tensor " + std::to_string(node->output),
          where);
  const Dtype type = member_.tensors[node->output].type;
  require(holds(node->op->writes, type), "a " + known_types(node->op->writes, file_.version()) + " output",
          name_of(type), where);
}

void MemberReader::read_clamp(const Json& json, const std::string& where, Node* node) const {
  const std::array<uint8_t, 2> clamp = clamp_member(json, "clamp", where);
  node->qmin = clamp[0];
  node->qmax = clamp[1];
}

void MemberReader::require_same_grid(const Node& node, const std::string& where) const {
  const Tensor& output = member_.tensors[node.output];
  for (const int id : node.inputs) {
    const Tensor& input = member_.tensors[id];
    require(
        input.type == output.type, "the output's dtype on every input",
        std::string(name_of(input.type)) + " tensor " + std::to_string(id) + " and " + name_of(output.type) + " output",
        where);
    require(input.scale == output.scale && input.zero_point == output.zero_point,
            "the output's scale and zero point on every input", "others on tensor " + std::to_string(id), where);
  }
}

}  // namespace

int version_of(Dtype type) { return type == Dtype::s16 || type == Dtype::i32 ? 3 : 1; }

Member read_member(const ModelFile& file, Constants* constants, const Json& json,
                   const std::vector<int64_t>& input_shape, const Graph& graph) {
  return MemberReader(file, constants, json, input_shape, graph).read(graph.members.size());
}

}  // namespace qdeploy
