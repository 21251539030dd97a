// add, mul, rescale and table: each element by itself, row by row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../errors.h"
#include "../lookup.h"
#include "op.h"

namespace qdeploy {
namespace {

constexpr int kTableByChannel = 4;  // the first format version that has one

struct AddData : OpData {
  float multiplier_a, multiplier_b, bias;
};

struct ScaleData : OpData {  // of mul and rescale
  float multiplier, bias;
};

struct TableData : OpData {
  bool by_channel;  // 256 entries for each channel, else for all
  SharedBytes u8;   // in one of the two, by the type of the output
  SharedFloats f32;
};

// ---- add, rescale -------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_add(const NodeSource& node) {
  const Tensor &a = node.input(0), &b = node.input(1);
  node.require(a.shape == b.shape, "a second input of shape " + shape_text(a.shape), shape_text(b.shape));
  node.require_output(a.shape);
  auto add = std::make_unique<AddData>();
  const std::vector<float> multipliers = number_array(node.json, "multipliers", 2, node.where);
  add->multiplier_a = multipliers[0];
  add->multiplier_b = multipliers[1];
  add->bias = number_member(node.json, "bias", node.where);
  require_bounded(
      a.most() * std::fabs(add->multiplier_a) + b.most() * std::fabs(add->multiplier_b) + std::fabs(add->bias),
      node.output.is_f32(), node.where);
  return add;
}

// This thread's rows by Kernels::scale_add, with the second input where there is one.
void scale_add_rows(const StepRun& run, ScaleAddParams params) {
  const bool has_b = run.step.inputs.size() == 2;
  params.n = static_cast<size_t>(run.out().w * run.out().c);
  params.a_type = run.in().type;
  if (has_b) params.b_type = run.in(1).type;
  params.c_type = run.out().type;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    params.a = run.row_from(row);
    if (has_b) params.b = run.row_from(row, 1);
    params.c = run.row_to(row);
    run.kernels().scale_add(&params);
  }
}

void run_add(const StepRun& run) {
  const Activation& out = run.out();
  const AddData& add = run.data<AddData>();
  if (out.type == Dtype::s16 || run.in(0).type == Dtype::s16 || run.in(1).type == Dtype::s16) {
    ScaleAddParams params = {};
    params.multiplier_a = add.multiplier_a;
    params.multiplier_b = add.multiplier_b;
    params.bias = add.bias;
    return scale_add_rows(run, params);
  }
  const AddParams params = {add.multiplier_a, add.multiplier_b, add.bias, run.node().qmin, run.node().qmax};
  const size_t n = static_cast<size_t>(out.w * out.c);
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (out.is_f32()) {
      run.kernels().add_f32(&params, n, run.row_from(row, 0), run.row_from(row, 1),
                            reinterpret_cast<float*>(run.row_to(row)));
    } else {
      run.kernels().add_qu8(&params, n, run.row_from(row, 0), run.row_from(row, 1), run.row_to(row));
    }
  }
}

std::unique_ptr<const OpData> read_scale(const NodeSource& node, double most) {
  auto data = std::make_unique<ScaleData>();
  data->multiplier = number_member(node.json, "multiplier", node.where);
  data->bias = number_member(node.json, "bias", node.where);
  require_bounded(most * std::fabs(data->multiplier) + std::fabs(data->bias), node.output.is_f32(), node.where);
  return data;
}

std::unique_ptr<const OpData> read_rescale(const NodeSource& node) {
  node.require_output(node.input().shape);
  return read_scale(node, node.input().most());
}

void run_rescale(const StepRun& run) {
  const ScaleData& data = run.data<ScaleData>();
  ScaleAddParams params = {};
  params.multiplier_a = data.multiplier;
  params.bias = data.bias;
  scale_add_rows(run, params);
}

// ---- mul ----------------------------------------------------------------------------------------------------------

using Shape = std::vector<int64_t>;

// Which shapes b may have beside that of a: one number for all pixels (tokens), or one for all channels.
std::vector<Shape> gates(const Shape& a, int version) {
  if (a.size() == 2) return {{1, a[1]}};
  if (a.size() == 1) return {};
  if (version < 3) return {{a[0], 1, 1}};
  return {{a[0], 1, 1}, {1, a[1], a[2]}};
}

int version_of_mul(const Node&, const std::vector<const Tensor*>& inputs) {
  const Shape &a = inputs[0]->shape, &b = inputs[1]->shape;
  const std::vector<Shape> known = gates(a, 1);
  return b == a || std::find(known.begin(), known.end(), b) != known.end() ? 1 : 3;
}

std::unique_ptr<const OpData> read_mul(const NodeSource& node) {
  const Shape &a = node.input(0).shape, &b = node.input(1).shape;
  std::vector<Shape> shapes = {a};
  for (const Shape& gate : gates(a, node.file.version())) {
    if (std::find(shapes.begin(), shapes.end(), gate) == shapes.end()) shapes.push_back(gate);
  }
  std::vector<std::string> texts;
  for (const Shape& shape : shapes) texts.push_back(shape_text(shape));
  const bool known = std::find(shapes.begin(), shapes.end(), b) != shapes.end();
  node.require(known, "a second input of shape " + alternatives(texts), shape_text(b));
  node.require_output(a);
  return read_scale(node, 255.0 * 255.0);
}

