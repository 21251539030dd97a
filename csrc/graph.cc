#include "graph.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "errors.h"
#include "json.h"

namespace qdeploy {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 28;  // of one image of one tensor
constexpr size_t kMaxMembers = 256;
constexpr size_t kMaxNodes = 65536;
constexpr int64_t kMaxSize = 65535;  // of a kernel, stride, dilation, padding or number of groups
constexpr float kMinScale = 0x1p-126f, kMaxScale = 0x1p126f;  // 1/scale is a normal f32 as well
constexpr double kMaxU8Result = 1073741824.0;                 // 2^30: cvtps2dq of a larger value would wrap
constexpr double kMaxF32Result = 1.2676506002282294e30;       // 2^100: the softmax of such logits stays finite

[[noreturn]] void fail(const std::string& expected, const std::string& got, const std::string& where) {
  throw ModelError("expected " + expected + ", got " + got + " - at " + where);
}

void require(bool ok, const std::string& expected, const std::string& got, const std::string& where) {
  if (!ok) fail(expected, got, where);
}

const char* const kOpNames[] = {"conv2d", "linear", "add", "max_pool2d", "avg_pool2d", "table", "concat", "reshape"};

Op parse_op(const std::string& name, const std::string& where) {
  for (int i = 0; i < 8; ++i) {
    if (name == kOpNames[i]) return static_cast<Op>(i);
  }
  fail("an op that this engine has", name_text(name), where);
}

std::vector<float> floats_of(const ModelFile& file, const FileTensor& tensor, const std::string& where) {
  std::vector<float> values(tensor.bytes / 4);
  file.read(tensor.offset, tensor.bytes, values.data());
  for (const float v : values) {
    if (!std::isfinite(v)) fail("finite constants", std::to_string(v), where);
  }
  return values;
}

std::vector<uint8_t> bytes_of(const ModelFile& file, const FileTensor& tensor) {
  std::vector<uint8_t> values(tensor.bytes);
  file.read(tensor.offset, tensor.bytes, values.data());
  return values;
}

// The width that all codes of a layer of 8 bits fit; one that uses 7 bits runs with the faster kernel.
int used_bits(const ModelFile& file, const FileTensor& codes) {
  uint8_t used = 0;  // bits that differ from the sign
  std::vector<int8_t> piece(std::min(codes.bytes, size_t{64} << 10));
  for (size_t begin = 0; begin < codes.bytes; begin += piece.size()) {
    const size_t size = std::min(piece.size(), codes.bytes - begin);
    file.read(codes.offset + begin, size, piece.data());
    for (size_t i = 0; i < size; ++i) used |= static_cast<uint8_t>(piece[i] < 0 ? ~piece[i] : piece[i]);
  }
  int bits = 2;
  while (used >> (bits - 1) != 0) ++bits;
  return bits;
}

// Reads one member; holds what every check needs for its error text.
class MemberReader {
 public:
  MemberReader(const ModelFile& file, const Json& json, const std::vector<int64_t>& input_shape, bool preprocess)
      : file_(file), json_(json), input_shape_(input_shape), preprocess_(preprocess) {}

  Member read();

 private:
  Tensor read_tensor(const Json& json, const std::string& where) const;
  Node read_node(const Json& json);
  std::set<std::string> keys_of(const Node& node) const;
  void read_operands(const Json& json, Node& node);
  void read_weight(const Json& json, Node& node);
  void read_window(const Json& json, Node& node, bool has_kernel, bool has_dilation);
  void read_clamp(const Json& json, Node& node);
  void read_conv2d(const Json& json, Node& node);
  void read_linear(const Json& json, Node& node);
  void read_add(const Json& json, Node& node);
  void read_pool(const Json& json, Node& node);
  void read_table(const Json& json, Node& node);
  void read_concat(Node& node);
  void read_reshape(Node& node);
  void require_same_grid(const Node& node) const;
  void require_spatial_output(const Node& node, int64_t channels) const;
  void require_real_elements(const Window& window, int d, int64_t size, int64_t windows) const;
  void require_bounded(const Node& node, double largest) const;
  const Tensor& input(const Node& node, size_t i = 0) const { return member_.tensors[node.inputs[i]]; }
  const Tensor& output(const Node& node) const { return member_.tensors[node.output]; }

