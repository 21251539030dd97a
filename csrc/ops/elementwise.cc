// add, mul and table: each element by itself, row by row.
#include <cmath>

#include "../errors.h"
#include "op.h"

namespace qdeploy {
namespace {

struct AddData : OpData {
  float multiplier_a, multiplier_b, bias;
};

struct MulData : OpData {
  float multiplier, bias;
};

struct TableData : OpData {
  SharedBytes u8;  // 256 entries in one of the two, by the type of the output
  SharedFloats f32;
};

void require_output_shape(const NodeSource& node, const std::vector<int64_t>& shape) {
  node.require(node.output.shape == shape, "an output of shape " + shape_text(shape), shape_text(node.output.shape));
}

std::unique_ptr<const OpData> read_add(const NodeSource& node) {
  const std::vector<int64_t>&a = node.input(0).shape, &b = node.input(1).shape;
  node.require(a == b, "a second input of shape " + shape_text(a), shape_text(b));
  require_output_shape(node, a);
  auto add = std::make_unique<AddData>();
  const std::vector<float> multipliers = number_array(node.json, "multipliers", 2, node.where);
  add->multiplier_a = multipliers[0];
  add->multiplier_b = multipliers[1];
  add->bias = number_member(node.json, "bias", node.where);
  require_bounded(255.0 * std::fabs(add->multiplier_a) + 255.0 * std::fabs(add->multiplier_b) + std::fabs(add->bias),
                  node.output.is_f32, node.where);
  return add;
}

void run_add(const StepRun& run) {
  const Activation &a = run.in(0), &b = run.in(1), &out = run.out();
  const AddData& add = run.data<AddData>();
  const AddParams params = {add.multiplier_a, add.multiplier_b, add.bias, run.node().qmin, run.node().qmax};
  const size_t n = static_cast<size_t>(out.w * out.c);
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from_a = run.from(0) + a.row_offset(row);
    const uint8_t* from_b = run.from(1) + b.row_offset(row);
    if (out.is_f32) {
      run.kernels().add_f32(&params, n, from_a, from_b, run.to_f32() + out.row_offset(row));
    } else {
      run.kernels().add_qu8(&params, n, from_a, from_b, run.to() + out.row_offset(row));
    }
  }
}

std::unique_ptr<const OpData> read_mul(const NodeSource& node) {
  const std::vector<int64_t>&a = node.input(0).shape, &b = node.input(1).shape;
  const std::vector<int64_t> gate = a.size() == 3 ? std::vector<int64_t>{a[0], 1, 1} : a;
  const std::string or_gate = gate == a ? "" : " or " + shape_text(gate);
  node.require(b == a || b == gate, "a second input of shape " + shape_text(a) + or_gate, shape_text(b));
  require_output_shape(node, a);
  auto mul = std::make_unique<MulData>();
  mul->multiplier = number_member(node.json, "multiplier", node.where);
  mul->bias = number_member(node.json, "bias", node.where);
  require_bounded(255.0 * 255.0 * std::fabs(mul->multiplier) + std::fabs(mul->bias), node.output.is_f32, node.where);
  return mul;
}

void run_mul(const StepRun& run) {
  const Activation &a = run.in(0), &b = run.in(1), &out = run.out();
  const MulData& mul = run.data<MulData>();
  const bool is_gate = b.h == 1 && b.w == 1;  // one row an image, the same for all its pixels
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
    const uint8_t* from_a = run.from(0) + a.row_offset(row);
    const uint8_t* from_b = run.from(1) + b.row_offset(is_gate ? row / out.h : row);
    if (out.is_f32) {
      run.kernels().mul_f32(&params, from_a, from_b, run.to_f32() + out.row_offset(row));
    } else {
      run.kernels().mul_qu8(&params, from_a, from_b, run.to() + out.row_offset(row));
    }
  }
}

std::unique_ptr<const OpData> read_table(const NodeSource& node) {
  require_output_shape(node, node.input().shape);
  auto table = std::make_unique<TableData>();
  if (node.output.is_f32) {
    table->f32 = node.floats("table", {256});
    for (const float value : table->f32->values) require_bounded(std::fabs(value), true, node.where);
  } else {
    table->u8 = node.bytes("table", {256});
  }
  return table;
}

void run_table(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const TableData& table = run.data<TableData>();
  const size_t n = static_cast<size_t>(out.w * out.c);
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from = run.from() + in.row_offset(row);
    if (out.is_f32) {
      float* to = run.to_f32() + out.row_offset(row);
      const float* entries = table.f32->values.data();
      for (size_t i = 0; i < n; ++i) to[i] = entries[from[i]];
    } else {
      run.kernels().table(n, table.u8->data(), from, run.to() + out.row_offset(row));
    }
  }
}

}  // namespace

std::vector<OpInfo> elementwise_ops() {
  return {
      // name, version, inputs, output, residual, in place, keys, read, run
      {"add", 1, {2, 2}, Output::requantized, false, 0, {"multipliers", "bias"}, read_add, run_add},
      {"mul", 2, {2, 2}, Output::requantized, false, 0, {"multiplier", "bias"}, read_mul, run_mul},
      {"table", 1, {1, 1}, Output::table, false, 0, {"table"}, read_table, run_table},
  };
}

}  // namespace qdeploy
