#include "plan.h"

#include <algorithm>
#include <numeric>

#include "arena.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

// ---- Passes -------------------------------------------------------------------------------------------------------

// Weights are read once a pass, activations leave L2 when there are many. With 2 the last stage of a ResNet runs
// together (2 % faster there in batches of 8), and so do the classifiers of VGG-16 (the network 5 % faster in batches
// of 2).
constexpr int64_t kWeightsOverActivations = 2;

bool activations_outweigh(const Activations& activations, const Step& step) {
  if (!step.conv) return false;
  const int64_t weights = step.conv->panels * static_cast<int64_t>(step.conv->panel_bytes);
  const Activation &in = activations[step.inputs[0]], &out = activations[step.output];
  return weights < kWeightsOverActivations * (in.image_pitch + out.image_pitch);
}

std::vector<Pass> passes_of(const Program& program, const Activations& activations, int64_t batch) {
  const size_t steps = program.steps.size();
  if (batch == 1) return {{0, steps, true}};
  std::vector<Pass> passes;
  for (size_t begin = 0, end = 0; begin < steps; begin = end) {  // of each member
    size_t together = begin;
    for (end = begin; end < steps && program.steps[end].member == program.steps[begin].member; ++end) {
      if (activations_outweigh(activations, program.steps[end])) together = end + 1;
    }
    if (together > begin) passes.push_back({begin, together, false});
    if (together < end) passes.push_back({together, end, true});
  }
  return passes;
}

// ---- Arena: activations whose lives do not overlap share memory ---------------------------------------------------

struct Life {
  int first, last;      // steps; the inputs of the model live from -1, its outputs to the end
  bool for_all = true;  // every image of the batch has its own memory
};

// What a pass that goes image by image makes of the life of an activation that it reads or writes.
void live_through(const Pass& pass, Life* life) {
  const int begin = static_cast<int>(pass.begin), end = static_cast<int>(pass.end);
  life->for_all = life->first < begin || life->last >= end;
  if (!life->for_all) return;  // lives and dies with each image
  life->first = std::min(life->first, begin), life->last = std::max(life->last, end - 1);  // outlives the later images
}

std::vector<Life> lives(const Program& program, const std::vector<Pass>& passes, bool keep_all) {
  const int steps = static_cast<int>(program.steps.size());
  std::vector<Life> life(program.activations.size(), {steps, -1});
  for (const int input : program.member_input) life[input].first = -1;
  for (int s = 0; s < steps; ++s) {
    const Step& step = program.steps[s];
    life[step.output] = {s, s};
    for (const int input : step.inputs) life[input].last = std::max(life[input].last, s);
  }
  for (const int output : program.outputs) life[output].last = steps;
  if (keep_all) life.assign(life.size(), {-1, steps});
  for (const Pass& pass : passes) {
    if (pass.together) continue;
    for (size_t s = pass.begin; s < pass.end; ++s) {
      live_through(pass, &life[program.steps[s].output]);
      for (const int input : program.steps[s].inputs) live_through(pass, &life[input]);
    }
  }
  return life;
}

// Whether the output can lie where the input does.
bool fits(InPlace kind, const Activation& in, const Activation& out) {
  if (kind == InPlace::rows) return in.same_rows(out);
  return kind == InPlace::reshaped ? in.same_order(out) : in.same_layout(out);
}

// The activation whose memory the output of a step may take over, because nobody reads it later; -1: none.
int overwritten_input(const Activations& activations, const Step& step, int index, const std::vector<Life>& life) {
  const InPlace kind = step.node->op->in_place;
  const size_t input = kind == InPlace::residual ? 1 : 0;
  if (kind == InPlace::never || input >= step.inputs.size()) return -1;
  const int candidate = step.inputs[input];
  // A convolution reads the pixels around each that it writes: its residual must not be its input as well.
  const bool read_again = life[candidate].last > index || (kind == InPlace::residual && candidate == step.inputs[0]);
  const bool same = fits(kind, activations[candidate], activations[step.output]);
  const bool same_images = life[candidate].for_all == life[step.output].for_all;
  return same && same_images && !read_again ? candidate : -1;
}

