// From the packed codes of the file to the panels that the kernels read (layouts: ukernels.h).
#pragma once
#include "footprint.h"
#include "program.h"

namespace qdeploy {

// Makes Step::conv of every step with weights, and Program::weights, on the program's threads, and counts their bytes
// before. The activations have their pitches. Throws ModelError for weights that do not fit the memory, or whose results
// could leave the range that the kernels convert exactly.
void pack_weights(const ModelFile& file, Footprint* footprint, Program* program);

}  // namespace qdeploy
