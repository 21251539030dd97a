// How many multiply-accumulates a core can do at best: the loops of isa/peak_loops.cc, timed.
#include "peak.h"

#include <chrono>

#include "cpu.h"
#include "isa/peak_loops.h"

namespace qdeploy {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Of the fastest slice: one in which the machine was disturbed does not count.
double best_gmacs(const PeakLoop& loop, double seconds) {
  constexpr long kRounds = 2000;
  double best = 0;
  for (const auto begin = Clock::now(); seconds_since(begin) < seconds;) {
    const auto slice = Clock::now();
    loop.run(kRounds);
    const double gmacs = 1e-9 * kRounds * kPeakAccumulators * loop.macs_per_round / seconds_since(slice);
    if (gmacs > best) best = gmacs;
  }
  return best;
}

}  // namespace

std::optional<double> peak_gmacs(const std::string& isa, const std::string& precision, double seconds) {
  const std::string known = kernels_for(isa).isa;
  for (const PeakLoop* loop = kPeakLoops; loop->isa; ++loop) {
    if (known == loop->isa && precision == loop->precision) return best_gmacs(*loop, seconds);
  }
  return std::nullopt;
}

}  // namespace qdeploy
