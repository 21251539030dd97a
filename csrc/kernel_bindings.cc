#include "kernel_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "aligned.h"
#include "attention.h"
#include "cpu.h"
#include "errors.h"
#include "norm.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace qdeploy {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

void require_input(bool ok, const std::string& expected, const std::string& got, const char* where) {
  if (!ok) throw InputError("expected " + expected + ", got " + got + " - at " + where);
}

std::string shape_of(const py::array& array) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

Dtype type_of(const py::array& array, bool is_output, const char* where) {
  require_input((array.flags() & py::array::c_style) != 0, "a dense array", "another", where);
  if (py::isinstance<py::array_t<uint8_t>>(array)) return Dtype::u8;
  if (py::isinstance<py::array_t<int16_t>>(array)) return Dtype::s16;
  const bool is_f32 = is_output && py::isinstance<py::array_t<float>>(array);
  require_input(is_f32, is_output ? "uint8, int16 or float32" : "uint8 or int16",
                py::cast<std::string>(py::str(py::object(array.dtype()))), where);
  return Dtype::f32;
}

// The array's elements with the slack that kernels may read.
AlignedBuffer copy_of(const py::array& array) {
  AlignedBuffer copy(static_cast<size_t>(array.nbytes()));
  memcpy(copy.data(), array.data(), copy.bytes());
  return copy;
}

// On `threads` threads, each of which has scratch memory of its own.
template <class Body>
void run_threads(int threads, size_t scratch_bytes, const Body& body) {
  const size_t stride = (scratch_bytes + 2 * kOverread - 1) / kOverread * kOverread;
  const AlignedBuffer scratch(stride * static_cast<size_t>(threads));
  ThreadPool::shared().run(threads, [&](int thread, int all) {
    body(scratch.data() + static_cast<size_t>(thread) * stride, Share{thread, all});
  });
}

void norm_of(const py::array& a, int64_t groups, const Floats& multiplier, const Floats& bias, float epsilon,
             uint8_t qmin, uint8_t qmax, py::array result, int threads, const std::string& isa) {
  Norm norm = {};
  norm.in = type_of(a, false, "norm");
  norm.out = type_of(result, true, "norm");
  require_input(a.ndim() == 2 && shape_of(a) == shape_of(result), "a result of shape " + shape_of(a) + ", two sizes",
                shape_of(result), "norm");
  norm.channels = a.shape(1);
  norm.groups = groups;
  require_input(multiplier.size() == norm.channels && bias.size() == norm.channels,
                std::to_string(norm.channels) + " multipliers and biases",
                std::to_string(multiplier.size()) + " and " + std::to_string(bias.size()), "norm");
  require_input(groups >= 0 && (groups == 0 || norm.channels % groups == 0),
                "groups that divide " + std::to_string(norm.channels) + " channels", std::to_string(groups), "norm");
  norm.epsilon = epsilon;
  norm.qmin = qmin, norm.qmax = qmax;
  const AlignedBuffer of_a = copy_of(a), of_multiplier = copy_of(multiplier), of_bias = copy_of(bias);
  norm.multiplier = reinterpret_cast<const float*>(of_multiplier.data());
  norm.bias = reinterpret_cast<const float*>(of_bias.data());
  const Kernels& kernels = kernels_for(isa);
  const int64_t rows = a.shape(0);
  uint8_t* c = static_cast<uint8_t*>(result.mutable_data());
  const int64_t a_bytes = a.itemsize() * norm.channels, c_bytes = result.itemsize() * norm.channels;
  const py::gil_scoped_release release;
  run_threads(threads, groups ? group_norm_scratch(norm) : 0, [&](uint8_t* scratch, Share share) {
    if (groups) {
      return group_norm(kernels, norm, {1, rows, of_a.data(), 0, c, 0}, slice(groups, share), scratch);
    }
    const Range range = slice(rows, share);
    const uint8_t* from = of_a.data() + range.begin * a_bytes;
    layer_norm(kernels, norm, {1, range.end - range.begin, from, 0, c + range.begin * c_bytes, 0});
  });
}

