// The Python module qdeploy._engine: converts arguments, releases the GIL and translates errors. qdeploy/model.py
// checks shapes and dtypes and allocates the results.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arena.h"
#include "cpu.h"
#include "errors.h"
#include "kernel_bindings.h"
#include "lsq.h"
#include "ops/op.h"
#include "peak.h"
#include "plan_rows.h"
#include "session.h"
#include "within_memory.h"

namespace py = pybind11;

#if defined(_LIBCPP_VERSION) && defined(__linux__)
// The wheels hold their C++ library. Its demangler would be 170 kB of them, only to word C++ types in errors: none is
// shown, as all types of this module have names in Python.
extern "C" char* __cxxabiv1::__cxa_demangle(const char*, char*, size_t*, int* status) {
  *status = -2;  // no name that it knows
  return nullptr;
}
#endif

namespace qdeploy {
namespace {

std::unique_ptr<Session> open_path(const std::string& path, int threads, const std::string& isa,
                                   int64_t macs_per_thread, const std::string& conv_form) {
  const py::gil_scoped_release release;
  return within_memory<ModelError>(path, [&] {
    const ModelFile file(path);
    return std::make_unique<Session>(file, threads, isa, macs_per_thread, conv_form);
  });
}

std::unique_ptr<Session> open_bytes(const std::string& name, const py::bytes& content, int threads,
                                    const std::string& isa, int64_t macs_per_thread, const std::string& conv_form) {
  const std::string_view view = content;
  const py::gil_scoped_release release;
  return within_memory<ModelError>(name, [&] {
    const ModelFile file(name, reinterpret_cast<const uint8_t*>(view.data()), view.size());
    return std::make_unique<Session>(file, threads, isa, macs_per_thread, conv_form);
  });
}

// Elements of this kind and size in the machine's order of bytes, without gaps, row-major.
bool is_dense(const py::array& array, char kind, py::ssize_t size) {
  const py::dtype dtype = array.dtype();
  const bool is_native = dtype.byteorder() == '=' || dtype.byteorder() == '|';  // `isnative` takes 0.2 us of 7
  return dtype.kind() == kind && dtype.itemsize() == size && is_native && (array.flags() & py::array::c_style) != 0;
}

void run(Session& session, const py::array& images, std::vector<py::array> outputs,
         std::optional<py::array_t<int64_t>> classes, std::vector<std::pair<int, py::array>> taps,
         std::optional<py::array_t<double>> step_seconds,
         std::optional<py::array_t<int64_t, py::array::c_style>> lengths) {
  // By kind, size and order of bytes: an array that was pickled has a dtype object of its own.
  const bool is_text = session.program().longest > 0, is_u8 = !is_text && is_dense(images, 'u', 1);
  if (!is_u8 && !is_dense(images, is_text ? 'i' : 'f', 4)) {
    throw InputError(std::string("expected dense ") + (is_text ? "int32" : "uint8 or float32") +
                     ", got others - at the input");
  }
  Images in = {images.data(), is_u8, images.shape(0)};
  if (is_text) in.width = images.shape(1);
  if (lengths) in.lengths = lengths->data();
  Results results;
  for (py::array& output : outputs) results.outputs.push_back(output.mutable_data());
  if (classes) results.classes = classes->mutable_data();
  for (auto& [activation, array] : taps) results.taps.push_back({activation, array.mutable_data()});
  if (step_seconds) results.step_seconds = step_seconds->mutable_data();
  const py::gil_scoped_release release;
  within_memory<InputError>("the input", [&] { session.run(in, results); });
}

py::list activations(const Session& session) {
  py::list list;
  const Program& program = session.program();
  for (const Member& member : program.graph.members) {
    for (const Tensor& tensor : member.tensors) {
      py::dict entry;
      entry["name"] = tensor.name;
      entry["shape"] = py::tuple(py::cast(tensor.shape));
      entry["dtype"] = name_of(tensor.type);
      entry["varies"] = tensor.varies;
      entry["scale"] = tensor.scale;
      entry["zero_point"] = tensor.zero_point;
      list.append(entry);
    }
  }
  return list;
}

// For tests: offsets, bytes and visits of an Arena, for blocks of (bytes, first, last).
py::tuple place_blocks(const std::vector<std::tuple<size_t, int, int>>& lives) {
  std::vector<Block> blocks;
  for (const auto& [bytes, first, last] : lives) blocks.push_back({bytes, first, last});
  const Arena arena = place(blocks);
  return py::make_tuple(arena.offset, arena.bytes, arena.visits);
}

const char* output_name(Output output) {
  switch (output) {
    case Output::requantized:
      return "requantized";
    case Output::same_grid:
      return "same_grid";
    case Output::table:
      return "table";
  }
  return "";
}

std::vector<std::string> names_of(const Types& types) {
  std::vector<std::string> names;
  for (const Dtype type : types) names.push_back(name_of(type));
  return names;
}

py::list ops() {
  py::list list;
  for (const OpInfo& op : all_ops()) {
    py::dict entry;
    entry["name"] = op.name;
    entry["version"] = op.version;
    entry["inputs"] = py::make_tuple(op.inputs.fewest, op.inputs.most);
    entry["output"] = output_name(op.output);
    entry["residual"] = op.residual();
    entry["reads"] = names_of(op.reads);
    entry["writes"] = names_of(op.writes);
    entry["keys"] = std::vector<std::string>(op.keys.begin(), op.keys.end());
    entry["token_keys"] = std::vector<std::string>(op.token_keys.begin(), op.token_keys.end());
    list.append(entry);
  }
  return list;
}

py::list plan(Session& session, int64_t batch) {
  py::list list;
  for (const PlanRow& row : plan_rows(session, batch)) {
    const Step& step = *row.step;
    py::dict entry;
    entry["member"] = row.member;
    entry["name"] = step.node->name;
    entry["op"] = step.node->op->name;
    entry["output"] = step.output;
    entry["kernel"] = row.kernel;
    entry["bits"] = row.bits;
    entry["macs"] = py::int_(step.macs) * py::int_(batch);
    entry["tile"] = row.tile;
    entry["split"] = row.split;
    entry["residual"] = step.node->has_residual;
    entry["note"] = row.note;
    list.append(entry);
  }
  return list;
}

using Floats = py::array_t<float, py::array::c_style>;

// Rows of `value` with a step size each, where the sizes and the result's agree.
LsqTensor lsq_tensor(const Floats& value, const Floats& step, int qmin, int qmax, const Floats& result) {
  const int64_t rows = step.size(), columns = rows ? value.size() / rows : 0;
  if (rows * columns != value.size() || result.size() != value.size()) {
    throw InputError("expected rows of one size, and as many results, got " + std::to_string(value.size()) +
                     " values, " + std::to_string(rows) + " step sizes and " + std::to_string(result.size()) +
                     " results - at lsq");
  }
  return {value.data(), step.data(), rows, columns, qmin, qmax};
}

void lsq_forward_of(const Floats& value, const Floats& step, int qmin, int qmax, Floats result, int threads,
                    const std::string& isa) {
  const LsqTensor tensor = lsq_tensor(value, step, qmin, qmax, result);
  const Kernels& kernels = kernels_for(isa);
  float* to = result.mutable_data();
  const py::gil_scoped_release release;
  lsq_forward(kernels, tensor, to, threads);
}

void lsq_backward_of(const Floats& grad, const Floats& value, const Floats& step, int qmin, int qmax, double grad_scale,
                     Floats grad_value, Floats grad_step, int threads, const std::string& isa) {
  const LsqTensor tensor = lsq_tensor(value, step, qmin, qmax, grad_value);
  lsq_tensor(grad, grad_step, qmin, qmax, value);
  const Kernels& kernels = kernels_for(isa);
  float *to_value = grad_value.mutable_data(), *to_step = grad_step.mutable_data();
  const py::gil_scoped_release release;
  lsq_backward(kernels, tensor, grad.data(), grad_scale, to_value, to_step, threads);
}

void lsq_errors_of(const Floats& value, const Floats& step, int qmin, int qmax,
                   py::array_t<double, py::array::c_style> errors, int threads, const std::string& isa) {
  const LsqTensor tensor = lsq_tensor(value, step, qmin, qmax, value);
  if (errors.size() != tensor.rows) {
    throw InputError("expected as many results as step sizes, got " + std::to_string(errors.size()) + " - at lsq");
  }
  const Kernels& kernels = kernels_for(isa);
  double* to = errors.mutable_data();
  const py::gil_scoped_release release;
  lsq_errors(kernels, tensor, to, threads);
}

// An exception of qdeploy.errors, so that users catch one class whichever side found the fault. A path in the text may
// be no UTF-8.
void raise_as(const char* name, const char* text) {
  const py::object decoded = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(text));
  PyErr_SetObject(py::module_::import("qdeploy.errors").attr(name).ptr(), decoded.ptr());
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ModelError& error) {
      raise_as("ModelError", error.what());
    } catch (const InputError& error) {
      raise_as("InputError", error.what());
    }
  });
  m.def("isas", &available_isas, "Instruction sets that this machine can run, from scalar upwards.");
  m.def("ops", &ops, "The operations that this engine runs, one dict each.");
  m.def("place", &place_blocks, py::arg("blocks"),
        "Offsets, bytes and visits of an arena for blocks of (bytes, first step, last step).");
  m.def("cpu_quota", &cpu_quota, py::arg("root") = "",
        "CPUs that the cgroups of this process grant; infinity without a quota. /proc and /sys lie under root.");
  m.def("memory_limit", &memory_limit, py::arg("root") = "",
        "Bytes of memory that this process may use: the machine's, its cgroups' or its address space. root as above.");
  m.def("default_threads", &default_threads, "min(affinity, cgroup quota, physical cores).");
  m.def("peak_gmacs", &peak_gmacs, py::arg("isa"), py::arg("precision"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "1e9 multiply-accumulates a second of one core at best, in \"int8\" or \"float32\"; None where unknown.");
  m.def("lsq_forward", &lsq_forward_of, py::arg("value").noconvert(), py::arg("step").noconvert(), py::arg("qmin"),
        py::arg("qmax"), py::arg("result").noconvert(), py::arg("threads"), py::arg("isa") = "",
        "Fake-quantizes the rows of `value` to `result`: `step` holds one step size for each of them.");
  m.def("lsq_backward", &lsq_backward_of, py::arg("grad").noconvert(), py::arg("value").noconvert(),
        py::arg("step").noconvert(), py::arg("qmin"), py::arg("qmax"), py::arg("grad_scale"),
        py::arg("grad_value").noconvert(), py::arg("grad_step").noconvert(), py::arg("threads"), py::arg("isa") = "",
        "The gradients of `value` and `step`, given that of the result.");
  m.def("lsq_errors", &lsq_errors_of, py::arg("value").noconvert(), py::arg("step").noconvert(), py::arg("qmin"),
        py::arg("qmax"), py::arg("errors").noconvert(), py::arg("threads"), py::arg("isa") = "",
        "The sum of the squared errors of each row of `value`, float64.");
  bind_kernels(m);
  py::class_<Session>(m, "Session")
      .def(py::init(&open_path), py::arg("path"), py::arg("threads"), py::arg("isa"),
           py::arg("macs_per_thread") = kMacsPerThread, py::arg("conv_form") = "")
      .def(py::init(&open_bytes), py::arg("name"), py::arg("content"), py::arg("threads"), py::arg("isa"),
           py::arg("macs_per_thread") = kMacsPerThread, py::arg("conv_form") = "")
      .def("run", &run, py::arg("images"), py::arg("outputs"), py::arg("classes"), py::arg("taps"),
           py::arg("step_seconds"), py::arg("lengths"))
      .def("plan", &plan, py::arg("batch"))
      .def_property_readonly("activations", &activations)
      .def_property_readonly("threads", &Session::threads)
      .def_property_readonly("isa", [](const Session& s) { return s.program().kernels->isa; })
      .def_property_readonly("nbytes", [](const Session& s) { return s.program().file_bytes; })
      .def_property_readonly("footprint", [](const Session& s) { return s.program().footprint; })
      .def_property_readonly("members",
                             [](const Session& s) {
                               std::vector<std::string> names;
                               for (const Member& member : s.program().graph.members) names.push_back(member.name);
                               return names;
                             })
      .def_property_readonly("classes", [](const Session& s) { return s.program().graph.classes; })
      .def_property_readonly("preprocess", [](const Session& s) { return s.program().graph.preprocess; })
      .def_property_readonly("vocabulary", [](const Session& s) { return s.program().graph.vocabulary; })
      .def_property_readonly("variable", [](const Session& s) { return s.program().graph.variable; })
      .def_property_readonly("input", [](const Session& s) { return s.program().member_input[0]; })
      .def_property_readonly("outputs", [](const Session& s) { return s.program().outputs; });
}

}  // namespace qdeploy