// A gate [1, D] is the same for all tokens.
Rows rows_of_mul(const NodeSource& node, const std::vector<Rows>& inputs) {
  const Shape& b = node.input(1).shape;
  const bool is_gate = !inputs[1] && b.size() == 2 && b[0] == 1;
  return same_rows(node, is_gate ? std::vector<Rows>{inputs[0]} : inputs);
}

// b [1, H, W], where it is no b of a's shape: one number for all channels of a pixel.
bool is_spatial_gate(const Activation& a, const Activation& b) { return b.c < a.c; }

size_t mul_scratch(const Program&, const Step& step, const Activations& activations, int64_t) {
  const Activation &a = activations[step.inputs[0]], &b = activations[step.inputs[1]];
  return is_spatial_gate(a, b) ? static_cast<size_t>(a.w * a.c) + kOverread : 0;
}

void run_mul(const StepRun& run) {
  const Activation &a = run.in(0), &b = run.in(1), &out = run.out();
  const ScaleData& mul = run.data<ScaleData>();
  const bool is_spatial = is_spatial_gate(a, b);
  const bool is_gate = !is_spatial && b.h == 1 && b.w == 1;  // one row an image, the same for all its pixels
  MulParams params = {};
  params.pixels = static_cast<size_t>(is_gate ? out.w : 1);
  params.n = static_cast<size_t>(is_gate ? out.c : out.w * out.c);
  params.b_stride = is_gate ? 0 : out.w * out.c;
  params.zero_point_a = a.zero_point;
  params.zero_point_b = b.zero_point;
  params.multiplier = mul.multiplier;
  params.bias = mul.bias;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from_b = run.row_from(is_gate ? row / out.h : row, 1);
    if (is_spatial) {
      uint8_t* spread = run.scratch();
      for (int64_t x = 0; x < out.w; ++x) memset(spread + x * out.c, from_b[x], out.c);
      from_b = spread;
    }
    if (out.is_f32()) {
      run.kernels().mul_f32(&params, run.row_from(row), from_b, reinterpret_cast<float*>(run.row_to(row)));
    } else {
      run.kernels().mul_qu8(&params, run.row_from(row), from_b, run.row_to(row));
    }
  }
}

// ---- table --------------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_table(const NodeSource& node) {
  node.require_output(node.input().shape);
  auto table = std::make_unique<TableData>();
  table->by_channel = node.file.version() >= kTableByChannel && node.rank("table") == 2;
  const std::vector<int64_t> shape = table->by_channel ? Shape{node.input().c, 256} : Shape{256};
  if (node.output.is_f32()) {
    table->f32 = node.floats("table", shape);
    require_bounded(table->f32->largest, true, node.where);
  } else {
    table->u8 = node.bytes("table", shape);
  }
  return table;
}

int version_of_table(const Node& node, const std::vector<const Tensor*>&) {
  return static_cast<const TableData&>(*node.data).by_channel ? kTableByChannel : 1;
}

void run_table(const StepRun& run) {
  const Activation& out = run.out();
  const TableData& table = run.data<TableData>();
  const size_t n = static_cast<size_t>(out.w * out.c);
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from = run.row_from(row);
    if (table.by_channel && out.is_f32()) {
      look_up_channels(out.w, out.c, table.f32->values.data(), from, reinterpret_cast<float*>(run.row_to(row)));
    } else if (table.by_channel) {
      look_up_channels(out.w, out.c, table.u8->data(), from, run.row_to(row));
    } else if (out.is_f32()) {
      float* to = reinterpret_cast<float*>(run.row_to(row));
      const float* entries = table.f32->values.data();
      for (size_t i = 0; i < n; ++i) to[i] = entries[from[i]];
    } else {
      run.kernels().table(n, table.u8->data(), from, run.row_to(row));
    }
  }
}

}  // namespace

std::vector<OpInfo> elementwise_ops() {
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch, macs, token keys, version of
      {"add",
       1,
       {2, 2},
       Output::requantized,
       InPlace::elements,
       kCodes,
       kCodesOrF32,
       same_rows,
       {"multipliers", "bias"},
       read_add,
       run_add},
      {"mul",
       2,
       {2, 2},
       Output::requantized,
       InPlace::elements,
       kU8,
       kU8OrF32,
       rows_of_mul,
       {"multiplier", "bias"},
       read_mul,
       run_mul,
       mul_scratch,
       nullptr,
       {},
       version_of_mul},
      {"rescale",
       3,
       {1, 1},
       Output::requantized,
       InPlace::elements,
       kCodes,
       kCodesOrF32,
       same_rows,
       {"multiplier", "bias"},
       read_rescale,
       run_rescale},
      {"table",
       1,
       {1, 1},
       Output::table,
       InPlace::elements,
       kU8,
       kU8OrF32,
       same_rows,
       {"table"},
       read_table,
       run_table,
       nullptr,
       nullptr,
       {},
       version_of_table},
  };
}

}  // namespace qdeploy
