// The integer graph of a model file, checked: after read_graph every shape, operand and constant is what docs/format.md
// says. Only the bound on the accumulators needs the codes themselves; pack.cc checks it when it unpacks them.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model_file.h"

namespace qdeploy {

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;  // [C, H, W] or [F], as in the file
  int64_t c, h, w;             // [F] is F x 1 x 1
  bool is_f32;
  float scale;
  uint8_t zero_point;
};

enum class Op { conv2d, linear, add, max_pool2d, avg_pool2d, table, concat, reshape };
const char* op_name(Op op);

// Kernel, stride... of a window; [0] is vertical, [1] horizontal; padding is top, left, bottom, right.
struct Window {
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t dilation[2] = {1, 1};
  int64_t padding[4] = {0, 0, 0, 0};
};

struct Node {
  Op op;
  std::string name;
  std::vector<int> inputs;
  int output;
  Window window;                  // conv2d and pools; linear is a 1x1 window
  int64_t groups = 1;             // conv2d
  int bits = 0;                   // conv2d and linear: width of the codes in the file
  int used_bits = 0;              // the width that all codes fit: below `bits` in some layers of 8 bits
  uint64_t codes = 0;             // where the packed codes begin in the file
  std::vector<float> multiplier;  // per channel; avg_pool2d: by number of elements; add: [ma, mb]
  std::vector<float> bias;        // per channel; avg_pool2d and add: one
  bool has_residual = false;
  float residual_multiplier = 0;
  uint8_t qmin = 0, qmax = 255;
  std::vector<uint8_t> table;    // u8 output
  std::vector<float> table_f32;  // f32 output
};

struct Member {
  std::string name;
  std::vector<uint8_t> preprocess_table;  // [C][256], or empty
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

// Parses and checks the graph of `file`. Throws ModelError naming the file, the node and what was expected.
Graph read_graph(const ModelFile& file);

}  // namespace qdeploy
