// conv2d in its Winograd form.
#pragma once
#include "op.h"

namespace qdeploy {

void run_winograd(const StepRun& run);

}  // namespace qdeploy
