#include "gather.h"

#include <algorithm>
#include <cstring>

namespace qdeploy {
namespace {

// Up to so many elements a loop is quicker than memcpy.
constexpr int32_t kShort = 8;

template <class T>
T* copy_run(const T* a, const GatherRun& run, T zero_point, T* c) {
  if (run.first < 0) {
    std::fill_n(c, run.count, zero_point);
  } else if (run.count > kShort) {
    memcpy(c, a + run.first, static_cast<size_t>(run.count) * sizeof(T));
  } else {
    for (int32_t i = 0; i < run.count; ++i) c[i] = a[run.first + i];
  }
  return c + run.count;
}

template <class T>
void copy_rows(const std::vector<GatherRun>& runs, size_t n, const GatherRows& rows) {
  const T* a = static_cast<const T*>(rows.a);
  T* c = static_cast<T*>(rows.c);
  for (const GatherRun& run : runs) {
    for (int32_t i = 0; i < run.count; ++i, c += rows.c_stride) {
      if (run.first < 0) {
        std::fill_n(c, n, static_cast<T>(rows.zero_point));
      } else {
        memcpy(c, a + (run.first + i) * rows.a_stride, n * sizeof(T));
      }
    }
  }
}

template <class T>
void copy_channels(const std::vector<GatherRun>& runs, size_t count, const GatherRows& rows) {
  const T* a = static_cast<const T*>(rows.a);
  T* c = static_cast<T*>(rows.c);
  for (size_t row = 0; row < count; ++row, a += rows.a_stride, c += rows.c_stride) {
    T* to = c;
    for (const GatherRun& run : runs) to = copy_run(a, run, static_cast<T>(rows.zero_point), to);
  }
}

}  // namespace

std::vector<GatherRun> gather_runs(const int32_t* index, size_t n) {
  std::vector<GatherRun> runs;
  for (size_t i = 0; i < n; ++i) {
    const bool continues =
        !runs.empty() && (index[i] < 0 ? runs.back().first < 0
                                       : runs.back().first >= 0 && index[i] == runs.back().first + runs.back().count);
    if (continues) {
      ++runs.back().count;
    } else {
      runs.push_back({index[i], 1});
    }
  }
  return runs;
}

void gather_rows(const std::vector<GatherRun>& runs, size_t n, const GatherRows& rows) {
  rows.element_bytes == 1 ? copy_rows<uint8_t>(runs, n, rows) : copy_rows<int16_t>(runs, n, rows);
}

// A slice is copied, 0.06 ns a byte. A shuffle of fewer than 256 channels is a look-up of its index in the row, by the
// kernel of table.
ChannelGather::ChannelGather(const int32_t* index, size_t n, size_t channels, size_t element_bytes)
    : n_(n), channels_(channels), runs_(gather_runs(index, n)) {
  if (element_bytes != 1 || channels > 255 || runs_.size() * kShort < n) return;
  codes_ = AlignedBuffer(n);
  for (size_t i = 0; i < n; ++i) codes_.data()[i] = static_cast<uint8_t>(index[i] < 0 ? channels : index[i]);
}

void ChannelGather::run(const Kernels& kernels, size_t count, const GatherRows& rows) const {
  if (codes_.bytes() > 0) return look_up(kernels, count, rows);
  rows.element_bytes == 1 ? copy_channels<uint8_t>(runs_, count, rows) : copy_channels<int16_t>(runs_, count, rows);
}

void ChannelGather::look_up(const Kernels& kernels, size_t count, const GatherRows& rows) const {
  alignas(64) uint8_t table[256] = {};
  table[channels_] = static_cast<uint8_t>(rows.zero_point);
  const uint8_t* a = static_cast<const uint8_t*>(rows.a);
  uint8_t* c = static_cast<uint8_t*>(rows.c);
  for (size_t row = 0; row < count; ++row, a += rows.a_stride, c += rows.c_stride) {
    memcpy(table, a, channels_);
    kernels.table(n_, table, codes_.data(), c);
  }
}

}  // namespace qdeploy
