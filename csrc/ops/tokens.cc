// embedding, position, mean and norm: rows of a sequence, and what they have in common.
#include <algorithm>
#include <cmath>

#include "../errors.h"
#include "../norm.h"
#include "conv.h"

namespace qdeploy {
namespace {

// ---- embedding ----------------------------------------------------------------------------------------------------

struct EmbeddingData : OpData {
  SharedCodes codes;        // [V, D]
  SharedFloats multiplier;  // [V] or [1]
  SharedFloats rows;        // [T, D]
};

std::unique_ptr<const OpData> read_embedding(const NodeSource& node) {
  auto embedding = std::make_unique<EmbeddingData>();
  const Tensor &ids = node.input(), &out = node.output;
  const Weight weight = read_weight(node);
  const std::string where = key_of("weight", node.where);
  require(weight.shape.size() == 2, "a weight of shape [V, D]", shape_text(weight.shape), where);
  node.require(out.is_tokens(), "an output of shape [T, D]", shape_text(out.shape));
  std::vector<int64_t> expected = ids.shape;
  expected.push_back(out.c);
  node.require_output(expected);
  const std::vector<int64_t> table = {node.vocabulary, out.c};
  require(weight.shape == table, "a weight of shape " + shape_text(table), shape_text(weight.shape), where);
  embedding->multiplier = node.floats("multiplier", {-1});
  const int64_t count = static_cast<int64_t>(embedding->multiplier->values.size());
  require(count == 1 || count == node.vocabulary, "1 or " + std::to_string(node.vocabulary) + " multipliers",
          std::to_string(count), key_of("multiplier", node.where));
  embedding->rows = node.floats("rows", out.shape);
  require_bounded((1 << (weight.bits - 1)) * embedding->multiplier->largest + embedding->rows->largest, out.is_f32(),
                  node.where);
  embedding->bits = weight.bits;
  embedding->codes = node.constants.codes(weight.codes, weight.bits, weight.count);
  return embedding;
}

void run_embedding(const StepRun& run) {
  const Activation& out = run.out();
  const EmbeddingData& embedding = run.data<EmbeddingData>();
  const Array<float>& multiplier = embedding.multiplier->values;
  ScaleAddParams params = {};
  params.n = static_cast<size_t>(out.c);
  params.a_type = Dtype::s8;
  params.b_type = Dtype::f32;
  params.c_type = out.type;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int32_t id = *reinterpret_cast<const int32_t*>(run.row_from(row));
    params.a = embedding.codes->data() + id * out.c;
    params.multiplier_a = multiplier[multiplier.size() == 1 ? 0 : static_cast<size_t>(id)];
    params.b = embedding.rows->values.data() + row % out.h * out.c;
    params.c = run.row_to(row);
    run.kernels().scale_add(&params);
  }
}

// ---- position -----------------------------------------------------------------------------------------------------

struct PositionData : OpData {
  SharedFloats rows;  // [P + T, D]
  float multiplier;
  int64_t prefix;  // P
};

std::unique_ptr<const OpData> read_position(const NodeSource& node) {
  auto position = std::make_unique<PositionData>();
  const Tensor& x = node.input();
  node.require(x.is_tokens(), "an input of shape [T, D]", shape_text(x.shape));
  position->prefix = int_member(node.json, "prefix", 0, kMaxSize, node.where);
  const std::vector<int64_t> shape = {position->prefix + x.h, x.c};
  node.require_output(shape);
  position->rows = node.floats("rows", shape);
  position->multiplier = number_member(node.json, "multiplier", node.where);
  require_bounded(x.most() * std::fabs(position->multiplier) + position->rows->largest, node.output.is_f32(),
                  node.where);
  return position;
}

Rows rows_of_position(const NodeSource& node, const std::vector<Rows>& inputs) {
  if (!inputs[0]) return {};
  return *inputs[0] + int_member(node.json, "prefix", 0, kMaxSize, node.where);
}

void run_position(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const PositionData& position = run.data<PositionData>();
  ScaleAddParams params = {};
  params.n = static_cast<size_t>(out.c);
  params.a_type = in.type;
  params.b_type = Dtype::f32;
  params.c_type = out.type;
  params.multiplier_a = position.multiplier;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / out.h, t = row % out.h;
    const float* numbers = position.rows->values.data() + t * out.c;
    if (t < position.prefix) {
      write_numbers(run, params.n, numbers, run.row_from(image * in.h), in.type, run.row_to(row));
      continue;
    }
    params.a = run.row_from(image * in.h + t - position.prefix);
    params.b = numbers;
    params.c = run.row_to(row);
    run.kernels().scale_add(&params);
  }
}

