#include "winograd.h"

#include <algorithm>
#include <cstring>

#include "../winograd.h"
#include "conv.h"

namespace qdeploy {
namespace {

// One thread's walk through its patches and panels.
class Walk {
 public:
  explicit Walk(const StepRun& run)
      : run_(run),
        conv_(*run.step.conv),
        kernel_(*conv_.winograd),
        data_(run.data<ConvData>()),
        in_(run.in()),
        out_(run.out()),
        patches_(patches_of(kernel_, out_)),
        part_(part_of(run.step, run.tiling, run.share)),
        scratch_(winograd_scratch(kernel_, in_.c, run.tiling.tiles_per_block)),
        memory_(run.chunk.scratch(run.share.thread)) {}

  void run() {
    const int64_t patches = part_.tiles.end - part_.tiles.begin;
    const int64_t blocks = (patches + run_.tiling.tiles_per_block - 1) / run_.tiling.tiles_per_block;
    for (int64_t block = 0; block < blocks; ++block) {
      const Range range = {part_.tiles.begin + patches * block / blocks,
                           part_.tiles.begin + patches * (block + 1) / blocks};
      for (int64_t i = range.begin; i < range.end; ++i) transform_input(i, i - range.begin);
      for (int64_t panel = part_.panels.begin; panel < part_.panels.end; ++panel) run_panel(panel, range);
    }
  }

 private:
  void run_panel(int64_t panel, Range block) const {
    const int64_t at_once = scratch_.patches_per_run;
    for (int64_t first = block.begin; first < block.end; first += at_once) {
      const int64_t end = std::min(block.end, first + at_once);
      multiply(panel, v_of(first - block.begin), end - first);
      for (int64_t i = first; i < end; ++i) transform_output(panel, i, i - first);
    }
  }

  struct Place {
    int64_t image, y, x;  // of the first output pixel
  };
  Place place_of(int64_t patch) const {
    const int64_t row = patch / patches_.across;
    return {row / patches_.down, row % patches_.down * kernel_.m, patch % patches_.across * kernel_.m};
  }

  // Of position 0, chunk 0 of a patch of the block.
  int16_t* v_of(int64_t slot) const {
    const int64_t run = slot / scratch_.patches_per_run, place = slot % scratch_.patches_per_run;
    return reinterpret_cast<int16_t*>(memory_) + run * scratch_.v_run_stride + place * kWinogradChunk;
  }
  int32_t* m() const { return reinterpret_cast<int32_t*>(memory_ + scratch_.m); }

  // The patch's pixels, in the order of rows, or a copy of those that are inside the image and its border.
  void transform_input(int64_t patch, int64_t slot) const {
    const Place place = place_of(patch);
    const Window& window = data_.window;
    WinogradInput params = {};
    params.row_stride = in_.row_pitch;
    params.a_stride = in_.c;
    params.n = static_cast<int32_t>(in_.c);
    params.zero_point = in_.zero_point;
    params.a = run_.from() + place.image * in_.image_pitch + in_.origin +
               (place.y - window.padding[0]) * in_.row_pitch + (place.x - window.padding[1]) * in_.c;
    params.v = v_of(slot);
    params.position_stride = scratch_.v_position_stride;
    params.chunk_stride = scratch_.v_chunk_stride;
    const int64_t size = kernel_.m + 2;
    const int64_t rows = std::min(size, out_.h + 2 - place.y), columns = std::min(size, out_.w + 2 - place.x);
    if (rows < size || columns < size) {
      uint8_t* edge = memory_ + scratch_.edge;
      for (int64_t y = 0; y < rows; ++y) {
        memcpy(edge + y * size * in_.c, params.a + y * in_.row_pitch, columns * in_.c);
      }
      params.a = edge;
      params.row_stride = size * in_.c;
    }
    kernel_.input(&params);
  }

  void multiply(int64_t panel, const int16_t* v, int64_t patches) const {
    const int64_t group = panel * kernel_.nr / (out_.c / data_.groups);
    WinogradProducts params = {};
    params.positions = static_cast<int32_t>((kernel_.m + 2) * (kernel_.m + 2));
    params.patches = static_cast<int32_t>(patches);
    params.k = conv_.k;
    params.v = v + group * (in_.c / data_.groups) / kWinogradChunk * scratch_.v_chunk_stride;
    params.v_position_stride = scratch_.v_position_stride;
    params.v_chunk_stride = scratch_.v_chunk_stride;
    params.u = reinterpret_cast<const int16_t*>(run_.chunk.program.weights.data() + conv_.weight_offset +
                                                panel * conv_.panel_bytes);
    params.m = m();
    params.m_position_stride = scratch_.m_position_stride;
    kernel_.products(&params);
  }

  void transform_output(int64_t panel, int64_t patch, int64_t slot) const {
    const Place place = place_of(patch);
    const int64_t first = panel * kernel_.nr;
    const auto offset = [&](const Activation& a) {
      return place.image * a.image_pitch + a.origin + place.y * a.row_pitch + place.x * a.c + first;
    };
    WinogradOutput params = {};
    params.m = m() + slot * kernel_.nr;
    params.position_stride = scratch_.m_position_stride;
    params.rows = static_cast<int32_t>(std::min<int64_t>(kernel_.m, out_.h - place.y));
    params.columns = static_cast<int32_t>(std::min<int64_t>(kernel_.m, out_.w - place.x));
    params.n = static_cast<int32_t>(std::min<int64_t>(kernel_.nr, out_.c - first));
    params.multiplier = reinterpret_cast<const float*>(conv_.multiplier.data()) + first;
    params.bias = reinterpret_cast<const float*>(conv_.bias.data()) + first;
    params.c_row_stride = out_.row_pitch;
    params.c_stride = out_.c;
    params.qmin = run_.node().qmin;
    params.qmax = run_.node().qmax;
    if (run_.node().has_residual) {
      const Activation& residual = run_.in(1);
      params.residual = run_.from(1) + offset(residual);
      params.residual_row_stride = residual.row_pitch;
      params.residual_stride = residual.c;
      params.residual_multiplier = data_.residual_multiplier;
      params.inner = data_.inner ? &*data_.inner : nullptr;
    }
    if (out_.is_f32()) {
      params.c = run_.to_f32() + offset(out_);
      kernel_.f32(&params);
    } else {
      params.c = run_.to() + offset(out_);
      kernel_.qu8(&params);
    }
  }

  const StepRun& run_;
  const PackedConv& conv_;
  const WinogradKernel& kernel_;
  const ConvData& data_;
  const Activation &in_, &out_;
  const Patches patches_;
  const ConvPart part_;
  const WinogradScratch scratch_;
  uint8_t* const memory_;
};

}  // namespace

void run_winograd(const StepRun& run) { Walk(run).run(); }

}  // namespace qdeploy
