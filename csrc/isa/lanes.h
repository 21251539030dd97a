// All kernels that stand once, for the lanes of any instruction set.
#pragma once
#include "attention.h"
#include "norm.h"
#include "rows.h"

namespace qdeploy {
namespace {

template <class Lanes>
void set_lane_kernels(Kernels* kernels) {
  kernels->scale_add = scale_add<Lanes>;
  kernels->mean = mean<Lanes>;
  kernels->weigh = weigh<Lanes>;
  kernels->depthwise_f32 = depthwise_f32<Lanes>;
  kernels->norm = norm<Lanes>;
  kernels->attention_weights = attention_weights<Lanes>;
  kernels->attention_output = attention_output<Lanes>;
}

}  // namespace
}  // namespace qdeploy
