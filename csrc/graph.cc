#include "graph.h"

#include <algorithm>
#include <set>

#include "errors.h"
#include "json.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

constexpr size_t kMaxMembers = 256;
constexpr float kMinScale = 0x1p-126f, kMaxScale = 0x1p126f;  // 1/scale is a normal f32 as well

std::string graph_place(const ModelFile& file) { return "the graph in " + file.path(); }

// The keys that a node has: those of its op, clamp where it rounds to u8, residual_multiplier where it has a residual.
std::set<std::string> keys_of(const Node& node, bool is_f32) {
  std::set<std::string> keys = node.op->keys;
  keys.insert({"op", "name", "inputs", "output"});
  if (node.op->output == Output::requantized && !is_f32) keys.insert("clamp");
  if (node.has_residual) keys.insert("residual_multiplier");
  return keys;
}

// Reads one member; holds what every check needs for its error text.
class MemberReader {
 public:
  MemberReader(const ModelFile& file, Constants* constants, const Json& json, const std::vector<int64_t>& input_shape,
               bool preprocess)
      : file_(file), constants_(*constants), json_(json), input_shape_(input_shape), preprocess_(preprocess) {}

  // `index` of the member in the file.
  Member read(size_t index);

 private:
  void read_input();
  Tensor read_tensor(const Json& json) const;
  Node read_node(const Json& json);
  void read_operands(const Json& json, const std::string& where, Node* node);
  void read_clamp(const Json& json, const std::string& where, Node* node) const;
  void require_same_grid(const Node& node, const std::string& where) const;
  void require_complete() const;

  const ModelFile& file_;
  Constants& constants_;
  const Json& json_;
  const std::vector<int64_t>& input_shape_;
  const bool preprocess_;
  Member member_;
  std::vector<bool> written_;  // of each tensor
  std::string where_;          // the member
};

Member MemberReader::read(size_t index) {
  where_ = "member " + std::to_string(index) + " in " + file_.path();
  member_.name = name_member(json_, "name", where_);
  where_ = place_of(member_, file_);
  require_keys(json_, {"name", "preprocess_table", "tensors", "nodes"}, where_);
  for (const Json& entry : array_member(json_, "tensors", kMaxNodes + 1, where_)) {
    member_.tensors.push_back(read_tensor(entry));
  }
  read_input();
  written_.assign(member_.tensors.size(), false);
  written_[0] = true;
  std::set<std::string> names;
  for (const Json& entry : array_member(json_, "nodes", kMaxNodes, where_)) {
    member_.nodes.push_back(read_node(entry));
    const std::string& name = member_.nodes.back().name;
    require(names.insert(name).second, "unique names", name_text(name) + " twice", "the nodes of " + where_);
  }
  require_complete();
  return std::move(member_);
}

// Tensor 0, and the table that makes it of raw images.
void MemberReader::read_input() {
  require(!member_.tensors.empty(), "at least one tensor", "none", where_);
  const Tensor& in = member_.tensors[0];
  require(!in.is_f32 && in.shape == input_shape_, "a u8 input of shape " + shape_text(input_shape_),
          shape_text(in.shape), where_);
  const Json& table = member(json_, "preprocess_table", where_);
  if (!preprocess_) return require(table.is_null(), "no preprocess_table", "one", where_);
  const std::string place = key_of("preprocess_table", where_);
  require(!table.is_null(), tensor_text(DType::u8, {in.c, 256}), "null", place);
  const std::string& name = string_member(json_, "preprocess_table", where_);
  member_.preprocess_table = constants_.bytes(name, {in.c, 256}, place);
}

