#pragma once

namespace qdeploy {

// The loops, up to one without a name: `steps` steps on each accumulator.
struct PeakLoop {
  const char *isa, *precision;
  int macs_per_step;
  void (*run)(long steps);
};
constexpr int kPeakAccumulators = 12;
extern const PeakLoop kPeakLoops[];

}  // namespace qdeploy