  const ModelFile& file_;
  const Json& json_;
  const std::vector<int64_t>& input_shape_;
  const bool preprocess_;
  Member member_;
  std::vector<bool> written_;
  std::string where_;
};

std::string shape_of(const Tensor& tensor) { return shape_text(tensor.shape); }

Member MemberReader::read() {
  where_ = file_.path();
  member_.name = name_member(json_, "name", where_);
  where_ = "member " + name_text(member_.name) + " of " + file_.path();
  only_keys(json_, {"name", "preprocess_table", "tensors", "nodes"}, where_);
  for (const Json& entry : array_member(json_, "tensors", kMaxNodes + 1, where_)) {
    const std::string at = "tensor " + std::to_string(member_.tensors.size()) + ", " + where_;
    member_.tensors.push_back(read_tensor(entry, at));
  }
  require(!member_.tensors.empty(), "at least one tensor", "none", where_);
  const Tensor& in = member_.tensors[0];
  require(!in.is_f32 && in.shape == input_shape_, "a u8 input of shape " + shape_text(input_shape_), shape_of(in),
          where_);
  const Json& table = member(json_, "preprocess_table", where_);
  if (preprocess_) {
    const FileTensor& values =
        file_.tensor(string_member(json_, "preprocess_table", where_), DType::u8, {in.c, 256}, where_);
    member_.preprocess_table = bytes_of(file_, values);
  } else {
    require(table.is_null(), "no preprocess_table", "one", where_);
  }

  written_.assign(member_.tensors.size(), false);
  written_[0] = true;
  std::set<std::string> names;
  const std::string member_where = where_;
  for (const Json& entry : array_member(json_, "nodes", kMaxNodes, where_)) {
    where_ = "node " + std::to_string(member_.nodes.size()) + ", " + member_where;
    member_.nodes.push_back(read_node(entry));
    require(names.insert(member_.nodes.back().name).second, "unique node names", "one twice", where_);
  }
  where_ = member_where;
  require(!member_.nodes.empty(), "at least one node", "none", where_);
  require(member_.tensors.size() == member_.nodes.size() + 1, "one tensor more than nodes",
          std::to_string(member_.tensors.size()), where_);
  for (size_t i = 0; i < written_.size(); ++i) {
    require(written_[i], "every tensor written by a node", "none for tensor " + std::to_string(i), where_);
    require(!member_.tensors[i].is_f32 || static_cast<int>(i) == member_.output(), "f32 for the output only",
            "tensor " + std::to_string(i), where_);
  }
  return std::move(member_);
}

Tensor MemberReader::read_tensor(const Json& json, const std::string& where) const {
  Tensor tensor;
  only_keys(json, {"name", "dtype", "shape", "scale", "zero_point"}, where);
  tensor.name = name_member(json, "name", where);
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
          std::to_string(tensor.scale), where);
  tensor.zero_point = static_cast<uint8_t>(int_member(json, "zero_point", 0, 255, where));
  require(!tensor.is_f32 || (tensor.scale == 1.0f && tensor.zero_point == 0),
          "scale 1 and zero point 0 of an f32 tensor", "others", where);
  return tensor;
}

// The keys that a node has: those of its op, clamp where it writes u8, residual_multiplier where it has a residual.
std::set<std::string> MemberReader::keys_of(const Node& node) const {
  static const std::set<std::string> conv2d = {"weight",  "multiplier", "bias",  "stride",
                                               "padding", "dilation",   "groups"};
  static const std::map<Op, std::set<std::string>> of_op = {
      {Op::conv2d, conv2d},
      {Op::linear, {"weight", "multiplier", "bias"}},
      {Op::add, {"multipliers", "bias"}},
      {Op::max_pool2d, {"kernel", "stride", "padding", "dilation"}},
      {Op::avg_pool2d, {"kernel", "stride", "padding", "multiplier", "bias"}},
      {Op::table, {"table"}},
      {Op::concat, {}},
      {Op::reshape, {}}};
  std::set<std::string> keys = of_op.at(node.op);
  const bool has_weight = node.op == Op::conv2d || node.op == Op::linear;
  const bool clamps = has_weight || node.op == Op::add || node.op == Op::avg_pool2d;
  keys.insert({"op", "name", "inputs", "output"});
  if (clamps && !output(node).is_f32) keys.insert("clamp");
  if (has_weight && node.inputs.size() == 2) keys.insert("residual_multiplier");
  return keys;
}

