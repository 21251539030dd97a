// LSQ for training on a CPU (kernels/lsq.py is the definition): fake quantization of float32 tensors and its gradients,
// one pass over memory each, on several threads. The results do not depend on their number, nor on the instruction set.
#pragma once
#include <cstdint>

#include "ukernels.h"

namespace qdeploy {

// `rows` rows of `columns` numbers, each row with a step size of its own. No two rows overlap.
struct LsqTensor {
  const float* value;
  const float* step;
  int64_t rows, columns;
  int qmin, qmax;
};

// rint(clamp(value / step, qmin, qmax)) * step to `c`.
void lsq_forward(const Kernels& kernels, const LsqTensor& tensor, float* c, int threads);

// The gradients of values and step sizes, given that of the result.
void lsq_backward(const Kernels& kernels, const LsqTensor& tensor, const float* grad, double grad_scale,
                  float* grad_value, float* grad_step, int threads);

// The sum of the squared errors of each row.
void lsq_errors(const Kernels& kernels, const LsqTensor& tensor, double* errors, int threads);

}  // namespace qdeploy
