// Rows or channels by an index: slices, shuffles, windows, class tokens. -1 gives zero points.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned.h"

namespace qdeploy {

// Entries of an index that follow each other; first -1: so many zero points.
struct GatherRun {
  int32_t first, count;
};
std::vector<GatherRun> gather_runs(const int32_t* index, size_t n);

// Elements of one or two bytes; strides count them, from a row to the next.
struct GatherRows {
  size_t element_bytes;
  int16_t zero_point;
  const void* a;
  ptrdiff_t a_stride;
  void* c;
  ptrdiff_t c_stride;
};

// Output row i is input row index[i], n elements.
void gather_rows(const std::vector<GatherRun>& runs, size_t n, const GatherRows& rows);

// The same channels of every row.
class ChannelGather {
 public:
  ChannelGather(const int32_t* index, size_t n, size_t channels, size_t element_bytes);

  void run(const Kernels& kernels, size_t count, const GatherRows& rows) const;

 private:
  void look_up(const Kernels& kernels, size_t count, const GatherRows& rows) const;

  size_t n_, channels_;
  std::vector<GatherRun> runs_;
  AlignedBuffer codes_;  // the index as codes of a table; empty: runs are copied
};

}  // namespace qdeploy