Node MemberReader::read_node(const Json& json) {
  Node node;
  node.name = name_member(json, "name", where_);
  where_ = "node " + name_text(node.name) + ", member " + name_text(member_.name) + " of " + file_.path();
  node.op = parse_op(string_member(json, "op", where_), where_);
  read_operands(json, node);
  only_keys(json, keys_of(node), where_);
  switch (node.op) {
    case Op::conv2d:
      read_conv2d(json, node);
      break;
    case Op::linear:
      read_linear(json, node);
      break;
    case Op::add:
      read_add(json, node);
      break;
    case Op::max_pool2d:
    case Op::avg_pool2d:
      read_pool(json, node);
      break;
    case Op::table:
      read_table(json, node);
      break;
    case Op::concat:
      read_concat(node);
      break;
    case Op::reshape:
      read_reshape(node);
      break;
  }
  written_[node.output] = true;
  return node;
}

void MemberReader::read_operands(const Json& json, Node& node) {
  const int64_t last = static_cast<int64_t>(member_.tensors.size()) - 1;
  size_t fewest = 1, most = 1;
  if (node.op == Op::conv2d || node.op == Op::linear) most = 2;
  if (node.op == Op::add) fewest = most = 2;
  if (node.op == Op::concat) fewest = 2, most = kMaxNodes;
  for (const int64_t id : int_array(json, "inputs", fewest, most, 0, last, where_)) {
    require(written_[id], "inputs written by an earlier node", "tensor " + std::to_string(id), where_);
    require(!member_.tensors[id].is_f32, "u8 inputs", "f32 tensor " + std::to_string(id), where_);
    node.inputs.push_back(static_cast<int>(id));
  }
  node.output = static_cast<int>(int_member(json, "output", 0, last, where_));
  require(!written_[node.output], "an output that nothing wrote before", "tensor " + std::to_string(node.output),
          where_);
  const bool f32_allowed = node.op != Op::max_pool2d && node.op != Op::concat && node.op != Op::reshape;
  require(f32_allowed || !output(node).is_f32, "a u8 output", "f32", where_);
}

void MemberReader::read_window(const Json& json, Node& node, bool has_kernel, bool has_dilation) {
  const auto pair = [&](const char* key, int64_t* to) {
    const std::vector<int64_t> values = int_array(json, key, 2, 2, 1, kMaxSize, where_);
    to[0] = values[0], to[1] = values[1];
  };
  if (has_kernel) pair("kernel", node.window.kernel);
  if (has_dilation) pair("dilation", node.window.dilation);
  pair("stride", node.window.stride);
  const std::vector<int64_t> padding = int_array(json, "padding", 4, 4, 0, kMaxSize, where_);
  for (int i = 0; i < 4; ++i) node.window.padding[i] = padding[i];
}

// The output's shape must be `channels` x OH x OW of the window.
void MemberReader::require_spatial_output(const Node& node, int64_t channels) const {
  const Tensor& in = input(node);
  require(in.shape.size() == 3, "an input of shape [C, H, W]", shape_of(in), where_);
  const Window& window = node.window;
  std::vector<int64_t> expected = {channels};
  for (int d = 0; d < 2; ++d) {
    const int64_t size = d == 0 ? in.h : in.w;
    const int64_t extent = window.dilation[d] * (window.kernel[d] - 1) + 1;  // < 2^57
    const int64_t padded = size + window.padding[d] + window.padding[d + 2];
    require(extent <= padded, "a window that fits the padded input",
            std::to_string(extent) + " over " + std::to_string(padded), where_);
    expected.push_back((padded - extent) / window.stride[d] + 1);
  }
  if (output(node).is_f32 && expected[1] == 1 && expected[2] == 1 && output(node).shape.size() == 1) expected.resize(1);
  require(output(node).shape == expected, "an output of shape " + shape_text(expected), shape_of(output(node)), where_);
}

