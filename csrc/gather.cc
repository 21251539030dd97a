#include "gather.h"

#include <algorithm>
#include <cstring>

namespace qdeploy {
namespace {

// Up to so many elements a loop is quicker than memcpy.
constexpr int32_t kShort = 8;

// Entries of an index that follow each other; first -1: so many zero points.
struct Run {
  int32_t first, count;
};

// Returns how many runs there are.
size_t runs_of(const ChannelGather& gather, Run* runs) {
  size_t count = 0;
  for (size_t i = 0; i < gather.n; ++i) {
    const int32_t from = gather.index[i];
    Run* last = count > 0 ? &runs[count - 1] : nullptr;
    if (last && from == (last->first < 0 ? -1 : last->first + last->count)) {
      ++last->count;
    } else {
      runs[count++] = {from, 1};
    }
  }
  return count;
}

template <class T>
T* copy_run(const T* a, const Run& run, T zero_point, T* c) {
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
void copy_runs(const ChannelGather& gather, const Run* runs, size_t count, size_t pixels, const T* a, T* c) {
  for (size_t pixel = 0; pixel < pixels; ++pixel, a += gather.a_stride, c += gather.c_stride) {
    T* to = c;
    for (size_t i = 0; i < count; ++i) to = copy_run(a, runs[i], static_cast<T>(gather.zero_point), to);
  }
}

template <class T>
void copy_elements(const ChannelGather& gather, size_t pixels, const T* a, T* c) {
  const T zero_point = static_cast<T>(gather.zero_point);
  const int32_t* const index = gather.index;  // which a store of bytes could change otherwise
  const size_t n = gather.n;
  for (size_t pixel = 0; pixel < pixels; ++pixel, a += gather.a_stride, c += gather.c_stride) {
    for (size_t i = 0; i < n; ++i) c[i] = index[i] < 0 ? zero_point : a[index[i]];
  }
}

// The index in codes, looked up in each pixel.
void look_up(const Kernels& kernels, const ChannelGather& gather, size_t pixels, const uint8_t* a, uint8_t* c,
             uint8_t* codes) {
  for (size_t i = 0; i < gather.n; ++i) {
    codes[i] = static_cast<uint8_t>(gather.index[i] < 0 ? gather.channels : gather.index[i]);
  }
  alignas(64) uint8_t table[256] = {};
  table[gather.channels] = static_cast<uint8_t>(gather.zero_point);
  for (size_t pixel = 0; pixel < pixels; ++pixel, a += gather.a_stride, c += gather.c_stride) {
    memcpy(table, a, gather.channels);
    kernels.table(gather.n, table, codes, c);
  }
}

}  // namespace

size_t gather_scratch(size_t n) { return n * sizeof(Run) + 2 * kOverread; }

// A slice is copied, 0.05 ns a byte. A shuffle of fewer than 256 channels is a look-up of its index in the pixel, by the
// kernel of table.
void gather_channels(const Kernels& kernels, const ChannelGather& gather, size_t pixels, const void* a, void* c,
                     uint8_t* scratch) {
  Run* const runs = reinterpret_cast<Run*>(scratch);
  const size_t count = runs_of(gather, runs);
  const bool has_runs = count * kShort < gather.n;
  const auto copy = [&](auto* from, auto* to) {
    has_runs ? copy_runs(gather, runs, count, pixels, from, to) : copy_elements(gather, pixels, from, to);
  };
  if (gather.element_bytes == 2) {
    copy(static_cast<const int16_t*>(a), static_cast<int16_t*>(c));
  } else if (has_runs || gather.channels > 255) {
    copy(static_cast<const uint8_t*>(a), static_cast<uint8_t*>(c));
  } else {
    look_up(kernels, gather, pixels, static_cast<const uint8_t*>(a), static_cast<uint8_t*>(c), scratch + kOverread);
  }
}

}  // namespace qdeploy
