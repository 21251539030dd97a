#include "tiling.h"

#include "ops/conv.h"
#include "winograd.h"

namespace qdeploy {
namespace {

// ---- Tiles --------------------------------------------------------------------------------------------------------

// Output pixels that lie at constant strides in input, output and residual.
struct Run {
  int64_t a, c, residual, length;
};

struct Strides {  // distances between neighbours in one dimension
  int64_t a, c, residual;
};

bool continues(const Strides& outer, const Strides& inner, int64_t length) {
  return outer.a == inner.a * length && outer.c == inner.c * length && outer.residual == inner.residual * length;
}

// What lies where the residual of a step would: the output, where it has none.
const Activation& residual_of(const Activations& activations, const Step& step) {
  return activations[step.node->has_residual ? step.inputs[1] : step.output];
}

// The output of a convolution as few long runs: rows, or whole images where rows follow each other without a gap.
struct Runs {
  Run first;
  Strides row, image;
  int64_t rows, images;
};

Runs runs_of(const Activations& activations, const Step& step, int64_t images) {
  const Activation &in = activations[step.inputs[0]], &out = activations[step.output];
  const Activation& residual = residual_of(activations, step);
  const Window& window = conv_of(*step.node)->window;
  const Strides pixel = {window.stride[1] * in.c, out.c, residual.c};
  const Strides row = {window.stride[0] * in.row_pitch, out.row_pitch, residual.row_pitch};
  const Strides image = {in.image_pitch, out.image_pitch, residual.image_pitch};
  const int64_t start = in.origin - window.padding[0] * in.row_pitch - window.padding[1] * in.c;

  int64_t length = out.w, rows = out.h;
  if (rows == 1 || continues(row, pixel, length)) {
    length *= rows, rows = 1;
    if (images == 1 || continues(image, pixel, length)) length *= images, images = 1;
  }
  return {{start, out.origin, residual.origin, length}, row, image, rows, images};
}

// Of one run, at most mr pixels each.
int64_t strips_of(const Runs& runs, const ConvKernel& kernel) {
  return (runs.first.length + kernel.mr - 1) / kernel.mr;
}

// Strips of one length share tiles; of each length one may stay half full.
int64_t most_tiles(const Runs& runs, const ConvKernel& kernel) {
  return runs.images * runs.rows * strips_of(runs, kernel) / kernel.strips + kernel.mr;
}

// Cuts the runs into strips of nearly equal length, and pairs strips of one length into tiles.
std::vector<ConvTile> tiles_of(const Activations& activations, const Step& step, int64_t images) {
  const ConvKernel& kernel = *step.conv->kernel;
  const int64_t a_stride = conv_of(*step.node)->window.stride[1] * activations[step.inputs[0]].c;
  const int64_t c_stride = activations[step.output].c, residual_stride = residual_of(activations, step).c;
  const Runs runs = runs_of(activations, step, images);
  const int64_t strips = strips_of(runs, kernel), length = runs.first.length;
  std::vector<ConvTile> tiles;
  tiles.reserve(most_tiles(runs, kernel));
  std::vector<int> open(kernel.mr + 1, -1);  // the tile with room for a strip of that length; -1: none
  const auto cut = [&](int64_t a, int64_t c, int64_t residual) {
    for (int64_t s = 0, begin = 0; s < strips; ++s) {
      const int64_t end = length * (s + 1) / strips;
      const int r = static_cast<int>(end - begin);
      if (open[r] < 0) {
        open[r] = static_cast<int>(tiles.size());
        tiles.push_back({});
        tiles.back().r = static_cast<uint8_t>(r);
      }
      ConvTile& tile = tiles[open[r]];
      tile.a[tile.strips] = static_cast<uint32_t>(a + begin * a_stride);
      tile.c[tile.strips] = static_cast<uint32_t>(c + begin * c_stride);
      tile.residual[tile.strips] = static_cast<uint32_t>(residual + begin * residual_stride);
      if (++tile.strips == kernel.strips) open[r] = -1;
      begin = end;
    }
  };
  for (int64_t n = 0; n < runs.images; ++n) {
    for (int64_t y = 0; y < runs.rows; ++y) {
      cut(runs.first.a + n * runs.image.a + y * runs.row.a, runs.first.c + n * runs.image.c + y * runs.row.c,
          runs.first.residual + n * runs.image.residual + y * runs.row.residual);
    }
  }
  return tiles;
}

// ---- Blocks and shares --------------------------------------------------------------------------------------------

// Panels outermost when the input stays in L2, else 56 pixels under all panels: 16.2 ms instead of 16.65 and 18.3
// with one rule for all layers of ResNet-50, in the prototype of this engine. Tiles of 32 pixels (AMX) pass so fast that
// the start of a call shows: 512 pixels at a time take 5.66 ms, 56 took 6.51.
int64_t tiles_per_block(const Activations& activations, const Step& step) {
  const Activation &in = activations[step.inputs[0]], &out = activations[step.output];
  const Window& window = conv_of(*step.node)->window;
  const bool pointwise = window.kernel[0] * window.kernel[1] == 1;
  const bool many_outputs = pointwise && out.c > in.c, large_input = pointwise && in.c * in.h * in.w > 256 * 1024;
  const int64_t tile = step.conv->kernel->mr * step.conv->kernel->strips, pixels = tile < 32 ? 56 : 512;
  return many_outputs || large_input ? (pixels + tile - 1) / tile : 0;
}

// Pixels are shared out where that leaves every thread several tiles: then each keeps its rows in its own L2. Small
// maps share channels: on 7x7 a split of 4 tiles would read all weights twice (ResNet-50: 0.4 ms of 8.4 on two
// threads).
bool splits_channels(const Step& step, const Tiling& tiling, int threads) {
  if (threads == 1) return false;
  const int64_t panels = step.conv->panels;
  const auto worst = [&](int64_t n) { return (n + threads - 1) / threads; };
  if (step.conv->winograd) {  // under other panels the input is transformed again: a tenth of the work
    const int64_t by_patch = worst(tiling.patches) * panels, by_panel = tiling.patches * worst(panels);
    return by_panel < by_patch - by_patch / 10 || (by_panel <= by_patch && tiling.patches < 16 * threads);
  }
  const int64_t tiles = static_cast<int64_t>(tiling.tiles.size());
  const int64_t by_tile = worst(tiles) * panels;
  const int64_t by_panel = tiles * worst(panels);
  return by_panel < by_tile || (by_panel == by_tile && tiles < 4 * threads);
}

}  // namespace

Tiling make_tiling(const Activations& activations, const Step& step, int64_t images) {
  if (step.conv && step.conv->winograd) {
    const Activation &in = activations[step.inputs[0]], &out = activations[step.output];
    const int64_t patches = patches_of(*step.conv->winograd, out).count(images);
    const size_t u_bytes = step.conv->panels * step.conv->panel_bytes;
    return {{}, patches_per_block(*step.conv->winograd, in.c, u_bytes, patches), patches};
  }
  if (!step.conv || !step.conv->kernel) return {};
  return {tiles_of(activations, step, images), tiles_per_block(activations, step)};
}

uint64_t tiling_bytes(const Activations& activations, const Step& step, int64_t images) {
  if (!step.conv || !step.conv->kernel) return 0;
  return static_cast<uint64_t>(most_tiles(runs_of(activations, step, images), *step.conv->kernel)) * sizeof(ConvTile);
}

ConvPart part_of(const Step& step, const Tiling& tiling, Share share) {
  const int64_t panels = step.conv->panels;
  const int64_t tiles = step.conv->winograd ? tiling.patches : static_cast<int64_t>(tiling.tiles.size());
  if (splits_channels(step, tiling, share.threads)) return {{0, tiles}, slice(panels, share)};
  return {slice(tiles, share), {0, panels}};
}

const char* split_of(const Step& step, const Tiling& tiling, int threads) {
  if (tiling.tiles.empty() && !tiling.patches) return "rows";
  if (splits_channels(step, tiling, threads)) return "channels";
  return tiling.patches ? "patches" : "tiles";
}

}  // namespace qdeploy
