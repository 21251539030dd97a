// The integer graph of a model file, checked: after read_graph every shape, operand and constant is what docs/format.md
// says. Only the bound on the accumulators needs the codes themselves; pack.cc checks it when it unpacks them.
//
// Here are the containers, and what holds for a node of any op. What one op needs is read by its row in ops/.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "constants.h"
#include "model_file.h"

namespace qdeploy {

constexpr int64_t kMaxElements = int64_t{1} << 28;  // of one image of one tensor
constexpr size_t kMaxNodes = 65536;                 // of all members together

struct OpInfo;  // ops/op.h

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;  // [C, H, W] or [F], as in the file
  int64_t c, h, w;             // [F] is F x 1 x 1
  bool is_f32;
  float scale;
  uint8_t zero_point;
};

// What one op keeps of a node. An op that has keys of its own derives a struct that only its family in ops/ knows, but
// for ConvData (ops/conv.h).
struct OpData {
  virtual ~OpData() = default;
};

struct Node {
  const OpInfo* op;
  std::string name;
  std::vector<int> inputs;
  int output;
  uint8_t qmin = 0, qmax = 255;  // the clamp of an op that has one
  bool has_residual = false;     // the last input is there and is a residual
  std::unique_ptr<const OpData> data;
};

struct Member {
  std::string name;
  SharedBytes preprocess_table;  // [C][256], or null
  std::vector<Tensor> tensors;
  std::vector<Node> nodes;
  int output() const { return nodes.back().output; }
};

enum class Combine { none, logits, probs };

struct Graph {
  std::vector<Member> members;
  Combine combine = Combine::none;
  bool preprocess = false;
  std::vector<std::string> classes;
};

// Parses and checks the graph of `file`, and counts its constants. Throws ModelError naming the file, the node and what
// was expected.
Graph read_graph(const ModelFile& file, Footprint* footprint);

// Places in errors: "member `net` in FILE", "node `fc` of member `net` in FILE".
std::string place_of(const Member& member, const ModelFile& file);
std::string place_of(const Node& node, const Member& member, const ModelFile& file);
std::string place_of(const Tensor& tensor, const Member& member, const ModelFile& file);

}  // namespace qdeploy
