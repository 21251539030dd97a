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
#include "ukernels.h"

namespace qdeploy {

constexpr int64_t kMaxElements = int64_t{1} << 28;  // of one image of one tensor
constexpr size_t kMaxNodes = 65536;                 // of all members together

struct OpInfo;  // ops/op.h

// "u8", "s16", "f32" or "i32": an activation's type as files call it; and the bytes of an element.
const char* name_of(Dtype type);
int64_t bytes_of(Dtype type);

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;  // [C, H, W], [T, D] or [F], as in the file
  int64_t c, h, w;             // [T, D] is D x T x 1, [F] is F x 1 x 1, and token ids [T] are 1 x T x 1
  Dtype type;
  float scale;
  uint8_t zero_point;
  bool varies = false;  // the number of rows with the length of a text: h is that of the longest

  bool is_f32() const { return type == Dtype::f32; }
  bool is_tokens() const { return shape.size() == 2; }
  // The largest magnitude of its codes, with or without the zero point.
  double most() const { return type == Dtype::s16 ? 32767 : 255; }
};

// What one op keeps of a node. An op that has keys of its own derives a struct that only its family in ops/ knows, but
// for ConvData (ops/conv.h).
struct OpData {
  int bits = 0;  // of the weight codes in the file; 0: no weight
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
  std::vector<int> outputs;  // what the last node writes, or two or more f32 tensors; of an ensemble's member one
};

enum class Combine { none, logits, probs };

struct Graph {
  std::vector<Member> members;
  Combine combine = Combine::none;
  bool preprocess = false;
  int64_t vocabulary = 0;  // of token ids; 0: the input is numbers
  bool variable = false;   // texts may be shorter than the input shape says
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
