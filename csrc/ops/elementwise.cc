// add and table: each element by itself, row by row.
#include <cmath>

#include "../errors.h"
#include "op.h"

namespace qdeploy {
namespace {

struct AddData : OpData {
  float multiplier_a, multiplier_b, bias;
};

struct TableData : OpData {
  std::vector<uint8_t> u8;  // 256 entries in one of the two, by the type of the output
  std::vector<float> f32;
};

std::unique_ptr<const OpData> read_add(const NodeSource& node) {
  for (const Tensor* input : node.inputs) {
    node.require(input->shape == node.output.shape, "inputs of shape " + shape_text(node.output.shape),
                 shape_text(input->shape));
  }
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

std::unique_ptr<const OpData> read_table(const NodeSource& node) {
  node.require(node.input().shape == node.output.shape, "an output of shape " + shape_text(node.input().shape),
               shape_text(node.output.shape));
  auto table = std::make_unique<TableData>();
  if (node.output.is_f32) {
    table->f32 = node.floats("table", {256});
    for (const float value : table->f32) require_bounded(std::fabs(value), true, node.where);
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
      for (size_t i = 0; i < n; ++i) to[i] = table.f32[from[i]];
    } else {
      run.kernels().table(n, table.u8.data(), from, run.to() + out.row_offset(row));
    }
  }
}

}  // namespace

std::vector<OpInfo> elementwise_ops() {
  return {
      // name, version, inputs, output, residual, in place, keys, read, run
      {"add", 1, {2, 2}, Output::requantized, false, 0, {"multipliers", "bias"}, read_add, run_add},
      {"table", 1, {1, 1}, Output::table, false, 0, {"table"}, read_table, run_table},
  };
}

}  // namespace qdeploy
