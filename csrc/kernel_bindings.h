// Norm and attention as functions of the Python module, on arrays instead of the activations of a model: for tests.
#pragma once
#include <pybind11/pybind11.h>

namespace qdeploy {

void bind_kernels(pybind11::module_& module);

}  // namespace qdeploy
