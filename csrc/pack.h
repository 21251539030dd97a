// From the packed codes of the file to the panels that the kernels read (layouts: ukernels.h).
#pragma once
#include "program.h"

namespace qdeploy {

// Makes Step::conv of every step with weights, and Program::weights, on up to `threads` threads. The activations have
// their pitches. Throws ModelError for weights that do not fit the memory, or whose results could leave the range that
// the kernels convert exactly.
void pack_weights(const ModelFile& file, int threads, Program* program);

}  // namespace qdeploy
