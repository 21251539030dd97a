// What the engine knows of an op: one row, which stands with its two functions in the file of its family. Whoever adds
// an op adds a row, and its kernels; the Python side has the same table in qdeploy/ops.py.
#pragma once
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../chunk.h"
#include "../constants.h"
#include "../graph.h"
#include "../json.h"

namespace qdeploy {

// What an op writes. Whether a node has a clamp, may end the network in f32 and must have its inputs' grid follows.
enum class Output {
  requantized,  // a number r: clamp(rint(r), lo, hi) as u8, or r itself as f32
  same_grid,    // codes of the inputs, whose scale and zero point are the output's
  table,        // an entry of a table, u8 or f32
};

struct Inputs {
  size_t fewest, most;
};

// A node of the file on its way to a Node: the number, order and dtypes of its operands and its set of keys are right.
struct NodeSource {
  const OpInfo& op;
  const Json& json;
  const ModelFile& file;
  Constants& constants;
  const std::string& where;
  std::vector<const Tensor*> inputs;
  const Tensor& output;
  bool has_residual;

  const Tensor& input(size_t i = 0) const { return *inputs[i]; }
  void require(bool ok, const std::string& expected, const std::string& got) const;

  // Constants of the container; an entry of -1 in the shape matches any size.
  SharedFloats floats(const char* key, const std::vector<int64_t>& shape) const;
  SharedBytes bytes(const char* key, const std::vector<int64_t>& shape) const;
};

// One step of a program, on one chunk of images, for one thread.
struct StepRun {
  const Chunk& chunk;
  const Step& step;
  const Tiling& tiling;  // of an op with weights
  Share share;

  const Node& node() const { return *step.node; }
  const Kernels& kernels() const { return *chunk.program.kernels; }
  template <class Data>
  const Data& data() const {
    return static_cast<const Data&>(*node().data);
  }
  const Activation& in(size_t i = 0) const { return chunk.program.activations[step.inputs[i]]; }
  const Activation& out() const { return chunk.program.activations[step.output]; }
  const uint8_t* from(size_t i = 0) const { return chunk.u8_at(step.inputs[i]); }
  uint8_t* to() const { return chunk.u8_at(step.output); }
  float* to_f32() const { return chunk.f32_at(step.output); }
  // The rows of the output, numbered through all images, that are this thread's.
  Range rows() const { return slice(chunk.images * out().h, share); }
};

struct OpInfo {
  const char* name;
  int version;  // the first format version that has it
  Inputs inputs;
  Output output;
  bool residual;               // the last input is a residual and may be left out
  int in_place;                // the input whose memory the output may take over; -1: none
  std::set<std::string> keys;  // its own: not op, name, inputs, output, clamp, residual_multiplier
  std::unique_ptr<const OpData> (*read)(const NodeSource& node);
  void (*run)(const StepRun& run);
};

// The rows of each family.
std::vector<OpInfo> conv_ops();
std::vector<OpInfo> pool_ops();
std::vector<OpInfo> elementwise_ops();
std::vector<OpInfo> move_ops();

const std::vector<OpInfo>& all_ops();

// Null where there is no such op.
const OpInfo* find_op(const std::string& name);

// Throws unless results up to `largest` stay below 2^30, so that no conversion to u8 wraps (cvtps2dq), or, as f32,
// below 2^100, so that the softmax of such logits stays finite. The error names `channel`, -1: none.
void require_bounded(double largest, bool is_f32, const std::string& where, int64_t channel = -1);

}  // namespace qdeploy