// ---- mean ---------------------------------------------------------------------------------------------------------

struct MeanData : OpData {
  SharedFloats multiplier;  // [T]
  float bias;
};

std::unique_ptr<const OpData> read_mean(const NodeSource& node) {
  auto mean = std::make_unique<MeanData>();
  const Tensor& x = node.input();
  node.require(x.is_tokens(), "an input of shape [T, D]", shape_text(x.shape));
  node.require_output({x.c});
  node.require(static_cast<double>(x.h) * x.most() < 0x1p31, "a mean with sums below 2^31",
               std::to_string(x.h) + " rows");
  mean->multiplier = node.floats("multiplier", {x.h});
  mean->bias = number_member(node.json, "bias", node.where);
  require_bounded(x.most() * mean->multiplier->largest_by_count + std::fabs(mean->bias), node.output.is_f32(),
                  node.where);
  return mean;
}

Rows no_rows(const NodeSource&, const std::vector<Rows>&) { return {}; }

// Threads share out blocks of channels.
void run_mean(const StepRun& run) {
  constexpr int64_t kBlock = 64;
  const Activation &in = run.in(), &out = run.out();
  const MeanData& mean = run.data<MeanData>();
  MeanParams params = {};
  params.rows = static_cast<size_t>(in.h);
  params.columns = 1;
  params.row_stride = in.row_pitch;
  params.a_type = in.type;
  params.c_type = out.type;
  params.offset = static_cast<int32_t>(in.zero_point * in.h);
  params.multiplier = mean.multiplier->values[static_cast<size_t>(in.h - 1)];
  params.bias = mean.bias;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const int64_t blocks = (out.c + kBlock - 1) / kBlock;
  const Range range = slice(run.chunk.images * blocks, run.share);
  for (int64_t i = range.begin; i < range.end; ++i) {
    const int64_t image = i / blocks, first = i % blocks * kBlock;
    params.n = static_cast<size_t>(std::min(kBlock, out.c - first));
    params.a = run.row_from(image * in.h) + first * in.bytes();
    params.c = run.row_to(image) + first * out.bytes();
    run.kernels().mean(&params);
  }
}

// ---- norm ---------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxNorm = 32767;  // s16 codes with the same statistics, and channels
constexpr int64_t kMaxNormU8 = ((int64_t{1} << 31) - 1) / 255;
constexpr float kMinEpsilon = 0x1p-60f, kMaxEpsilon = 0x1p100f;

struct NormData : OpData {
  int64_t groups = 0;  // 0: each row for itself
  SharedFloats multiplier, bias;
  float epsilon;
};

std::unique_ptr<const OpData> read_norm(const NodeSource& node) {
  auto norm = std::make_unique<NormData>();
  const Tensor& x = node.input();
  node.require_output(x.shape);
  int64_t count = x.c;
  if (!node.is_null("groups")) {
    norm->groups = int_member(node.json, "groups", 1, kMaxSize, node.where);
    node.require(x.c % norm->groups == 0, "groups that divide the channels", std::to_string(norm->groups));
    count = x.c / norm->groups * x.h * x.w;
  }
  node.require(x.c <= kMaxNorm, "at most " + std::to_string(kMaxNorm) + " channels", std::to_string(x.c));
  const int64_t most = x.type == Dtype::s16 ? kMaxNorm : kMaxNormU8;
  node.require(count <= most, "at most " + std::to_string(most) + " elements with the same statistics",
               std::to_string(count));
  norm->epsilon = number_member(node.json, "epsilon", node.where);
  node.require(norm->epsilon >= kMinEpsilon && norm->epsilon <= kMaxEpsilon, "an epsilon in [2^-60, 2^100]",
               number_text(norm->epsilon));
  norm->multiplier = node.floats("multiplier", {x.c});
  norm->bias = node.floats("bias", {x.c});
  double largest = 0;
  const double root = std::sqrt(static_cast<double>(count));
  for (size_t i = 0; i < norm->bias->values.size(); ++i) {
    const double m = std::fabs(static_cast<double>(norm->multiplier->values[i]));
    largest = std::max(largest, root * m * 1.001 + std::fabs(static_cast<double>(norm->bias->values[i])));
  }
  require_bounded(largest, node.output.is_f32(), node.where);
  return norm;
}

