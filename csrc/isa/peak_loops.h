#pragma once

namespace qdeploy {

// The loops, up to one without a name: `rounds` rounds on each accumulator.
struct PeakLoop {
  const char *isa, *precision;
  int macs_per_round;
  void (*run)(long rounds);
};
constexpr int kPeakAccumulators = 12;
extern const PeakLoop kPeakLoops[];

}  // namespace qdeploy
