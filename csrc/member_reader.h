// Reads one member of a graph and checks it; both readers, this and qdeploy/validate.py, name the same of several faults.
#pragma once
#include <cstdint>
#include <vector>

#include "constants.h"
#include "graph.h"
#include "json.h"
#include "model_file.h"

namespace qdeploy {

constexpr int kSeveralOutputs = 4;  // the first format version that has them
int version_of(Dtype type);         // the first that has such activations

// `graph` has the members before this one, and all that it says of the input.
Member read_member(const ModelFile& file, Constants* constants, const Json& json,
                   const std::vector<int64_t>& input_shape, const Graph& graph);

}  // namespace qdeploy