// Owner of each activation's memory: itself, or the activation whose memory it takes over.
std::vector<int> merge_in_place(const Program& program, const Activations& activations, std::vector<Life>* life) {
  std::vector<int> owner(program.activations.size());
  std::iota(owner.begin(), owner.end(), 0);
  for (size_t s = 0; s < program.steps.size(); ++s) {
    const Step& step = program.steps[s];
    const int over = overwritten_input(activations, step, static_cast<int>(s), *life);
    if (over >= 0) owner[step.output] = owner[over];
  }
  for (size_t i = 0; i < owner.size(); ++i) {
    Life &mine = (*life)[i], &whole = (*life)[owner[i]];
    whole.first = std::min(whole.first, mine.first), whole.last = std::max(whole.last, mine.last);
  }
  return owner;
}

size_t bytes_of(const Activation& activation, int64_t batch) {
  const size_t bytes = static_cast<size_t>(batch * activation.image_pitch * activation.bytes());
  return (bytes + kOverread + 63) / 64 * 64;
}

// The program's activations, where texts have this length.
Activations activations_for(const Program& program, int64_t length) {
  Activations activations = program.activations;
  for (Activation& a : activations) {
    if (!a.varies) continue;  // no convolution reads such ones, so they have no border
    a.h -= program.longest - length;
    a.image_pitch = a.h * a.row_pitch;
  }
  return activations;
}

// Everything but the tilings.
Plan plan_arena(const Program& program, int64_t batch, int64_t length, bool keep_all) {
  Plan plan;
  plan.batch = batch;
  plan.activations = activations_for(program, length);
  plan.passes = passes_of(program, plan.activations, batch);
  std::vector<Life> life = lives(program, plan.passes, keep_all);
  std::vector<int> owner(program.activations.size());
  std::iota(owner.begin(), owner.end(), 0);
  if (!keep_all) owner = merge_in_place(program, plan.activations, &life);
  std::vector<Block> blocks;
  std::vector<size_t> block(life.size());  // of each activation that owns memory
  for (size_t i = 0; i < life.size(); ++i) {
    plan.for_all.push_back(life[i].for_all);
    if (owner[i] != static_cast<int>(i)) continue;
    block[i] = blocks.size();
    blocks.push_back({bytes_of(plan.activations[i], life[i].for_all ? batch : 1), life[i].first, life[i].last});
  }
  const Arena arena = place(blocks);
  for (const int i : owner) plan.offset.push_back(arena.offset[block[i]]);
  plan.scratch = arena.bytes, plan.scratch_bytes = 0;
  for (const Pass& pass : plan.passes) {
    for (size_t s = pass.begin; s < pass.end; ++s) {
      const Step& step = program.steps[s];
      if (!step.node->op->scratch) continue;
      const size_t bytes = step.node->op->scratch(program, step, plan.activations, pass.together ? batch : 1);
      plan.scratch_bytes = std::max(plan.scratch_bytes, (bytes + 63) / 64 * 64);
    }
  }
  plan.arena_bytes = arena.bytes + program.threads * plan.scratch_bytes;
  return plan;
}

}  // namespace

Plan make_plan(const Program& program, int64_t batch, int64_t length, bool keep_all) {
  Plan plan = plan_arena(program, batch, length, keep_all);
  for (const Pass& pass : plan.passes) {
    for (size_t s = pass.begin; s < pass.end; ++s) {
      plan.tilings.push_back(make_tiling(plan.activations, program.steps[s], pass.together ? batch : 1));
    }
  }
  return plan;
}

PlanBytes plan_bytes(const Program& program, int64_t batch, bool keep_all) {
  const Plan plan = plan_arena(program, batch, program.longest, keep_all);
  const Activation& output = program.activations[program.outputs[0]];
  const bool is_ensemble = program.graph.combine != Combine::none;
  PlanBytes bytes = {plan.arena_bytes, is_ensemble ? 2 * sizeof(float) * static_cast<uint64_t>(output.c) : 0};
  for (const Pass& pass : plan.passes) {
    for (size_t s = pass.begin; s < pass.end; ++s) {
      bytes.others += tiling_bytes(plan.activations, program.steps[s], pass.together ? batch : 1);
    }
  }
  return bytes;
}

}  // namespace qdeploy