void MemberReader::require_bounded(const Node& node, double largest) const {
  const double limit = output(node).is_f32 ? kMaxF32Result : kMaxU8Result;
  if (!(largest < limit)) fail("results below " + std::to_string(limit), std::to_string(largest), where_);
}

void MemberReader::read_clamp(const Json& json, Node& node) {
  if (output(node).is_f32) return;
  const std::vector<int64_t> clamp = int_array(json, "clamp", 2, 2, 0, 255, where_);
  require(clamp[0] <= clamp[1], "clamp [lo, hi] with lo <= hi", shape_text(clamp), where_);
  node.qmin = static_cast<uint8_t>(clamp[0]);
  node.qmax = static_cast<uint8_t>(clamp[1]);
}

// Codes, multiplier, bias and residual of conv2d and linear; node.window and node.groups are set.
void MemberReader::read_weight(const Json& json, Node& node) {
  const Json& weight = member(json, "weight", where_);
  const int64_t channels = output(node).c;
  std::vector<int64_t> expected = {channels, input(node).c / node.groups};
  if (node.op == Op::conv2d) expected.insert(expected.end(), {node.window.kernel[0], node.window.kernel[1]});
  const std::vector<int64_t> shape =
      int_array(weight, "shape", expected.size(), expected.size(), 1, kMaxElements, where_);
  require(shape == expected, "a weight of shape " + shape_text(expected), shape_text(shape), where_);
  node.bits = static_cast<int>(int_member(weight, "bits", 2, 8, where_));
  uint64_t per_channel = 1;
  for (size_t i = 1; i < shape.size(); ++i) {
    const bool overflow = __builtin_mul_overflow(per_channel, static_cast<uint64_t>(shape[i]), &per_channel);
    require(!overflow && per_channel < (1u << 24) && per_channel * 255 << (node.bits - 1) < uint64_t{1} << 31,
            "accumulators below 2^31", "weight " + shape_text(shape) + " of " + std::to_string(node.bits) + " bits",
            where_);
  }
  only_keys(weight, {"codes", "shape", "bits"}, where_);
  const int64_t stream = static_cast<int64_t>(per_channel) * channels * node.bits, bytes = (stream + 7) / 8;
  const FileTensor& codes = file_.tensor(string_member(weight, "codes", where_), DType::u8, {bytes}, where_);
  node.codes = codes.offset;
  node.used_bits = node.bits < 8 ? node.bits : used_bits(file_, codes);
  uint8_t last;
  file_.read(codes.offset + codes.bytes - 1, 1, &last);
  require(stream % 8 == 0 || last >> (stream % 8) == 0, "zeros after the last code", "others", where_);
  const auto floats = [&](const char* key) {
    return floats_of(file_, file_.tensor(string_member(json, key, where_), DType::f32, {channels}, where_), where_);
  };
  node.multiplier = floats("multiplier");
  node.bias = floats("bias");
  node.has_residual = node.inputs.size() == 2;
  if (node.has_residual) {
    require(input(node, 1).shape == output(node).shape, "a residual of shape " + shape_of(output(node)),
            shape_of(input(node, 1)), where_);
    node.residual_multiplier = number_member(json, "residual_multiplier", where_);
  }
  read_clamp(json, node);
}

void MemberReader::read_conv2d(const Json& json, Node& node) {
  read_window(json, node, false, true);
  const Json& weight = member(json, "weight", where_);
  const std::vector<int64_t> shape = int_array(weight, "shape", 4, 4, 1, kMaxElements, where_);
  node.window.kernel[0] = shape[2];
  node.window.kernel[1] = shape[3];
  require_spatial_output(node, output(node).c);
  const int64_t in = input(node).c, out = output(node).c;
  node.groups = int_member(json, "groups", 1, kMaxSize, where_);
  require(in % node.groups == 0 && out % node.groups == 0, "groups that divide the channels",
          std::to_string(node.groups), where_);
  read_weight(json, node);
}