Rows rows_of_norm(const NodeSource& node, const std::vector<Rows>& inputs) {
  return node.is_null("groups") ? same_rows(node, inputs) : fixed_rows(node, inputs);
}

Norm norm_of(const NormData& data, const Node& node, const Activation& in, const Activation& out) {
  Norm norm = {};
  norm.channels = in.c;
  norm.groups = data.groups;
  norm.in = in.type;
  norm.out = out.type;
  norm.multiplier = data.multiplier->values.data();
  norm.bias = data.bias->values.data();
  norm.epsilon = data.epsilon;
  norm.qmin = node.qmin;
  norm.qmax = node.qmax;
  return norm;
}

size_t norm_scratch(const Program&, const Step& step, const Activations& activations, int64_t) {
  const NormData& data = static_cast<const NormData&>(*step.node->data);
  if (data.groups == 0) return 0;
  return group_norm_scratch(norm_of(data, *step.node, activations[step.inputs[0]], activations[step.output]));
}

void run_groups(const StepRun& run, const Norm& norm) {
  const Activation &in = run.in(), &out = run.out();
  const Range range = slice(run.chunk.images * norm.groups, run.share);
  for (int64_t i = range.begin, end; i < range.end; i = end) {  // the groups of one image at a time
    const int64_t image = i / norm.groups;
    end = std::min((image + 1) * norm.groups, range.end);
    const NormPixels pixels = {in.h,         in.w, run.row_from(image * in.h), in.row_pitch, run.row_to(image * out.h),
                               out.row_pitch};
    group_norm(run.kernels(), norm, pixels, {i - image * norm.groups, end - image * norm.groups}, run.scratch());
  }
}

// Tokens are rows of one pixel: those of one image go together.
void run_norm(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const Norm norm = norm_of(run.data<NormData>(), run.node(), in, out);
  if (norm.groups) return run_groups(run, norm);
  const bool is_dense = !in.has_border() && !out.has_border();
  const Range rows = run.rows();
  for (int64_t row = rows.begin, end; row < rows.end; row = end) {
    end = is_dense ? rows.end : row + 1;
    layer_norm(run.kernels(), norm, {1, (end - row) * in.w, run.row_from(row), 0, run.row_to(row), 0});
  }
}

}  // namespace

std::vector<OpInfo> token_ops() {
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch
      {"embedding",
       3,
       {1, 1},
       Output::requantized,
       InPlace::never,
       {Dtype::i32},
       kCodes,
       same_rows,
       {"weight", "multiplier", "rows"},
       read_embedding,
       run_embedding},
      {"position",
       3,
       {1, 1},
       Output::requantized,
       InPlace::never,
       kCodes,
       kCodes,
       rows_of_position,
       {"rows", "multiplier", "prefix"},
       read_position,
       run_position},
      {"mean",
       3,
       {1, 1},
       Output::requantized,
       InPlace::never,
       kCodes,
       kU8OrF32,
       no_rows,
       {"multiplier", "bias"},
       read_mean,
       run_mean},
      {"norm",
       3,
       {1, 1},
       Output::requantized,
       InPlace::never,
       kCodes,
       kCodesOrF32,
       rows_of_norm,
       {"groups", "multiplier", "bias", "epsilon"},
       read_norm,
       run_norm,
       norm_scratch},
  };
}

}  // namespace qdeploy
