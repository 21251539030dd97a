#include "plan_rows.h"

#include "errors.h"
#include "ops/conv.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

std::string kernel_of(const Program& program, const Step& step) {
  if (step.conv && step.conv->kernel) return step.conv->kernel->name;
  if (step.conv && step.conv->winograd) return step.conv->winograd->name;
  return std::string(step.conv ? "depthwise" : step.node->op->name) + "__" + program.kernels->isa;
}

std::string tile_of(const Step& step) {
  if (step.conv && step.conv->winograd) {
    return std::to_string(step.conv->winograd->mr) + "x" + std::to_string(step.conv->winograd->nr);
  }
  if (!step.conv || !step.conv->kernel) return "";
  const ConvKernel& kernel = *step.conv->kernel;
  return std::to_string(kernel.mr * kernel.strips) + "x" + std::to_string(kernel.nr);
}

}  // namespace

std::vector<PlanRow> plan_rows(Session& session, int64_t batch) {
  if (batch < 1) throw InputError("expected at least 1 image, got " + std::to_string(batch) + " - at batch");
  const Program& program = session.program();
  const std::shared_ptr<const Plan> plan = session.plan(session.images_per_chunk(batch, false), program.longest, false);
  const int threads = session.threads_for(static_cast<double>(plan->batch));
  std::vector<PlanRow> rows;
  for (size_t s = 0; s < program.steps.size(); ++s) {
    const Step& step = program.steps[s];
    rows.push_back({&step, program.graph.members[step.member].name, kernel_of(program, step), tile_of(step),
                    split_of(step, plan->tilings[s], threads), step.node->data ? step.node->data->bits : 0,
                    step.conv ? step.conv->why_direct : ""});
  }
  return rows;
}

}  // namespace qdeploy