void attention_of(const Bytes& q, const Bytes& k, const Bytes& v, const std::array<uint8_t, 3>& zero_points, int heads,
                  float logit_multiplier, float multiplier, float bias, uint8_t qmin, uint8_t qmax, int peak,
                  int64_t most_rows, int64_t most_keys, int64_t block, const std::optional<Floats>& logit_bias,
                  const std::optional<Ints>& regions, Bytes result, int threads, const std::string& isa) {
  require_input(q.ndim() == 2 && k.ndim() == 2 && v.ndim() == 2, "q, k and v of two sizes",
                shape_of(q) + ", " + shape_of(k) + ", " + shape_of(v), "attention");
  const int64_t rows = q.shape(0), keys = k.shape(0);
  const bool agree = q.shape(1) == k.shape(1) && v.shape(0) == keys && result.ndim() == 2 && result.shape(0) == rows &&
                     result.shape(1) == v.shape(1) && rows <= most_rows && keys <= most_keys;
  require_input(agree, "q, k, v and a result that agree",
                shape_of(q) + ", " + shape_of(k) + ", " + shape_of(v) + ", " + shape_of(result), "attention");
  require_input(heads > 0 && q.shape(1) % heads == 0 && v.shape(1) % heads == 0, "heads that divide the channels",
                std::to_string(heads), "attention");
  require_input(block == 0 || (block > 0 && rows % block == 0 && rows == keys), "a block that divides the rows",
                std::to_string(block), "attention");
  const int64_t bias_rows = block ? block : most_rows, bias_keys = block ? block : most_keys;
  const int64_t biases = heads * bias_rows * bias_keys;
  require_input(!logit_bias || logit_bias->size() == biases, std::to_string(biases) + " of logit_bias",
                "another number", "attention");
  require_input(!regions || (rows == keys && regions->size() == rows), std::to_string(rows) + " regions",
                "another number", "attention");
  Attention of = {};
  of.heads = heads;
  of.rows = most_rows, of.keys = most_keys;
  of.channels = q.shape(1), of.outputs = v.shape(1);
  of.q_zero = zero_points[0], of.k_zero = zero_points[1], of.v_zero = zero_points[2];
  of.logit_multiplier = logit_multiplier, of.multiplier = multiplier, of.bias = bias;
  of.qmin = qmin, of.qmax = qmax;
  of.peak = peak;
  of.block = block;
  const AlignedBuffer of_q = copy_of(q), of_k = copy_of(k), of_v = copy_of(v);
  const AlignedBuffer of_bias = logit_bias ? copy_of(*logit_bias) : AlignedBuffer();
  const AlignedBuffer of_regions = regions ? copy_of(*regions) : AlignedBuffer();
  of.logit_bias = reinterpret_cast<const float*>(of_bias.data());
  of.bias_rows = bias_rows, of.bias_keys = bias_keys;
  of.regions = reinterpret_cast<const int32_t*>(of_regions.data());
  const AttentionOperands operands = {
      rows,        keys,        of_q.data(), of_k.data(), of_v.data(), result.mutable_data(),
      of.channels, of.channels, of.outputs,  of.outputs};
  const Kernels& kernels = kernels_for(isa);
  const py::gil_scoped_release release;
  run_threads(threads, attention_scratch(kernels, of).bytes,
              [&](uint8_t* scratch, Share share) { run_attention(kernels, of, operands, scratch, share); });
}

}  // namespace

void bind_kernels(py::module_& module) {
  module.def("norm", &norm_of, py::arg("a").noconvert(), py::arg("groups"), py::arg("multiplier").noconvert(),
             py::arg("bias").noconvert(), py::arg("epsilon"), py::arg("qmin"), py::arg("qmax"),
             py::arg("result").noconvert(), py::arg("threads"), py::arg("isa") = "",
             "Norm of `a` [rows, channels], each row for itself (groups 0) or all rows by groups of channels.");
  module.def("attention", &attention_of, py::arg("q").noconvert(), py::arg("k").noconvert(), py::arg("v").noconvert(),
             py::arg("zero_points"), py::arg("heads"), py::arg("logit_multiplier"), py::arg("multiplier"),
             py::arg("bias"), py::arg("qmin"), py::arg("qmax"), py::arg("peak"), py::arg("most_rows"),
             py::arg("most_keys"), py::arg("block"), py::arg("logit_bias").noconvert().none(true),
             py::arg("regions").noconvert().none(true), py::arg("result").noconvert(), py::arg("threads"),
             py::arg("isa") = "",
             "Attention of rows q over keys k and values v, as a model of at most so many rows and keys runs it.");
}

}  // namespace qdeploy
