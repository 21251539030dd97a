// What runs where, in words: a row for each step of a program.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "session.h"

namespace qdeploy {

struct PlanRow {
  const Step* step;
  std::string member, kernel, tile;  // tile: rows x channels of a convolution kernel, else empty
  const char* split;                 // as of split_of
  int bits;                          // of the weight codes in the file; 0: no weight
  const char* note;                  // why a convolution is not in the form that it would have, or empty
};

// Of a call with `batch` images, one or more. Throws InputError for fewer.
std::vector<PlanRow> plan_rows(Session& session, int64_t batch);

}  // namespace qdeploy