void MemberReader::read_linear(const Json& json, Node& node) {
  require(input(node).shape.size() == 1, "an input of shape [F]", shape_of(input(node)), where_);
  require(output(node).shape.size() == 1, "an output of shape [F]", shape_of(output(node)), where_);
  read_weight(json, node);
}

void MemberReader::read_add(const Json& json, Node& node) {
  for (size_t i = 0; i < 2; ++i) {
    require(input(node, i).shape == output(node).shape, "inputs of shape " + shape_of(output(node)),
            shape_of(input(node, i)), where_);
  }
  node.multiplier = number_array(json, "multipliers", 2, where_);
  node.bias.push_back(number_member(json, "bias", where_));
  read_clamp(json, node);
  require_bounded(
      node, 255.0 * std::fabs(node.multiplier[0]) + 255.0 * std::fabs(node.multiplier[1]) + std::fabs(node.bias[0]));
}

void MemberReader::require_same_grid(const Node& node) const {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const bool same =
        input(node, i).scale == output(node).scale && input(node, i).zero_point == output(node).zero_point;
    require(same, "the output's scale and zero point on every input",
            "others on tensor " + std::to_string(node.inputs[i]), where_);
  }
}

// Every window of a pool must hold a real element of the image along dimension d.
void MemberReader::require_real_elements(const Window& window, int d, int64_t size, int64_t windows) const {
  const int64_t step = window.dilation[d], extent = step * (window.kernel[d] - 1) + 1;
  const int64_t before = window.padding[d], after = window.padding[d + 2];
  bool reaches = before < extent && after < extent;
  for (int64_t i = 0; reaches && i < windows && i * window.stride[d] < before;
       ++i) {  // those that start in the padding
    const int64_t start = i * window.stride[d] - before;
    reaches = (start % step + step) % step < size;  // the first element at 0 or later
  }
  require(reaches, "a real element in every window of the pool",
          "padding " + std::to_string(before) + " and " + std::to_string(after) + " on " + std::to_string(size),
          where_);
}

void MemberReader::read_pool(const Json& json, Node& node) {
  const bool is_max = node.op == Op::max_pool2d;
  read_window(json, node, true, is_max);
  require_spatial_output(node, input(node).c);
  const Window& window = node.window;
  const Tensor& in = input(node);
  const Tensor& out = output(node);
  for (int d = 0; d < 2; ++d) require_real_elements(window, d, d == 0 ? in.h : in.w, d == 0 ? out.h : out.w);
  if (is_max) return require_same_grid(node);

  const int64_t elements = window.kernel[0] * window.kernel[1];  // < 2^56
  require(elements * 255 < (int64_t{1} << 31), "a window with sums below 2^31", std::to_string(elements) + " elements",
          where_);
  const FileTensor& multiplier = file_.tensor(string_member(json, "multiplier", where_), DType::f32, {-1}, where_);
  require(multiplier.shape[0] == 1 || multiplier.shape[0] == elements,
          "1 or " + std::to_string(elements) + " multipliers", std::to_string(multiplier.shape[0]), where_);
  node.multiplier = floats_of(file_, multiplier, where_);
  node.bias.push_back(number_member(json, "bias", where_));
  read_clamp(json, node);
  for (size_t i = 0; i < node.multiplier.size(); ++i) {
    const double count = node.multiplier.size() == 1 ? static_cast<double>(elements) : static_cast<double>(i + 1);
    require_bounded(node, 255.0 * count * std::fabs(node.multiplier[i]) + std::fabs(node.bias[0]));
  }
}

void MemberReader::read_table(const Json& json, Node& node) {
  require(input(node).shape == output(node).shape, "an output of shape " + shape_of(input(node)),
          shape_of(output(node)), where_);
  const bool is_f32 = output(node).is_f32;
  const FileTensor& table =
      file_.tensor(string_member(json, "table", where_), is_f32 ? DType::f32 : DType::u8, {256}, where_);
  if (is_f32) {
    node.table_f32 = floats_of(file_, table, where_);
    for (const float value : node.table_f32) require_bounded(node, std::fabs(value));
  } else {
    node.table = bytes_of(file_, table);
  }
}

