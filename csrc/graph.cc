#include "graph.h"

#include <algorithm>
#include <set>

#include "errors.h"
#include "json.h"
#include "member_reader.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

constexpr size_t kMaxMembers = 256;

std::string graph_place(const ModelFile& file) { return "the graph in " + file.path(); }

// What goes with token ids.
void read_text(const Json& input, const std::string& where, Graph* graph) {
  const std::string& dtype = string_member(input, "dtype", where);
  require(dtype == "i32", "dtype i32 of token ids", name_text(dtype), where);
  require(!member(input, "vocabulary", where).is_null(), "an integer", "null", key_of("vocabulary", where));
  graph->vocabulary = int_member(input, "vocabulary", 1, kMaxElements, where);
  const Json& variable = member(input, "variable", where);
  require(variable.is_boolean(), "a boolean", variable.type_name(), key_of("variable", where));
  graph->variable = variable.get<bool>();
}

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
    graph->members.push_back(read_member(file, constants, entry, input_shape, *graph));
    nodes += graph->members.back().nodes.size();
    require(nodes <= kMaxNodes, "at most 65536 nodes in all members", std::to_string(nodes), where);
  }
  require(!graph->members.empty(), "at least one member", "none", where);
}

// The first format version that has the op of a node for its inputs.
int version_of(const Member& member, const Node& node) {
  if (!node.op->version_of) return node.op->version;
  std::vector<const Tensor*> inputs;
  for (const int input : node.inputs) inputs.push_back(&member.tensors[input]);
  return std::max(node.op->version, node.op->version_of(node, inputs));
}

// A file carries the lowest format version that holds its ops, and the types and shapes of its tensors.
void require_lowest_version(const ModelFile& file, const Graph& graph) {
  int lowest = 1;
  for (const Member& member : graph.members) {
    if (member.outputs.size() > 1) lowest = kSeveralOutputs;
    for (const Node& node : member.nodes) lowest = std::max(lowest, version_of(member, node));
    for (const Tensor& tensor : member.tensors) {
      lowest = std::max({lowest, version_of(tensor.type), tensor.is_tokens() ? 3 : 1});
    }
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
  const Tensor& first = graph.members[0].tensors[graph.members[0].outputs[0]];
  std::set<std::string> names;
  for (const Member& m : graph.members) {
    require(m.outputs.size() == 1, "one output of a member of an ensemble", std::to_string(m.outputs.size()),
            place_of(m, file));
    const Tensor& out = m.tensors[m.outputs[0]];
    require(out.is_f32() && out.shape.size() == 1 && out.shape == first.shape, "members that end in one f32 shape [K]",
            shape_text(out.shape), place_of(m, file));
    require(names.insert(m.name).second, "unique names", name_text(m.name) + " twice", "the members of " + where);
  }
  return rule == "logits" ? Combine::logits : Combine::probs;
}

std::vector<std::string> read_classes(const ModelFile& file, const Json& json, const Graph& graph) {
  const std::string where = graph_place(file);
  const Json& classes = member(json, "classes", where);
  if (classes.is_null()) return {};
  const std::vector<int>& outputs = graph.members[0].outputs;
  require(outputs.size() == 1, "one output for classes", std::to_string(outputs.size()), where);
  const Tensor& out = graph.members[0].tensors[outputs[0]];
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

const char* name_of(Dtype type) {
  switch (type) {
    case Dtype::u8:
      return "u8";
    case Dtype::s16:
      return "s16";
    case Dtype::s8:
      return "s8";
    case Dtype::f32:
      return "f32";
    case Dtype::i32:
      return "i32";
  }
  return "";
}

int64_t bytes_of(Dtype type) { return type == Dtype::u8 || type == Dtype::s8 ? 1 : type == Dtype::s16 ? 2 : 4; }

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
  const bool is_text = file.version() >= 3 && input.is_object() && input.contains("dtype");
  const std::set<std::string> text_keys = {"shape", "dtype", "vocabulary", "variable", "preprocess"};
  require_keys(input, is_text ? text_keys : std::set<std::string>{"shape", "preprocess"}, input_where);
  const std::vector<int64_t> input_shape = int_array(input, "shape", 1, 3, 1, kMaxElements, input_where);

  Graph graph;
  if (is_text) read_text(input, input_where, &graph);
  Constants constants(file, footprint);
  graph.preprocess = read_preprocess(input, input_shape, input_where);
  read_members(file, &constants, json, input_shape, &graph);
  require_lowest_version(file, graph);
  graph.combine = read_combine(file, json, graph);
  graph.classes = read_classes(file, json, graph);
  return graph;
}

}  // namespace qdeploy
