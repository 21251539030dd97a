// What the engine knows of an op: one row, which stands with its two functions in the file of its family. Whoever adds
// an op adds a row, and its kernels; the Python side has the same table in qdeploy/ops.py.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
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
  requantized,  // a number r: clamp(rint(r), lo, hi) as u8 or s16, or r itself as f32
  same_grid,    // codes of the inputs, whose type, scale and zero point are the output's
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
  int64_t vocabulary;  // of a network that reads text, else 0

  const Tensor& input(size_t i = 0) const { return *inputs[i]; }
  void require(bool ok, const std::string& expected, const std::string& got) const;

  // Constants of the container; an entry of -1 in the shape matches any size.
  SharedFloats floats(const char* key, const std::vector<int64_t>& shape) const;
  SharedInts ints(const char* key, const std::vector<int64_t>& shape) const;
  SharedBytes bytes(const char* key, const std::vector<int64_t>& shape) const;

  // How many dimensions the constant has; 0 where there is none.
  size_t rank(const char* key) const;

  bool is_null(const char* key) const { return member(json, key, where).is_null(); }
  // A string that is one of these.
  const std::string& choice(const char* key, const std::vector<std::string>& choices) const;
  void require_output(const std::vector<int64_t>& shape) const;
};

// Of an activation, where texts have any length: how many rows more than the text, or none where that does not matter.
using Rows = std::optional<int64_t>;
using RowsFn = Rows (*)(const NodeSource& node, const std::vector<Rows>& inputs);

Rows fixed_rows(const NodeSource& node, const std::vector<Rows>& inputs);  // must know how many there are
Rows same_rows(const NodeSource& node, const std::vector<Rows>& inputs);   // does the same with every row

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
  const Activation& in(size_t i = 0) const { return chunk.plan.activations[step.inputs[i]]; }
  const Activation& out() const { return chunk.plan.activations[step.output]; }
  const uint8_t* from(size_t i = 0) const { return chunk.at(step.inputs[i]); }
  uint8_t* to() const { return chunk.at(step.output); }
  float* to_f32() const { return reinterpret_cast<float*>(to()); }
  // Rows as of Activation::row_offset.
  const uint8_t* row_from(int64_t row, size_t i = 0) const { return from(i) + in(i).row_offset(row) * in(i).bytes(); }
  uint8_t* row_to(int64_t row) const { return to() + out().row_offset(row) * out().bytes(); }
  uint8_t* scratch() const { return chunk.scratch(share.thread); }
  // The rows of the output, numbered through all images, that are this thread's.
  Range rows() const { return slice(chunk.images * out().h, share); }
};

using Types = std::vector<Dtype>;
const Types kU8 = {Dtype::u8}, kCodes = {Dtype::u8, Dtype::s16};
const Types kU8OrF32 = {Dtype::u8, Dtype::f32}, kCodesOrF32 = {Dtype::u8, Dtype::s16, Dtype::f32};

// How the memory of an input can become that of the output.
enum class InPlace {
  never,
  elements,  // input 0, element by element
  residual,  // input 1, where it is not input 0 as well, whose neighbours are read
  rows,      // input 0, whose rows the output has in their order
  reshaped,  // input 0, whose elements the output has in the order of a reshape
};

struct OpInfo {
  const char* name;
  int version;  // the first format version that has it
  Inputs inputs;
  Output output;
  InPlace in_place;
  Types reads, writes;
  RowsFn rows;
  std::set<std::string> keys;  // its own: not op, name, inputs, output, clamp, residual_multiplier
  std::unique_ptr<const OpData> (*read)(const NodeSource& node);
  void (*run)(const StepRun& run);
  // Bytes of each thread's own memory; null: none.
  size_t (*scratch)(const Program& program, const Step& step, const Activations& activations, int64_t images) = nullptr;
  int64_t (*macs)(const Member& member, const Node& node) = nullptr;  // of one image; null: none
  std::set<std::string> token_keys = {};                              // only where the output is [T, D]
  // Where shapes, of inputs or of a constant, bring a version of their own.
  int (*version_of)(const Node& node, const std::vector<const Tensor*>& inputs) = nullptr;

  bool residual() const { return in_place == InPlace::residual; }  // the last input is one and may be left out
};

// The rows of each family.
std::vector<OpInfo> conv_ops();
std::vector<OpInfo> pool_ops();
std::vector<OpInfo> elementwise_ops();
std::vector<OpInfo> move_ops();
std::vector<OpInfo> token_ops();
std::vector<OpInfo> attention_ops();
std::vector<OpInfo> resize_ops();

const std::vector<OpInfo>& all_ops();

// Null where there is no such op.
const OpInfo* find_op(const std::string& name);

// Writes n numbers, below 2^30 where they become codes, as the output of a node. What `some` points to is read, n
// elements of that type, and does not count.
void write_numbers(const StepRun& run, size_t n, const float* numbers, const void* some, Dtype some_type, void* to);

// Throws unless results up to `largest` stay below 2^30, so that no conversion to u8 wraps (cvtps2dq), or, as f32,
// below 2^100, so that the softmax of such logits stays finite. The error names `channel`, -1: none.
void require_bounded(double largest, bool is_f32, const std::string& where, int64_t channel = -1);

}  // namespace qdeploy