void MemberReader::read_concat(Node& node) {
  std::vector<int64_t> expected = input(node).shape;
  for (size_t i = 1; i < node.inputs.size(); ++i) {
    const std::vector<int64_t>& shape = input(node, i).shape;
    bool same = shape.size() == expected.size();
    for (size_t d = 1; same && d < shape.size(); ++d) same = shape[d] == expected[d];
    require(same, "inputs that differ in dimension 0 only", shape_text(shape), where_);
    expected[0] += shape[0];  // at most 2^28 * 2^16
  }
  require(output(node).shape == expected, "an output of shape " + shape_text(expected), shape_of(output(node)), where_);
  require_same_grid(node);
}

void MemberReader::read_reshape(Node& node) {
  const Tensor& in = input(node);
  const Tensor& out = output(node);
  require(in.c * in.h * in.w == out.c * out.h * out.w, "an output with as many elements",
          shape_of(in) + " to " + shape_of(out), where_);
  require_same_grid(node);
}

}  // namespace

const char* op_name(Op op) { return kOpNames[static_cast<int>(op)]; }

Graph read_graph(const ModelFile& file) {
  const std::string where = "the graph of " + file.path();
  const std::string& text = file.graph_json();
  const Json json = parse_json(text.data(), text.data() + text.size(), where);
  const Json& input = member(json, "input", where);
  only_keys(json, {"input", "combine", "classes", "members"}, where);
  only_keys(input, {"shape", "preprocess"}, where);
  const std::vector<int64_t> input_shape = int_array(input, "shape", 1, 3, 1, kMaxElements, where);

  Graph graph;
  graph.preprocess = !member(input, "preprocess", where).is_null();
  if (graph.preprocess) {
    require(input_shape.size() == 3, "an input of shape [C, H, W] under preprocess", shape_text(input_shape), where);
    const Json& preprocess = member(input, "preprocess", where);
    only_keys(preprocess, {"mean", "std"}, where);
    const size_t channels = static_cast<size_t>(input_shape[0]);
    number_array(preprocess, "mean", channels, where);
    for (const float std : number_array(preprocess, "std", channels, where)) {
      require(std > 0, "a positive std", std::to_string(std), where);
    }
  }
  size_t nodes = 0;
  for (const Json& entry : array_member(json, "members", kMaxMembers, where)) {
    graph.members.push_back(MemberReader(file, entry, input_shape, graph.preprocess).read());
    nodes += graph.members.back().nodes.size();
    require(nodes <= kMaxNodes, "at most 65536 nodes in all members", std::to_string(nodes), where);
  }
  require(!graph.members.empty(), "at least one member", "none", where);

  const Json& combine = member(json, "combine", where);
  if (graph.members.size() == 1) {
    require(combine.is_null(), "combine null for one member", combine.type_name(), where);
  } else {
    const std::string& rule = string_member(json, "combine", where);
    require(rule == "logits" || rule == "probs", "combine \"logits\" or \"probs\"", name_text(rule), where);
    graph.combine = rule == "logits" ? Combine::logits : Combine::probs;
    const Tensor& first = graph.members[0].tensors[graph.members[0].output()];
    std::set<std::string> names;
    for (const Member& m : graph.members) {
      const Tensor& out = m.tensors[m.output()];
      require(out.is_f32 && out.shape.size() == 1 && out.shape == first.shape, "members that end in one f32 shape [K]",
              shape_of(out), "member " + name_text(m.name) + " of " + file.path());
      require(names.insert(m.name).second, "unique member names", name_text(m.name) + " twice", where);
    }
  }
  const Json& classes = member(json, "classes", where);
  if (!classes.is_null()) {
    const Member& m = graph.members[0];
    const Tensor& out = m.tensors[m.output()];
    require(out.shape.size() == 1, "an output of shape [K] for classes", shape_of(out), where);
    require(static_cast<int64_t>(classes.size()) == out.c && classes.is_array(), std::to_string(out.c) + " class names",
            std::to_string(classes.size()), where);
    for (const Json& name : classes) {
      require(name.is_string(), "class names as strings", name.type_name(), where);
      graph.classes.push_back(name.get<std::string>());
      check_name(graph.classes.back(), "classes, " + where);
    }
  }
  return graph;
}

}  // namespace qdeploy
