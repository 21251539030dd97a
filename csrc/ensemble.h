// How the f32 outputs of the members of an ensemble become probabilities and a class (docs/format.md section 4; the
// rules are equation 6 of QT-DoG, "logits", and the mean of softmax, "probs"). Every step is one IEEE operation or an
// integer sum.
#pragma once
#include <cstdint>
#include <vector>

#include "graph.h"

namespace qdeploy {

// logits: one [k] array per member. Writes k probabilities and returns the class.
int64_t combine_members(Combine rule, const std::vector<const float*>& logits, int64_t k, float* probabilities);

// The first largest of n values.
template <typename T>
int64_t first_largest(const T* values, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (values[i] > values[best]) best = i;
  }
  return best;
}

}  // namespace qdeploy
