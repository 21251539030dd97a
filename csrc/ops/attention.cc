#include "../attention.h"

#include <cmath>

#include "../errors.h"
#include "window.h"

namespace qdeploy {
namespace {

constexpr int64_t kMaxPeak = 32767;

struct AttentionData : OpData {
  Attention of = {};
  SharedFloats logit_bias;  // null: none
  SharedInts regions;       // likewise
};

// Rows and keys that see each other.
struct Segment {
  int64_t rows, keys;
};

Segment read_segment(const NodeSource& node, AttentionData* data) {
  const int64_t rows = node.input(0).h, keys = node.input(1).h;
  const bool has_regions = !node.is_null("regions");
  if (!node.is_null("block") || has_regions) {
    node.require(rows == keys, "as many queries as keys, " + std::to_string(keys), std::to_string(rows));
  }
  if (has_regions) {
    data->regions = node.ints("regions", {keys});
    data->of.regions = data->regions->values.data();
  }
  if (node.is_null("block")) return {rows, keys};
  const int64_t block = data->of.block = int_member(node.json, "block", 1, keys, node.where);
  node.require(keys % block == 0, "a block that divides " + std::to_string(keys) + " rows", std::to_string(block));
  return {block, block};
}

void read_bounded(const NodeSource& node, const Segment& segment, AttentionData* data) {
  Attention& of = data->of;
  const int64_t peak = int_member(node.json, "peak", 1, kMaxPeak, node.where), depth = of.channels / of.heads;
  of.peak = static_cast<int32_t>(peak);
  node.require(peak * 255 * segment.keys < int64_t{1} << 31, "sums of weights below 2^31",
               "a peak of " + std::to_string(peak) + " over " + std::to_string(segment.keys) + " keys");
  node.require(depth * 255 * 255 < int64_t{1} << 31, "products below 2^31",
               "heads of " + std::to_string(depth) + " channels");
  double largest_bias = 0;
  if (!node.is_null("logit_bias")) {
    data->logit_bias = node.floats("logit_bias", {of.heads, segment.rows, segment.keys});
    of.logit_bias = data->logit_bias->values.data();
    of.bias_rows = segment.rows, of.bias_keys = segment.keys;
    largest_bias = data->logit_bias->largest;
  }
  of.logit_multiplier = number_member(node.json, "logit_multiplier", node.where);
  const double logits = std::fabs(static_cast<double>(of.logit_multiplier)) * depth * 65025 + largest_bias;
  node.require(logits < 0x1p100, "logits below 2^100", "up to " + number_text(logits));
  of.multiplier = number_member(node.json, "multiplier", node.where);
  of.bias = number_member(node.json, "bias", node.where);
  const double multiplier = std::fabs(of.multiplier), bias = std::fabs(of.bias);
  require_bounded(255.0 * multiplier * 1.001 + bias, node.output.is_f32(), node.where);
}

std::unique_ptr<const OpData> read_attention(const NodeSource& node) {
  auto data = std::make_unique<AttentionData>();
  const char* const names[] = {"queries", "keys", "values"};
  for (size_t i = 0; i < 3; ++i) {
    node.require(node.input(i).is_tokens(), std::string(names[i]) + " of shape [T, D]",
                 shape_text(node.input(i).shape));
  }
  const Tensor &q = node.input(0), &k = node.input(1), &v = node.input(2);
  node.require(k.c == q.c, "keys of " + std::to_string(q.c) + " channels", shape_text(k.shape));
  node.require(v.h == k.h, "values of " + std::to_string(k.h) + " rows", shape_text(v.shape));
  node.require_output({q.h, v.c});
  Attention& of = data->of;
  of.heads = static_cast<int32_t>(int_member(node.json, "heads", 1, kMaxSize, node.where));
  node.require(q.c % of.heads == 0 && v.c % of.heads == 0, "heads that divide the channels", std::to_string(of.heads));
  of.rows = q.h, of.keys = k.h, of.channels = q.c, of.outputs = v.c;
  of.q_zero = q.zero_point, of.k_zero = k.zero_point, of.v_zero = v.zero_point;
  read_bounded(node, read_segment(node, data.get()), data.get());
  return data;
}

Rows rows_of_attention(const NodeSource& node, const std::vector<Rows>& inputs) {
  if (!node.is_null("block") || !node.is_null("regions")) return fixed_rows(node, inputs);
  node.require(inputs[1] == inputs[2], "keys and values of one length for every text", "others");
  return inputs[0];
}

int64_t attention_macs(const Member& member, const Node& node) {
  const Attention& of = static_cast<const AttentionData&>(*node.data).of;
  const int64_t keys = of.block ? of.block : of.keys;  // that a row sees
  return member.tensors[node.output].h * keys * (of.channels + of.outputs);
}

size_t scratch_of_attention(const Program& program, const Step& step, const Activations&, int64_t) {
  return attention_scratch(*program.kernels, static_cast<const AttentionData&>(*step.node->data).of).bytes;
}

void run_attention(const StepRun& run) {
  const Activation &q = run.in(0), &k = run.in(1), &v = run.in(2), &out = run.out();
  Attention of = run.data<AttentionData>().of;
  of.qmin = run.node().qmin, of.qmax = run.node().qmax;
  for (int64_t i = 0; i < run.chunk.images; ++i) {
    const AttentionOperands operands = {q.h,
                                        k.h,
                                        run.row_from(i * q.h, 0),
                                        run.row_from(i * k.h, 1),
                                        run.row_from(i * v.h, 2),
                                        run.row_to(i * out.h),
                                        q.row_pitch,
                                        k.row_pitch,
                                        v.row_pitch,
                                        out.row_pitch};
    run_attention(run.kernels(), of, operands, run.scratch(), run.share);
  }
}

}  // namespace

std::vector<OpInfo> attention_ops() {
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch, macs
      {"attention",
       3,
       {3, 3},
       Output::requantized,
       InPlace::never,
       kU8,
       kU8,
       rows_of_attention,
       {"heads", "logit_multiplier", "peak", "multiplier", "bias", "block", "logit_bias", "regions"},
       read_attention,
       run_attention,
       scratch_of_attention,
       attention_macs},
  };
}

}  // namespace qdeploy