void MemberReader::require_complete() const {
  require(!member_.nodes.empty(), "at least one node", "none", where_);
  require(member_.tensors.size() == member_.nodes.size() + 1, "one tensor more than nodes",
          std::to_string(member_.tensors.size()), where_);
  for (size_t i = 0; i < written_.size(); ++i) {
    require(written_[i], "every tensor written by a node", "none for tensor " + std::to_string(i), where_);
    require(!member_.tensors[i].is_f32 || static_cast<int>(i) == member_.output(), "f32 for the output only",
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
  require(dtype == "u8" || dtype == "f32", "dtype u8 or f32", name_text(dtype), where);
  tensor.is_f32 = dtype == "f32";
  tensor.shape = int_array(json, "shape", 1, 3, 1, kMaxElements, where);
  require(tensor.shape.size() != 2, "shape [C, H, W] or [F]", shape_text(tensor.shape), where);
  tensor.c = tensor.shape[0];
  tensor.h = tensor.shape.size() == 3 ? tensor.shape[1] : 1;
  tensor.w = tensor.shape.size() == 3 ? tensor.shape[2] : 1;
  // each factor is at most 2^28, so the first product cannot overflow
  const bool fits = tensor.c * tensor.h < kMaxElements && tensor.c * tensor.h * tensor.w < kMaxElements;
  require(fits, "fewer than 2^28 elements", shape_text(tensor.shape), where);
  tensor.scale = number_member(json, "scale", where);
  require(tensor.scale >= kMinScale && tensor.scale <= kMaxScale, "a scale in [2^-126, 2^126]",
          number_text(tensor.scale), where);
  tensor.zero_point = static_cast<uint8_t>(int_member(json, "zero_point", 0, 255, where));
  require(!tensor.is_f32 || (tensor.scale == 1.0f && tensor.zero_point == 0),
          "scale 1 and zero point 0 of an f32 tensor", "others", where);
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
  require_keys(json, keys_of(node, output.is_f32), where);
  NodeSource source = {*node.op, json, file_, constants_, where, {}, output, node.has_residual};
  for (const int input : node.inputs) source.inputs.push_back(&member_.tensors[input]);
  node.data = node.op->read(source);
  if (node.op->output == Output::requantized && !output.is_f32) read_clamp(json, where, &node);
  if (node.op->output == Output::same_grid) require_same_grid(node, where);
  written_[node.output] = true;
  return node;
}

void MemberReader::read_operands(const Json& json, const std::string& where, Node* node) {
  const int64_t last = static_cast<int64_t>(member_.tensors.size()) - 1;
  const Inputs& count = node->op->inputs;
  for (const int64_t id : int_array(json, "inputs", count.fewest, count.most, 0, last, where)) {
    require(written_[id], "inputs written by an earlier node", "tensor " + std::to_string(id), where);
    require(!member_.tensors[id].is_f32, "u8 inputs", "f32 tensor " + std::to_string(id), where);
    node->inputs.push_back(static_cast<int>(id));
  }
  node->has_residual = node->op->residual && node->inputs.size() == count.most;
  node->output = static_cast<int>(int_member(json, "output", 0, last, where));
  require(!written_[node->output], "an output that nothing wrote before", "tensor " + std::to_string(node->output),
          where);
  const bool may_be_f32 = node->op->output != Output::same_grid;
  require(may_be_f32 || !member_.tensors[node->output].is_f32, "a u8 output", "f32", where);
}

void MemberReader::read_clamp(const Json& json, const std::string& where, Node* node) const {
  const std::vector<int64_t> clamp = int_array(json, "clamp", 2, 2, 0, 255, where);
  require(clamp[0] <= clamp[1], "clamp [lo, hi] with lo <= hi", shape_text(clamp), where);
  node->qmin = static_cast<uint8_t>(clamp[0]);
  node->qmax = static_cast<uint8_t>(clamp[1]);
}

void MemberReader::require_same_grid(const Node& node, const std::string& where) const {
  const Tensor& output = member_.tensors[node.output];
  for (const int id : node.inputs) {
    const Tensor& input = member_.tensors[id];
    require(input.scale == output.scale && input.zero_point == output.zero_point,
            "the output's scale and zero point on every input", "others on tensor " + std::to_string(id), where);
  }
}

// ---- The graph around the members ---------------------------------------------------------------------------------

// Whether the file takes images that are to be preprocessed.
bool read_preprocess(const Json& input, const std::vector<int64_t>& input_shape, const std::string& input_where) {
  const Json& preprocess = member(input, "preprocess", input_where);
  if (preprocess.is_null()) return false;
  const std::string where = key_of("preprocess", input_where);
  require(input_shape.size() == 3, "an input of shape [C, H, W]", shape_text(input_shape), where);
  require_keys(preprocess, {"mean", "std"}, where);
  const size_t channels = static_cast<size_t>(input_shape[0]);
  number_array(preprocess, "mean", channels, where);
  for (const float std : number_array(preprocess, "std", channels, where)) {
    require(std > 0, "a positive std", number_text(std), where);
  }
  return true;
}

void read_members(const ModelFile& file, Constants* constants, const Json& json,
                  const std::vector<int64_t>& input_shape, Graph* graph) {
  const std::string where = graph_place(file);
  size_t nodes = 0;
  for (const Json& entry : array_member(json, "members", kMaxMembers, where)) {
    MemberReader reader(file, constants, entry, input_shape, graph->preprocess);
    graph->members.push_back(reader.read(graph->members.size()));
    nodes += graph->members.back().nodes.size();
    require(nodes <= kMaxNodes, "at most 65536 nodes in all members", std::to_string(nodes), where);
  }
  require(!graph->members.empty(), "at least one member", "none", where);
}

// A file carries the lowest format version that holds its ops.
void require_lowest_version(const ModelFile& file, const Graph& graph) {
  int lowest = 1;
  for (const Member& member : graph.members) {
    for (const Node& node : member.nodes) lowest = std::max(lowest, node.op->version);
  }
  require(file.version() == lowest, "format version " + std::to_string(lowest) + ", the lowest that holds the ops",
          std::to_string(file.version()), graph_place(file));
}

Combine read_combine(const ModelFile& file, const Json& json, const Graph& graph) {
  const std::string where = graph_place(file);
  const Json& combine = member(json, "combine", where);
  if (graph.members.size() == 1) {
    require(combine.is_null(), "combine null for one member", combine.type_name(), where);
    return Combine::none;
  }
  const std::string& rule = string_member(json, "combine", where);
  require(rule == "logits" || rule == "probs", "`logits` or `probs`", name_text(rule), key_of("combine", where));
  const Tensor& first = graph.members[0].tensors[graph.members[0].output()];
  std::set<std::string> names;
  for (const Member& m : graph.members) {
    const Tensor& out = m.tensors[m.output()];
    require(out.is_f32 && out.shape.size() == 1 && out.shape == first.shape, "members that end in one f32 shape [K]",
            shape_text(out.shape), place_of(m, file));
    require(names.insert(m.name).second, "unique names", name_text(m.name) + " twice", "the members of " + where);
  }
  return rule == "logits" ? Combine::logits : Combine::probs;
}

std::vector<std::string> read_classes(const ModelFile& file, const Json& json, const Graph& graph) {
  const std::string where = graph_place(file);
  const Json& classes = member(json, "classes", where);
  if (classes.is_null()) return {};
  const Tensor& out = graph.members[0].tensors[graph.members[0].output()];
  require(out.shape.size() == 1, "an output of shape [K] for classes", shape_text(out.shape), where);
  const std::string place = key_of("classes", where);
  require(classes.is_array(), "an array", classes.type_name(), place);
  require(static_cast<int64_t>(classes.size()) == out.c, std::to_string(out.c) + " class names",
          std::to_string(classes.size()), where);
  std::vector<std::string> names;
  for (const Json& name : classes) {
    require(name.is_string(), "a string", name.type_name(), place);
    names.push_back(name.get<std::string>());
    check_name(names.back(), place);
  }
  return names;
}

}  // namespace

std::string place_of(const Member& member, const ModelFile& file) {
  return "member " + name_text(member.name) + " in " + file.path();
}

std::string place_of(const Node& node, const Member& member, const ModelFile& file) {
  return "node " + name_text(node.name) + " of " + place_of(member, file);
}

std::string place_of(const Tensor& tensor, const Member& member, const ModelFile& file) {
  return "tensor " + name_text(tensor.name) + " of " + place_of(member, file);
}

Graph read_graph(const ModelFile& file, Footprint* footprint) {
  const std::string where = graph_place(file);
  const std::string& text = file.graph_json();
  const Json json = parse_json(text.data(), text.data() + text.size(), where);
  require_keys(json, {"input", "combine", "classes", "members"}, where);
  const Json& input = member(json, "input", where);
  const std::string input_where = key_of("input", where);
  require_keys(input, {"shape", "preprocess"}, input_where);
  const std::vector<int64_t> input_shape = int_array(input, "shape", 1, 3, 1, kMaxElements, input_where);

  Graph graph;
  Constants constants(file, footprint);
  graph.preprocess = read_preprocess(input, input_shape, input_where);
  read_members(file, &constants, json, input_shape, &graph);
  require_lowest_version(file, graph);
  graph.combine = read_combine(file, json, graph);
  graph.classes = read_classes(file, json, graph);
  return graph;
}

}  // namespace qdeploy
