#include "ensemble.h"

#include <cmath>
#include <cstring>

namespace qdeploy {
namespace {

constexpr float kLog2E = 0x1.715476p+0f;    // 0x3fb8aa3b
constexpr float kLn2High = 0x1.62e400p-1f;  // 0x3f317200: short, so that n * kLn2High is exact
constexpr float kLn2Low = 0x1.7f7d1cp-20f;  // 0x35bfbe8e
constexpr float kFixedPoint = 0x1p30f;

// exp(d) for d <= 0, by the formula of docs/format.md.
float exp_f32(float d) {
  if (d < -87.0f) return 0.0f;
  const float n = std::nearbyint(d * kLog2E);
  const float f = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, d));
  float p = 1.0f / 720.0f;
  for (const float c : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) p = std::fma(p, f, c);
  return std::ldexp(p, static_cast<int>(n));
}

// The denominator is a sum of integers, so that no order of summation can change it.
void softmax(const float* x, int64_t k, float* p) {
  const float largest = x[first_largest(x, k)];
  int64_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    p[i] = exp_f32(x[i] - largest) * kFixedPoint;
    sum += std::llrint(p[i]);
  }
  for (int64_t i = 0; i < k; ++i) p[i] /= static_cast<float>(sum);
}

}  // namespace

int64_t combine_members(Combine rule, const std::vector<const float*>& logits, int64_t k, float* probabilities) {
  const float share = 1.0f / static_cast<float>(logits.size());
  std::vector<float> mean(k, 0.0f), member(k);
  for (size_t m = 0; m < logits.size(); ++m) {
    const float* values = logits[m];
    if (rule == Combine::probs) {
      softmax(values, k, member.data());
      values = member.data();
    }
    for (int64_t i = 0; i < k; ++i) mean[i] = m == 0 ? values[i] : mean[i] + values[i];
  }
  for (float& value : mean) value *= share;
  if (rule == Combine::logits) {
    softmax(mean.data(), k, probabilities);
  } else {
    memcpy(probabilities, mean.data(), k * sizeof(float));
  }
  return first_largest(mean.data(), k);
}

}  // namespace qdeploy
